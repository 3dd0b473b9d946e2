"""Jobs that come to a bad end: the rank that failed first has the last word, and nothing is left behind."""

import os
import signal
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.launchers import mpirun

ENDINGS = {
    "raise ValueError('naïve trouble')": (1, "ValueError: naïve trouble\n"),
    "sys.exit(3)": (3, "ended the job: it called sys.exit(3).\n"),
    "sys.exit(256)": (1, "ended the job: it called sys.exit(256).\n"),
    "sys.exit('no data')": (1, "it called sys.exit() with the message: no data\n"),
    "os._exit(5)": (5, "without a Python exception (os._exit, or exit() in a library).\n"),
    "os._exit(0)": (1, "nothing proves that it did its work.\n"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "a smaller batch or fewer ranks on a host need less.\n"),
    "os.kill(os.getpid(), signal.SIGTERM)": (143, "Another process has asked it to end.\n"),
    "os.kill(os.getpid(), signal.SIGSEGV)": (139, ' in work\n  File "the script.py", line 18 in <module>\n'),
}


@pytest.mark.smoke
@pytest.mark.parametrize("ending", ENDINGS)
def test_one_rank_fails_while_others_wait_for_it(jobs, ending):
    script = f"""{jobs.leave_pids}
world.barrier()
def work():
    {ending}

if rank == 1:
    work()
world.barrier()
"""
    code, words = ENDINGS[ending]
    done = jobs.run(script, np=3)
    assert done.returncode == code
    assert done.stderr.endswith(words), done.stderr
    assert "hvdtrain: rank 1 of 3 (host " in done.stderr
    assert "MPI_ABORT" not in done.stderr
    jobs.assert_gone(jobs.pids(3))


@pytest.mark.parametrize("launcher", ["hvdtrain run", "mpirun"])
def test_a_rank_that_has_only_heard_of_a_failure_leaves_the_last_word_to_the_one_that_failed(jobs, launcher):
    script = """
from hvdtrain import runtime
from hvdtrain.collectives.errors import MismatchError, report

engine = runtime.init()
try:
    if rank == 1:
        raise KeyError("of rank 1")
    engine.barrier()
except KeyError as error:
    report(engine, "the script", error)
    while not all(Path(f"heard by {other}").exists() for other in (0, 2)):
        time.sleep(0.01)
    raise
except MismatchError:
    Path(f"heard by {rank}").touch()
    raise
"""
    found = mpirun.find()
    plainly = [*found.command(3, (), ()), sys.executable, "the script.py"] if launcher == "mpirun" else []
    done = jobs.run(script, np=3, command=plainly, HVDTRAIN_ENGINE="mpi", **found.settings(os.environ))
    assert done.returncode == 1
    assert "KeyError: 'of rank 1'" in done.stderr, done.stderr
    if launcher == "hvdtrain run":
        assert done.stderr.endswith("KeyError: 'of rank 1'\n"), done.stderr
        assert "hvdtrain: rank 1 of 3" in done.stderr and "MismatchError" not in done.stderr


REPORTING = """
import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.data.collective_errors import together
from hvdtrain.wrap.rank_zero import on_rank_zero

hvd.init()
engine = runtime.engine()
agree = engine.agree

def noted(call, *more):
    if call.farewell:  # it waits to be ended by rank 0
        Path("waits").touch()
    return agree(call, *more)

def fail():
    raise OSError("no route to host")

def first_overall():
    with hvd.first_overall():
        fail()

def in_all():
    together(engine, "reading", fail if rank == 0 else int)

def broadcast():
    on_rank_zero(engine, fail)

def while_handled():
    try:
        in_all()
    except RuntimeError:
        raise ValueError("without data")

try:
    engine.agree = agree if rank == 0 else noted
    KIND()
except OSError:
    while rank == 0 and not Path("waits").exists():
        time.sleep(0.01)
    raise
"""


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
@pytest.mark.parametrize(
    "kind, launcher",
    [
        ("first_overall", "hvdtrain run"),
        ("first_overall", "mpirun"),
        ("in_all", "hvdtrain run"),
        ("broadcast", "mpirun"),
        ("while_handled", "hvdtrain run"),
    ],
)
def test_an_error_that_the_ranks_share_is_shown_by_the_rank_that_met_it(jobs, engine, kind, launcher):
    if engine == "horovod":
        pytest.importorskip("horovod")
    found = mpirun.find()
    plainly = [*found.command(2, (), ()), sys.executable, "the script.py"] if launcher == "mpirun" else []
    settings = found.settings(os.environ)
    done = jobs.run(REPORTING.replace("KIND", kind), command=plainly, HVDTRAIN_ENGINE=engine, **settings)
    assert done.returncode == 1
    tracebacks = [
        line for line in done.stderr.splitlines() if line.startswith(("Traceback", "[1] Traceback"))
    ]
    assert "OSError: no route to host" in done.stderr and "ValueError: without data" not in done.stderr
    assert "RuntimeError" not in done.stderr and len(tracebacks) == 1, done.stderr


def test_a_rank_that_goes_on_after_its_error_does_not_keep_the_others(jobs):
    script = """
from hvdtrain import runtime
from hvdtrain.data import first_overall

engine = runtime.init()
try:
    with first_overall():
        raise OSError("no route to host")
except OSError:
    pass
engine.barrier()
"""
    done = jobs.run(script, HVDTRAIN_ENGINE="mpi")
    assert done.returncode == 1
    assert done.stderr.endswith("failed on rank 0: OSError: no route to host\n"), done.stderr


def test_who_has_only_heard_of_an_exit_leaves_it_the_code_and_the_last_word(jobs):
    script = """
from hvdtrain import runtime
from hvdtrain.collectives.engine import MismatchError
from hvdtrain.wrap.script_errors import in_step

engine = runtime.init()
try:
    with in_step():
        if rank == 1:
            sys.exit(3)
        engine.barrier()
except SystemExit:
    while not Path("heard").exists():
        time.sleep(0.01)
    raise
except MismatchError:
    Path("heard").touch()
    raise
"""
    done = jobs.run(script, HVDTRAIN_ENGINE="mpi")
    assert done.returncode == 3, done.stderr
    assert done.stderr.endswith("ended the job: it called sys.exit(3).\n"), done.stderr
    assert "hvdtrain: rank 1 of 2" in done.stderr and "MismatchError" not in done.stderr


@pytest.fixture
def little_memory():
    """Files of a control group of 200 MB: what is written its processes into, and its limit."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"hvdtrain-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(200 << 20))
        except OSError:
            continue
        yield group / "cgroup.procs"
        group.rmdir()
        return
    pytest.skip("a control group that limits memory needs root")


def test_out_of_memory(jobs, little_memory):
    script = f"""{jobs.leave_pids}
world.barrier()
if rank == 1:
    Path({str(little_memory)!r}).write_text(str(os.getpid()))
    everything = [b"x" * (1 << 20) for _ in range(4096)]
world.barrier()
"""
    done = jobs.run(script, np=3)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 3" in done.stderr and "when memory runs out" in done.stderr
    jobs.assert_gone(jobs.pids(3))


def test_the_traceback_is_the_users_alone(jobs):
    done = jobs.run("def deep(): raise KeyError('lost')\nif rank == 1: deep()\nworld.barrier()")
    assert done.stderr.count("Traceback") == 1
    assert 'the script.py", line' in done.stderr
    assert "rank_main" not in done.stderr
    assert "importlib" not in done.stderr


@pytest.mark.parametrize("script", ["this is no Python", "import no_such_module", "raise SystemExit(7)"])
def test_a_script_that_fails_on_every_rank_before_mpi_is_up(jobs, script):
    done = jobs.run(script, np=4, opening="")
    assert done.returncode == (7 if "7" in script else 1)
    assert done.stderr.count("Traceback") <= 1
    assert "rank_main" not in done.stderr


def test_ranks_that_will_not_end_are_ended(jobs):
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{jobs.leave_pids}
world.barrier()
if rank == 0: raise RuntimeError('enough')
while True: time.sleep(1)
"""
    done = jobs.run(script)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: enough\n")
    jobs.assert_gone(jobs.pids(2))


def test_last_words_of_a_killed_rank_are_shown(jobs):
    script = "if rank == 1:\n    os.write(1, b'last words'); os.kill(os.getpid(), 9)\nworld.barrier()"
    done = jobs.run(script)
    assert done.stdout == b"[1] last words\n"


def test_a_crash_while_python_shuts_down_is_a_failure(jobs):
    done = jobs.run("import atexit\nif rank == 1: atexit.register(os._exit, 9)")
    assert done.returncode == 9
    assert "after its script had finished" in done.stderr


def test_what_mpi_says_when_no_rank_comes_to_life(jobs):
    done = jobs.run("", options=["--mpi-args", "--no-such-option"])
    assert done.returncode not in (0, 2)
    assert "none of the 2 ranks started" in done.stderr
    assert 'unknown option "--no-such-option"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("whom", [0, 1], ids=["rank", "guard"])
def test_a_process_killed_from_outside_ends_the_job(jobs, whom):
    process = jobs.start(f"{jobs.leave_pids}\nwhile True: time.sleep(1)")
    pids = jobs.pids(2)
    os.kill(pids[2 + whom], signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert b"hvdtrain: rank 1 of 2" in stderr
    jobs.assert_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launcher_ends_its_ranks(jobs, number):
    process = jobs.start(f"{jobs.leave_pids}\nwhile True: pass")
    pids = jobs.pids(2)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert not any(jobs.alive(pid) for pid in pids)


def test_a_launcher_that_is_killed_leaves_no_orphan(jobs):
    process = jobs.start(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{jobs.leave_pids}\nwhile True: pass"
    )
    pids = jobs.pids(2)
    process.kill()
    process.communicate()
    jobs.assert_gone(pids)


def test_a_launcher_whose_output_nobody_reads_ends_its_ranks(jobs):
    process = jobs.start(f"{jobs.leave_pids}\nwhile True: print('x' * 1000)")
    pids = jobs.pids(2)
    process.stdout.close()
    process.stderr.read()
    assert process.wait() != 0
    jobs.assert_gone(pids)


def test_without_a_launcher_that_answers_lines_and_failures_still_arrive(jobs):
    deaf = (
        "from hvdtrain.launch.supervision import protocol; from hvdtrain.cli import main\n"
        "protocol.Server.environ = property(lambda self: {'HVDTRAIN_RUN_ADDRESS': '127.0.0.1:9'}); main()"
    )
    launch = [sys.executable, "-c", deaf, "run"]
    good = jobs.run("print('hello')", launch=launch)
    assert good.returncode == 0, good.stderr
    assert sorted(good.stdout.splitlines()) == [b"[1] hello", b"hello"]
    bad = jobs.run("if rank == 1: raise ValueError('trouble')\nworld.barrier()", launch=launch)
    assert bad.returncode == 1
    assert bad.stderr.endswith("ValueError: trouble\n")


def test_by_hand_without_any_launcher_of_ours(jobs):
    found = mpirun.find()
    script = "print('hello'); world.barrier()\nif rank == 1: raise ValueError('trouble')\nworld.barrier()"
    command = [
        *found.command(2, (), ()),
        sys.executable,
        "-m",
        "hvdtrain.launch.supervision.rank_main",
        "the script.py",
    ]
    done = jobs.run(script, command=command, **found.settings(os.environ))
    assert done.returncode == 1
    assert b"hello\n" in done.stdout
    assert b"[1] hello\n" in done.stdout
    assert "hvdtrain: rank 1 of 2 failed: \nTraceback" in done.stderr
    assert "ValueError: trouble" in done.stderr


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_a_rank_said_before_it_ended_is_shown(jobs, everywhere):
    """argparse writes its usage to standard error and exits with 2: without it nobody knows why."""
    script = "if rank == 1:\n  print('usage: what is wrong', file=sys.stderr)\n  sys.exit(2)\nworld.barrier()"
    done = jobs.run(script, opening="import sys; rank = 1\n" if everywhere else jobs.opening)
    assert done.returncode == 2
    assert "usage: what is wrong" in done.stderr, done.stderr
