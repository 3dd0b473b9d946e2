"""A job that survives the night: what may happen to it on a real Slurm, and how it goes on or says why not."""

import re
import time
from pathlib import Path

import pytest
from cluster import until

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
TEMPLATE = SLURM / "preemptible.sbatch"


class Night:
    """Submits jobs of one node and two ranks, and follows them."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def submit(self, steps, name, *options, template=TEMPLATE, script="overnight.py", **variables):
        """Submits a training that is done only once it was stopped, and has gone on for so many steps."""
        words = [str(Path(__file__).with_name(script)), str(steps), str(self.folder / name)]
        asked = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", *options]
        return self.cluster.submit(template, *words, options=asked, **variables)

    def container(self):
        """Makes an image, and a stand-in for apptainer that runs its command as it is; no container is run."""
        (self.folder / "an image.sif").touch()
        program = self.folder / "bin" / "apptainer"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$*" >>\'{self.folder}/started\'\nshift 3\nexec "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}:{self.cluster.environ['PATH']}"
        image = str(self.folder / "an image.sif")
        return {"PATH": path, "HVDTRAIN_IMAGE": image, "HVDTRAIN_APPTAINER": "--nv"}

    def passes(self, name, step):
        """Waits until the training has left a step beyond this one, and gives it."""
        file = self.folder / name
        until(lambda: file.exists() and int(file.read_text()) > step, lambda: f"{name}: no step > {step}")
        return int(file.read_text())

    def checkpoint(self, name):
        """Waits until a real training has written one."""
        until(lambda: list((self.folder / name).glob("step-*")), lambda: f"{name}: no checkpoint")


def resumed(job):
    """The steps from which it has gone on, one for each start."""
    return [int(step) for step in re.findall(r"goes on from step (\d+)", job.output)]


@pytest.fixture
def night(cluster, workplace):
    return Night(cluster, workplace)


def test_signals_requeues_and_cancelling(cluster, night):
    limited = night.submit(20, "limited", "--time=1", "--signal=B:USR1@10")
    contained = night.container() | {"HVDTRAIN_MAX_REQUEUES": "0"}
    capped = night.submit(20, "capped", template=SLURM / "container.sbatch", **contained)
    cancelled = night.submit(20, "cancelled")
    trained = night.submit(30, "trained", script="trained.py")
    for job in (capped, cancelled):
        job.prints("goes on from step 0 with 2 ranks")
    cluster.ask("scancel", "--batch", "--signal=USR1", capped.number)
    cluster.ask("scancel", cancelled.number)
    requeued = night.submit(20, "requeued")

    assert capped.ended() == "FAILED" and capped.facts()["ExitCode"] == "75:0"
    assert "is not requeued (exit code 75): it was requeued 0 times already" in capped.output
    ranks = [line for line in (night.folder / "started").read_text().splitlines() if "rank_main" in line]
    assert len(ranks) == 2 and {line.partition(" -c ")[0] for line in ranks} == {
        f"exec --nv {night.folder}/an image.sif python3"
    }
    assert cancelled.ended() == "CANCELLED"
    assert "stopped at step" in cancelled.output, cancelled.output
    assert cancelled.output.rstrip().endswith("is not requeued (exit code 75): it was cancelled.")

    night.checkpoint("trained")
    cluster.ask("scancel", "--batch", "--signal=USR1", trained.number)
    requeued.prints("goes on from step 0 with 2 ranks")
    cluster.ask("scontrol", "requeue", requeued.number)

    assert requeued.ended() == "COMPLETED", requeued.output
    assert "is not requeued here (exit code 75): Slurm itself has done so." in requeued.output
    stopped = int(re.search(r"stopped at step (\d+)", requeued.output)[1])
    assert stopped > 0 and resumed(requeued) == [0, stopped]

    assert trained.ended() == "COMPLETED", trained.output
    assert "because SIGUSR1 asked it to" in trained.output and "resuming from" in trained.output
    assert "trained for 240 steps" in trained.output

    assert limited.ended() == "COMPLETED", limited.output
    assert "(exit code 75, no failure)" in limited.output
    assert "is requeued (requeue 1 of at most 20, exit code 75)" in limited.output
    assert "start 0, 1 min" in limited.output  # the ranks know the time limit without being told
    assert int(limited.facts()["Restarts"]) == len(resumed(limited)) - 1 > 0
    assert (night.folder / f"hvdtrain-{limited.number}.done").exists()
    assert cancelled.state == "CANCELLED" and not cluster.running("overnight.py")


def test_the_templates_that_requeue_decide_alike():
    both = [(SLURM / f"{name}.sbatch").read_text() for name in ("preemptible", "container")]
    first, second = (
        text.partition("# ---- identical in preemptible.sbatch and container.sbatch")[2] for text in both
    )
    assert first and first == second


def test_a_job_of_more_weight_takes_the_nodes(cluster, night):
    ways = ("srun", "mpirun")
    pushed = [night.submit(20, way, "--nodes=2", HVDTRAIN_LAUNCHER=way) for way in ways]
    for job in pushed:
        job.prints("goes on from step 0 with 4 ranks")
    urgent = night.folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    cluster.submit(urgent, options=["--partition=urgent", "--nodes=4"]).ended()
    for job in pushed:
        assert job.ended() == "COMPLETED", job.output
        assert "is requeued (requeue 1 of at most 20" in job.output, job.output
        assert len(resumed(job)) == 2 and resumed(job)[1] > 0, job.output
    assert "stopped at step" in pushed[0].output


def test_a_lost_node(cluster, night):
    """A job whose slurmd dies is started anew by Slurm; one that outlives its node goes on with what is left."""
    smaller = night.folder / "smaller.sh"
    smaller.write_text('#!/bin/sh\nhvdtrain run --max-restarts 2 --min-np 1 -np "$SLURM_NTASKS" "$@"\n')
    failing = night.submit(20, "failing", "--nodes=2")
    cutting = night.submit(20, "cutting", "--nodes=2", "--no-kill", template=smaller)
    failing.prints("goes on from step 0 with 4 ranks")
    before = night.passes("cutting", 0)
    dead, lost = failing.hosts[1], cutting.hosts[1]
    cluster.kill_slurmd(dead)
    cluster.cut(lost)
    time.sleep(3)  # how long the cable is out; nothing waits for it
    cluster.mend(lost)
    before = night.passes("cutting", before + 20)
    cluster.cut(lost)
    try:
        cutting.prints(f"no answer from {lost}")
        assert cutting.ended() == "COMPLETED", cutting.output
    finally:
        cluster.mend(lost)
        cluster.start_slurmd(dead)
    first, second = resumed(cutting)
    assert first == 0 and second >= before, cutting.output
    assert "with 2 ranks on" in cutting.output and "vanished" in cutting.output
    assert failing.ended() == "COMPLETED", failing.output
    assert "Slurm itself has done so" in failing.output and len(resumed(failing)) == 2
    cluster.back()
    assert not cluster.running("overnight.py")


def test_the_controller_is_away_when_the_training_stops(cluster, night):
    job = night.submit(20, "away")
    night.passes("away", 0)
    host, pid = job.hosts[0], re.search(r"; pid (\d+)", job.output)[1]
    cluster.kill_controller(knows=job)
    cluster.on(host, "kill", "-USR1", pid)
    job.prints("stopped at step")
    cluster.start_controller()
    assert job.ended() == "COMPLETED", job.output
    assert "is requeued (requeue 1 of at most 20" in job.output, job.output
    assert len(resumed(job)) == 2
