"""The templates as a user submits them, to a real Slurm, with real training on real hosts."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
DIGITS = str(ROOT / "keras_examples" / "digits_cnn.py")
MIB = 1 << 20

WAYS = [
    # engine, launcher, hosts, ranks a host
    ("mpi", "srun", 2, 1),
    ("horovod", "srun", 4, 1),
    ("mpi", "mpirun", 4, 1),
    ("horovod", "mpirun", 2, 2),
]


@pytest.mark.parametrize(("engine", "launcher", "hosts", "each"), WAYS)
def test_training_on_several_hosts(cluster, workplace, engine, launcher, hosts, each):
    if engine == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not built here")
    before = cluster.sent("node1")
    job = cluster.submit(
        ROOT / "slurm/cpu.sbatch",
        DIGITS,
        "--epochs",
        "2",
        options=[f"--nodes={hosts}", f"--ntasks-per-node={each}", f"--cpus-per-task={2 // each}"],
        HVDTRAIN_ENGINE=engine,
        HVDTRAIN_LAUNCHER=launcher,
    )
    assert job.ended() == "COMPLETED", job.output
    assert f"engine {engine} | {hosts * each} ranks" in job.output
    assert f"{hosts * each} ranks on {hosts} hosts x {each}" in job.output
    assert "weights identical on all ranks" in job.output
    done = json.loads((workplace / f"hvdtrain-{job.number}.done").read_text())
    assert done["ranks"] == hosts * each and done["hosts"] == cluster.hosts[:hosts]
    # 153 KB of gradients a step, and 2 epochs have 44 to 46 steps.
    assert cluster.sent("node1") - before > 4 * MIB


def test_words_reach_the_script_untouched_and_data_is_staged_on_each_node(cluster, workplace):
    (workplace / "data").mkdir()
    (workplace / "data" / "numbers.txt").write_text("1 2 3")
    (workplace / "show.py").write_text(
        "import json, os, socket, sys, pathlib\n"
        "data = pathlib.Path(os.environ['HVDTRAIN_DATA'])\n"
        "seen = [socket.gethostname(), sys.argv[1:], str(data), (data / 'numbers.txt').read_text()]\n"
        "print('SEEN', json.dumps(seen))\n"
    )
    words = ["two words", "$(touch executed)", "a'b\"c", "new\nline", "*", ""]
    job = cluster.submit(
        ROOT / "slurm/cpu.sbatch", "show.py", *words, options=["--nodes=2"], HVDTRAIN_STAGE="data"
    )
    assert job.ended() == "COMPLETED", job.output
    seen = [json.loads(line.partition("SEEN ")[2]) for line in job.output.splitlines() if "SEEN" in line]
    assert sorted(seen)[0] == ["node1", words, f"/tmp/hvdtrain-{job.number}/data", "1 2 3"]
    assert [each[0] for each in sorted(seen)] == ["node1", "node2"]
    assert not (workplace / "executed").exists()
    for name in ("node1", "node2"):
        assert "No such file" in cluster.on(name, "ls", f"/tmp/hvdtrain-{job.number}")


def test_a_rank_that_fails_ends_the_job_with_its_traceback(cluster, workplace):
    (workplace / "fails.py").write_text(
        "import hvdtrain.keras as hvd\n"
        "hvd.init()\n"
        "if hvd.rank() == 1:\n"
        "    raise RuntimeError('the disk is on fire')\n"
        "hvd.allreduce([1.0])\n"
    )
    job = cluster.submit(ROOT / "slurm/cpu.sbatch", "fails.py", options=["--nodes=2"])
    assert job.ended() == "FAILED"
    assert job.facts()["ExitCode"] == "1:0"
    assert "rank 1 of 2 (host node2) failed; its traceback" in job.output
    assert job.output.rstrip().endswith("RuntimeError: the disk is on fire")
    assert not list(workplace.glob("*.done"))


def test_a_script_that_is_not_there(cluster, workplace):
    job = cluster.submit(ROOT / "slurm/cpu.sbatch", "gone.py")
    assert job.ended() == "FAILED"
    assert "The script gone.py is not there" in job.output


def test_smoke(cluster, workplace):
    job = cluster.submit(ROOT / "slurm/smoke.sbatch", options=["--nodes=4"])
    assert job.ended() == "COMPLETED", job.output
    assert "smoke test passed: 4 ranks on 4 hosts (node1, node2, node3, node4)" in job.output


def test_a_sweep_runs_each_trial_with_its_words(cluster, workplace):
    (workplace / "trials.txt").write_text(
        "# rate and name\n--rate 0.1 --name 'first one'\n\n--rate $(false)\n"
    )
    (workplace / "trial.py").write_text(
        "import json, os, sys\nprint('SEEN', json.dumps([os.environ['HVDTRAIN_TRIAL'], sys.argv[1:]]))\n"
    )
    job = cluster.submit(
        ROOT / "slurm/array_sweep.sbatch",
        "trials.txt",
        "trial.py",
        "--epochs",
        "1",
        options=["--array=0-2", f"--output={workplace}/%a.log"],
    )
    numbers = [f"{job.number}_{index}" for index in range(3)]
    ended = [type(job)(cluster, number, workplace / f"{index}.log") for index, number in enumerate(numbers)]
    assert [each.ended() for each in ended] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert '["0", ["--epochs", "1", "--rate", "0.1", "--name", "first one"]]' in ended[0].output
    assert '["1", ["--epochs", "1", "--rate", "$(false)"]]' in ended[1].output
    assert "trials.txt has 2 trials, so there is no trial 2" in ended[2].output


def test_without_hvdtrain_on_the_node(cluster, workplace):
    (workplace / "site.sh").write_text("export PATH=/usr/bin:/bin\n")
    job = cluster.submit(ROOT / "slurm/cpu.sbatch", "x.py", HVDTRAIN_SITE=str(workplace / "site.sh"))
    assert job.ended() == "FAILED" and job.facts()["ExitCode"] == "127:0"
    assert "hvdtrain is not on PATH on node1" in job.output


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_sbatch_takes_the_template(cluster, workplace, template):
    options = ["--gres=none", "--cpus-per-task=2"] if template.name == "gpu.sbatch" else []
    told = subprocess.run(
        ["sbatch", "--test-only", *options, str(template), "x.py"],
        env=cluster.environ,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0 and "to start at" in told.stderr


def test_gpus_that_are_not_there(cluster, workplace):
    job = cluster.submit(ROOT / "slurm/gpu.sbatch", "x.py", options=["--gres=none", "--cpus-per-task=2"])
    assert job.ended() == "FAILED" and job.facts()["ExitCode"] == "2:0"
    assert "This job has no GPU on node1: add --gres=gpu:1" in job.output
