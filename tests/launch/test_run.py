"""Jobs that come to a good end: what reaches the screen, what the ranks are given."""

import importlib.util
import json
import os
import signal

import pytest


def test_every_rank_runs_and_the_lines_of_others_carry_their_number(jobs):
    done = jobs.run("print('hello from', rank, 'of', size)", np=4)
    assert done.returncode == 0, done.stderr
    others = [f"[{rank}] hello from {rank} of 4" for rank in (1, 2, 3)]
    assert sorted(done.stdout.decode().splitlines()) == sorted(["hello from 0 of 4", *others])
    assert done.stderr == ""


def test_rank_0_is_shown_byte_for_byte(jobs):
    said = b"a\rb\x08\x1b[1mc\xff\xfe \xe2\x94\x81\r\n no end"
    done = jobs.run(f"if rank == 0: os.write(1, {said!r})")
    assert done.stdout == said
    assert done.returncode == 0


def test_rank_0_is_shown_at_once_though_its_line_has_not_ended(jobs):
    process = jobs.start("if rank == 0:\n    os.write(1, b'\\r1/9'); time.sleep(600)")
    assert process.stdout.read(4) == b"\r1/9"
    process.send_signal(signal.SIGINT)
    process.communicate()


ODD = [
    "",
    "two words",
    "it's",
    '"q"',
    "$(touch oops)",
    "`x`",
    "a\nb",
    "back\\slash",
    "*",
    "-np",
    "--",
    ":",
    "é━",
]


def test_arguments_arrive_untouched(jobs):
    done = jobs.run("if rank == size - 1: Path('argv').write_text(repr(sys.argv))", *ODD)
    assert done.returncode == 0, done.stderr
    assert (jobs.folder / "argv").read_text() == repr(["the script.py", *ODD])


def test_the_script_is_main_as_under_python_itself(jobs):
    (jobs.folder / "neighbour.py").write_text("answer = 42")
    script = """
import json, pickle, neighbour
class Thing: pass
if rank == 0:
    copy = pickle.loads(pickle.dumps(Thing()))
    print(json.dumps([__name__, __file__, sys.path[0], neighbour.answer, type(copy) is Thing]))
"""
    said = json.loads(jobs.run(script).stdout)
    assert said == ["__main__", str(jobs.folder / "the script.py"), str(jobs.folder), 42, True]


def test_two_megabytes_from_each_of_four_ranks_are_complete_and_in_order(jobs):
    done = jobs.run("for n in range(20000): print(rank, n, 'x' * 95)", np=4)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    for rank in range(4):
        prefix = f"[{rank}] " if rank else ""
        mine = [line for line in lines if line.startswith(f"{prefix}{rank} ")]
        assert mine == [f"{prefix}{rank} {n} {'x' * 95}" for n in range(20000)]


def test_a_very_long_line_stays_one(jobs):
    done = jobs.run("if rank == 1: print('ü' * 700_000)")
    assert done.stdout.decode() == "[1] " + "ü" * 700_000 + "\n"


def test_what_native_code_prints_is_shown_too(jobs):
    script = "import ctypes; c = ctypes.CDLL(None); c.printf(b'from C\\n'); c.fflush(None)"
    done = jobs.run(script)
    assert sorted(done.stdout.splitlines()) == [b"[1] from C", b"from C"]


def test_both_streams_keep_apart(jobs):
    done = jobs.run("print('out'); print('err', file=sys.stderr)")
    assert sorted(done.stdout.splitlines()) == [b"[1] out", b"out"]
    assert sorted(done.stderr.splitlines()) == ["[1] err", "err"]


def test_start_up_noise_shows_only_when_asked_for(jobs):
    noise = "I0000 00:00:1795418133.663602    4756 port.cc:153] oneDNN custom operations are on."
    script = f"os.write(2, {noise.encode()!r} + b'\\nmine\\n'); print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))"
    quiet = jobs.run(script, np=1, TF_CPP_MIN_LOG_LEVEL="2")
    assert quiet.stderr == "mine\n"
    loud = jobs.run(script, np=1, options=["-v"])
    assert noise in loud.stderr


def test_the_job_needs_no_activated_environment(jobs):
    assert jobs.run("print(rank)", PATH="/usr/bin:/bin").returncode == 0


def test_a_rank_may_end_long_before_the_others(jobs):
    script = "import time; time.sleep(0 if os.environ['OMPI_COMM_WORLD_RANK'] == '1' else 3); print('late')"
    done = jobs.run(script, opening="import os\n")
    assert done.returncode == 0, done.stderr
    assert b"[1] late" in done.stdout


def test_ranks_are_bound_to_their_share_where_there_is_one_for_each(jobs):
    script = "Path(f'{rank}.cpus').write_text(repr(sorted(os.sched_getaffinity(0))))"
    here = sorted(os.sched_getaffinity(0))

    def cpus(np, bind):
        assert jobs.run(script, np=np, options=["--bind", bind]).returncode == 0
        return [json.loads((jobs.folder / f"{rank}.cpus").read_text()) for rank in range(np)]

    assert cpus(2, "none") == [here, here]
    assert cpus(len(here) + 1, "auto") == [here] * (len(here) + 1)
    if len(here) < 2:
        pytest.skip("one core cannot be shared out")
    first, second = cpus(2, "auto")
    assert first and second and not set(first) & set(second)
    assert cpus(1, "auto") == [here]


def test_mpi_yields_where_ranks_have_less_than_two_cores(jobs):
    script = "print(os.environ.get('OMPI_MCA_mpi_yield_when_idle'))"
    many = len(os.sched_getaffinity(0))
    assert jobs.run(script, np=many).stdout.splitlines()[0].endswith(b"1")
    assert jobs.run(script, np=many, OMPI_MCA_mpi_yield_when_idle="0").stdout.splitlines()[0].endswith(b"0")


def test_a_signal_for_the_user_reaches_every_rank(jobs):
    script = f"""
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
{jobs.leave_pids}
while not heard: time.sleep(0.01)
time.sleep(0.5)
print('heard', len(heard))
"""
    process = jobs.start(script)
    jobs.pids(2)
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert sorted(stdout.splitlines()) == [b"[1] heard 1", b"heard 1"]


def test_a_job_can_be_started_from_inside_a_rank_of_another(jobs):
    (jobs.folder / "inner.py").write_text("from mpi4py import MPI; print('inner', MPI.COMM_WORLD.size)")
    outer = """
import subprocess, sys
from hvdtrain.launch.run import RunOptions
if os.environ['OMPI_COMM_WORLD_RANK'] == '0':
    code = 'from hvdtrain.launch.run import *; import sys; sys.exit(run(RunOptions(2, "inner.py")))'
    subprocess.run([sys.executable, '-c', code], check=True)
"""
    done = jobs.run(outer, np=3, opening="import os\n")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [b"[1] inner 2", b"inner 2"]


def test_a_script_may_import_mpi4py_before_tensorflow(jobs):
    done = jobs.run("import tensorflow; print('done')")
    assert done.returncode == 0, done.stderr


OVERLAPPING = """
import keras, numpy as np, threading, zlib
import hvdtrain.keras as hvd
hvd.init()
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.layers.Input((700,)), *(keras.layers.Dense(700) for _ in range(4))])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
data = np.random.default_rng(rank).standard_normal((32, 700)).astype("float32")
model.fit(data, data, batch_size=8, epochs=2, verbose=0)
weights = b"".join(each.numpy().tobytes() for each in model.trainable_variables)
print(zlib.crc32(weights), any(each.name == "hvdtrain-background" for each in threading.enumerate()))
"""


def test_gradients_that_travel_beside_backprop_train_the_same_model(jobs):
    """Two numbers have one sum, so what goes in parts and what goes at once are equal to the bit."""
    crc = set()
    for overlap in ("on", "off"):
        done = jobs.run(OVERLAPPING, HVDTRAIN_ENGINE="mpi", HVDTRAIN_OVERLAP=overlap)
        assert done.returncode == 0, done.stderr
        numbers, beside = zip(*(line.split()[-2:] for line in done.stdout.decode().splitlines()), strict=True)
        crc |= set(numbers)
        assert set(beside) == {str(overlap == "on")}
    assert len(crc) == 1


def test_an_unknown_way_of_overlapping_is_refused_on_every_rank(jobs):
    done = jobs.run(OVERLAPPING, HVDTRAIN_ENGINE="mpi", HVDTRAIN_OVERLAP="maybe")
    assert done.returncode != 0
    assert "HVDTRAIN_OVERLAP must be auto, on or off" in done.stderr and "'maybe' on rank 1" in done.stderr


BUILT = pytest.mark.skipif(not importlib.util.find_spec("horovod"), reason="Horovod is not built")


@BUILT
@pytest.mark.parametrize(
    "told, threshold",
    [({}, 8 << 20), ({"HOROVOD_FUSION_THRESHOLD": "1024"}, 1024), ({"HOROVOD_AUTOTUNE": "1"}, None)],
)
def test_horovod_copies_no_large_gradients_together_unless_told_to(jobs, told, threshold):
    script = """
import hvdtrain.tensorflow as hvd
hvd.init()
print(os.environ.get("HOROVOD_FUSION_THRESHOLD"))
"""
    done = jobs.run(script, HVDTRAIN_ENGINE="horovod", **told)
    assert sorted(done.stdout.decode().split()) == sorted(["[1]", *[str(threshold)] * 2]), done.stderr


@BUILT
def test_horovods_own_tuning_is_reached(jobs):
    script = """
import numpy as np, hvdtrain.tensorflow as hvd
hvd.init()
for step in range(40): hvd.allreduce(np.ones(10, "float32"), name="x")
"""
    told = {"HOROVOD_AUTOTUNE": "1", "HOROVOD_AUTOTUNE_LOG": str(jobs.folder / "tuning.csv")}
    told |= {"HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1", "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2"}
    done = jobs.run(script, HVDTRAIN_ENGINE="horovod", **told)
    assert done.returncode == 0, done.stderr
    lines = (jobs.folder / "tuning.csv").read_text().splitlines()
    assert "cycle_time_ms" in lines[0] and len(lines) > 2


def test_a_tape_that_was_forgotten_ends_the_job_with_the_names_of_its_variables(jobs):
    script = """
import keras, numpy as np, tensorflow as tf
import hvdtrain.tensorflow as hvd

hvd.init()
keras.utils.set_random_seed(0)
first, second = (keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name=name)]) for name in "ab")
for model, tape_of in ((first, hvd.DistributedGradientTape), (second, lambda tape: tape)):
    optimizer, x = keras.optimizers.SGD(0.1), np.full((4, 2), hvd.rank() + 1.0, "float32")
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        gradients = tape_of(tape).gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
print("rank", hvd.rank(), "is done", flush=True)
"""
    done = jobs.run(script, opening="", HVDTRAIN_ENGINE="mpi")
    assert done.returncode == 1 and done.stdout.count(b"is done") == 2
    last = done.stderr.splitlines()[-1]
    assert (
        "ended the job: The ranks hold different values of trained variables at the end of the script" in last
    )
    assert "b/kernel on rank 1" in last and "a/kernel" not in last and "Python was shutting down" not in last
