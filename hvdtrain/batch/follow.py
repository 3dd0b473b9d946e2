"""After the submission: what to type next, and with --follow the job's own log until its end."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hvdtrain.batch.job_state import SlurmJob, show
from hvdtrain.batch.log_tail import Log, until
from hvdtrain.batch.templates import Template

ASKED = 3.0  # seconds between two questions to the controller, which has others to serve
LATE = 30.0  # seconds after which a file written on a node must be seen here, over the slowest file systems
SMOKE_PASSED = "smoke test passed"

# Why a job waits, where Slurm's word alone does not help.
_REASONS = {
    "Resources": "it waits for nodes that others use",
    "Priority": "others are before it",
    "BeginTime": "it waits for its time; after a requeue that is two minutes",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "it will never start; scancel it",
    "PartitionConfig": "it asks for more than the partition allows, and will not start; scancel it",
    "PartitionTimeLimit": "it asks for more time than the partition allows, and will not start; scancel it",
    "PartitionNodeLimit": "it asks for more nodes than the partition has in order; sinfo -R says why",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "nodes it needs are down or reserved; sinfo -R says why",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHeldAdmin": "it is held by those who run the cluster",
    "launch_failed_requeued_held": "its start failed and it is held: scontrol release it",
}

# What to do about an end that is not the script's own.
ENDS = {
    "TIMEOUT": "its time was up; --time asks for more, and --preemptible goes on after it from a checkpoint",
    "OUT_OF_MEMORY": "a node had not enough memory for it; --mem asks for more",
    "NODE_FAIL": "a node was lost; --preemptible goes on after that from a checkpoint",
    "PREEMPTED": "another job took its nodes; --preemptible goes on after that from a checkpoint",
    "CANCELLED": "somebody has typed scancel, or the cluster has",
}

# What stands in place of a task's number in the log of an array of which none has started.
NO_TASK = "4294967294"


def follow(number: str, template: Template, environ: Mapping[str, str], stay: bool) -> int:
    """Says where a job's log is and what to type next; stays until its end if asked to.

    Args:
        number: The job.
        template: What was submitted.
        environ: The environment in which Slurm is asked.
        stay: Whether to show the log until the job has ended.

    Returns:
        0 when the job has proved its success, or nobody waited for it; else its exit code, and 1 where that is 0
        without a proof; 130 after Ctrl-C, with which the job goes on.
    """
    logs = {_shown(job.log) for job in show(number, environ) or [] if job.log}
    for log in sorted(logs)[:1]:
        print(f"  its log:   tail -F {log}")
    print(f"  its state: squeue -j {number}\n  its end:   scancel {number}", flush=True)
    if not stay:
        return 0
    try:
        return Watch(number, template, environ).until_the_end()
    except KeyboardInterrupt:
        print(f"\nhvdtrain: job {number} goes on; scancel {number} ends it.", file=sys.stderr)
        return 130


class Watch:
    """Follows a job, through requeues, or all tasks of an array.

    Args:
        number: The job.
        template: What was submitted.
        environ: The environment in which Slurm is asked.
    """

    def __init__(self, number: str, template: Template, environ: Mapping[str, str]) -> None:
        self._number, self._template, self._environ = number, template, environ
        self._known: dict[str, SlurmJob] = {}
        self._told: dict[str, str] = {}
        self._codes: dict[str, int] = {}
        self._log: Log | None = None
        self._away = False

    def until_the_end(self) -> int:
        """Returns when every task has ended, with the first exit code that is not 0."""
        while not self._look():
            until(self._nothing_new, ASKED)
        return next(filter(None, self._codes.values()), 0)

    def _nothing_new(self) -> bool:
        if self._log:
            self._log.show()
        return False

    def _look(self) -> bool:
        """Asks Slurm once and says whether all is over."""
        jobs = show(self._number, self._environ)
        if jobs is None and not self._away:
            _say("Slurm's controller does not answer; that does not touch the job. Asking on.")
        self._away = jobs is None
        if jobs is None:
            return False
        if not jobs:
            return self._conclude_forgotten()
        self._open_log(jobs)
        for job in jobs:
            self._tell(job)
            # An end counts when it is seen twice, because a requeue passes through one.
            if job.ended and self._known.get(job.number) == job and job.number not in self._codes:
                self._codes[job.number] = self._conclude(job)
        self._known = {job.number: job for job in jobs}
        return all(number in self._codes for number in self._known)

    def _tell(self, job: SlurmJob) -> None:
        """Says what has changed."""
        why = (
            f" ({job.reason}{_because(job.reason)})"
            if job.state == "PENDING" and job.reason != "None"
            else ""
        )
        again = f", restart {job.restarts}" if job.restarts else ""
        where = f" on {job.nodes}" if job.state == "RUNNING" else ""
        words = f"job {job.number} is {job.state}{where}{why}{again}"
        if self._told.get(job.number) != words and not job.ended and job.state != "COMPLETING":
            self._told[job.number] = words
            _say(words)

    def _open_log(self, jobs: list[SlurmJob]) -> None:
        """Shows the log of one job; those of an array would run into each other."""
        if not self._log and len(jobs) == 1 and "_" not in jobs[0].number and jobs[0].log:
            self._log = Log(jobs[0].log)

    def _conclude_forgotten(self) -> bool:
        """Slurm forgets a job some minutes after its end; its proof stays."""
        for job in self._known.values():
            if job.number not in self._codes:
                self._codes[job.number] = self._conclude(replace(job, state="COMPLETED", runtime="some time"))
        return True

    def _conclude(self, job: SlurmJob) -> int:
        log = self._log or Log(job.log or Path(os.devnull))
        completed = job.state == "COMPLETED"
        proved = until(self._proof(job, log), LATE) if completed else False
        if self._log:
            self._log.finish()
        if proved:
            _say(f"job {job.number} has done its work on {job.nodes} in {job.runtime}.")
            return 0
        code = f", exit code {job.code}" if job.code else ""
        why = "nothing proves that every rank did its work" if completed else ENDS.get(job.state, "")
        ended = f"job {job.number} ended as {job.state} after {job.runtime}{code}{': ' if why else ''}{why}."
        _say(f"{ended} The last words of {job.log}:\n{log.last_words()}")
        return job.code or 1

    def _proof(self, job: SlurmJob, log: Log) -> Callable[[], bool]:
        """Finds what the job shows when it has succeeded: its done file, or the last line of the smoke test."""
        if self._template.proves:
            names = {f"{stem}.done" for stem in job.stems}
            # Listing the folder makes a network file system look again.
            return lambda: any(each.name in names and each.stat().st_size for each in Path.cwd().iterdir())
        if self._template.name == "smoke":
            return lambda: SMOKE_PASSED in log.last_words()
        return lambda: True


def _shown(log: Path) -> str:
    """Writes a log for a shell; of an array, all its logs."""
    return "*".join(shlex.quote(part) for part in str(log).split(NO_TASK))


def _because(reason: str) -> str:
    told = _REASONS.get(reason.split(",")[0])
    return f": {told}" if told else ""


def _say(sentence: str) -> None:
    print(f"hvdtrain: {sentence}", file=sys.stderr, flush=True)
