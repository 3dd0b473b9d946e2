"""`hvdtrain submit` to a real Slurm: words down to every rank, real limits, logs followed to the end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Job, until

ROOT = Path(__file__).parents[2]
SUBMIT = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "submit"]
WORDS = ["two words", "$(touch executed)", "`touch executed`", "a'b\"c", "new\nline"]
WORDS += ["", "*", "-x", "--nodes=9", "--", "ünï", "\\n", "; touch executed"]
SHOW = """
import json, os, socket, sys
print("SEEN", json.dumps([socket.gethostname(), sys.argv[1:], os.environ.get("GREETING")]))
"""


class LoginHost:
    """Somebody's shell on the login host."""

    def __init__(self, cluster, place: Path) -> None:
        self.cluster, self.place = cluster, place

    @property
    def environ(self) -> dict[str, str]:
        config = {"XDG_CONFIG_HOME": str(self.place / "config"), "PYTHONPATH": str(ROOT)}
        return {**self.cluster.environ, **config}

    def start(self, *words: str) -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([*SUBMIT, *words], cwd=self.place, env=self.environ, text=True, **streams)

    def submit(self, *words: str) -> subprocess.CompletedProcess:
        return self.ended(self.start(*words))

    def ended(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        try:
            out, err = process.communicate()
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def job(self, out: str) -> Job:
        """The job that was submitted, by what is printed of it."""
        number = out.partition("Submitted batch job ")[2].split()[0]
        name = "hvdtrain-sweep" if "sweep" in out else "hvdtrain"
        return Job(self.cluster, number, self.place / f"{name}-{number}.log")

    def follow(self, *words: str) -> tuple[subprocess.Popen, Job]:
        process = self.start("--follow", *words)
        return process, self.job(process.stdout.readline())


@pytest.fixture
def login(cluster, workplace):
    (workplace / "show.py").write_text(SHOW)
    (workplace / "turns.py").write_text(
        "import sys, time\n"
        "for turn in range(int(sys.argv[1])):\n"
        "    print('turn', turn)\n"
        "    time.sleep(0.5)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    return LoginHost(cluster, workplace)


def seen(text: str) -> list[list]:
    return sorted(json.loads(line.partition("SEEN ")[2]) for line in text.splitlines() if "SEEN" in line)


def test_words_reach_every_rank_on_two_hosts_and_so_they_do_pasted_from_a_dry_run(login, workplace):
    (workplace / "config" / "hvdtrain").mkdir(parents=True)
    profile = workplace / "config" / "hvdtrain" / "cluster.toml"
    profile.write_text(
        "partition = 'main'\nnetwork = 'eth0'\nsetup = [\"export GREETING='good $(date) morning'\"]\n"
    )
    expected = [["node1", WORDS, "good $(date) morning"], ["node2", WORDS, "good $(date) morning"]]

    done = login.submit("--follow", "--nodes=2", "show.py", *WORDS)
    assert done.returncode == 0, done.stderr
    assert seen(done.stdout) == expected
    number = login.job(done.stdout).number
    assert f"job {number} has done its work on node[1-2]" in done.stderr
    assert json.loads((workplace / f"hvdtrain-{number}.done").read_text())["ranks"] == 2

    dry = login.submit("--dry-run", "--nodes=2", "show.py", *WORDS)
    assert "it would start at" in dry.stdout and "4 of 4 nodes of main can run this" in dry.stdout
    pasted = subprocess.run(["bash", "-c", dry.stdout], env=login.environ, capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    job = Job(login.cluster, pasted.stdout.strip(), workplace / f"hvdtrain-{pasted.stdout.strip()}.log")
    assert job.ended() == "COMPLETED" and seen(job.output) == expected
    assert not list(workplace.rglob("executed"))


def test_an_end_without_success(login):
    done = login.submit("--follow", "--nodes=2", "turns.py", "1", "7")
    assert done.returncode == 7
    assert "ended as FAILED" in done.stderr and "exit code 7" in done.stderr
    assert done.stderr.rstrip().endswith("it called sys.exit(7).")
    process, job = login.follow("turns.py", "1000", "0")
    job.prints("turn 1")
    login.cluster.ask("scancel", job.number)
    done = login.ended(process)
    assert done.returncode not in (0, None) and f"job {job.number} ended as CANCELLED" in done.stderr


def test_a_requeued_job_is_followed_to_its_end(login):
    process, job = login.follow("turns.py", "8", "0")
    job.prints("turn 2")
    login.cluster.ask("scontrol", "requeue", job.number)
    done = login.ended(process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(job.output) and job.output.count("turn 0\n") == 2
    assert "restart 1" in done.stderr


def test_ctrl_c_leaves_the_job_running(login):
    process, job = login.follow("turns.py", "1000", "0")
    job.prints("turn 1")
    process.send_signal(signal.SIGINT)
    done = login.ended(process)
    assert done.returncode == 130 and f"job {job.number} continues" in done.stderr
    assert job.state == "RUNNING"
    login.cluster.ask("scancel", job.number)
    assert job.ended() == "CANCELLED"


def test_limits_of_the_real_partition(login):
    before = login.cluster.ask("squeue", "-h")
    login.cluster.ask("scontrol", "update", "PartitionName=main", "MaxTime=30", "MaxNodes=3")
    try:
        refused = {
            ("-N4", "-t10", "show.py"): "--nodes=4 is more than partition main gives to a job: 3",
            ("-t31", "show.py"): "--time=31 is more than the 00:30:00 that partition main allows",
            ("-t10", "-c3", "show.py"): "a node of partition main has 2 at most",
            ("-t10", "--mem=5G", "show.py"): "5120 MiB of memory a node are asked for",
            ("-t10", "-p", "mian", "show.py"): "There is no partition mian; there is main",
            ("-t10", "--gpus-per-node=1", "-c1", "show.py"): "1 GPU(s) a node are asked for",
            ("-t10", "--sbatch=--frob", "show.py"): "unrecognized option '--frob'",
            ("-t10", "--sbatch=-d nonsense", "show.py"): "sbatch would refuse this job",
        }
        for words, sentence in refused.items():
            done = login.submit(*words)
            assert done.returncode == 2 and sentence in done.stderr, (words, done.stderr)
    finally:
        login.cluster.ask(
            "scontrol", "update", "PartitionName=main", "MaxTime=INFINITE", "MaxNodes=UNLIMITED"
        )
    assert login.cluster.ask("squeue", "-h") == before


def test_a_job_that_waits_for_nodes_says_why(login):
    login.cluster.ask("scontrol", "update", "NodeName=node[2-4]", "State=DRAIN", "Reason=test")
    try:
        process, job = login.follow("--nodes=2", "show.py")
        until(lambda: job.facts()["Reason"] not in ("None", ""), lambda: str(job.facts()))
        assert job.state == "PENDING"
    finally:
        login.cluster.ask("scontrol", "update", "NodeName=node[2-4]", "State=RESUME")
    done = login.ended(process)
    assert done.returncode == 0, done.stderr
    assert "the job waits for node2 (drained), node3 (drained), node4 (drained)" in done.stderr
    assert f"job {job.number} is PENDING" in done.stderr


def test_a_sweep_is_followed_trial_by_trial(login, workplace):
    (workplace / "trials.txt").write_text("1 0\n1 5\n")
    done = login.submit("--follow", "--template=array_sweep", "trials.txt", "turns.py")
    number = login.job(done.stdout).number
    assert done.returncode == 5
    assert f"job {number}_0 has done its work" in done.stderr
    assert f"job {number}_1 ended as FAILED" in done.stderr and "sys.exit(5)" in done.stderr
