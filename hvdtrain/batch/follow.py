"""Print what to type after a submission, and with --follow show the job's log until the job ends."""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvdtrain.batch.sbatch_options import Template
from hvdtrain.doctor.program import run_program

POLL_SECONDS = 3.0  # between two questions to the controller, which serves many users
LOG_SECONDS = 0.5  # between two looks at the log
FILE_SECONDS = 30.0  # after which a file written on a node is visible here, also on slow file systems
ANSWER_SECONDS = 30  # the time limit of a question to the controller
SMOKE_PASSED = "smoke test passed"

# Explanations of Slurm's keywords for why a job waits.
_REASONS = {
    "Resources": "it waits for nodes that other jobs use",
    "Priority": "other jobs are before it",
    "BeginTime": "it waits for its start time, which is two minutes after a requeue",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "it will never start; scancel it",
    "PartitionConfig": "it asks for more than the partition allows, and will not start; scancel it",
    "PartitionTimeLimit": "it asks for more time than the partition allows, and will not start; scancel it",
    "PartitionNodeLimit": "it asks for more nodes than are usable in the partition; sinfo -R shows the reason",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "nodes it needs are down or reserved; sinfo -R shows the reason",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHeldAdmin": "it is held by an administrator of the cluster",
    "launch_failed_requeued_held": "its start failed and it is held: scontrol release it",
}

# The final states, with explanations of some and what to type.
_ENDED = dict.fromkeys(("BOOT_FAIL", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "REVOKED"), "")
_ENDED |= {
    "TIMEOUT": "it reached its time limit; --time sets a longer one, and --preemptible continues from a checkpoint",
    "OUT_OF_MEMORY": "a node did not have enough memory for it; --mem asks for more",
    "NODE_FAIL": "a node failed; --preemptible continues from a checkpoint after that",
    "PREEMPTED": "another job took its nodes; --preemptible continues from a checkpoint after that",
    "CANCELLED": "it was cancelled by scancel, or by the cluster",
}

# Slurm's placeholder for the task number in the log of an array of which no task has started.
NO_TASK = "4294967294"


def follow(number: str, template: Template, environ: Mapping[str, str], stay: bool) -> int:
    """Print where a job's log is and what to type next, and wait until the job ends if `stay` is true.

    Returns:
        0 if the job succeeded, or if `stay` is false; else the exit code of the job, or 1 if that is 0 although no
        done file shows success; 130 after Ctrl-C, which leaves the job running.
    """
    logs = set()
    for job in read_jobs(number, environ) or []:
        # Quoted for a shell; for an array, a pattern that matches all its logs, which comes before any of them.
        logs.add("*".join(shlex.quote(part) for part in str(job.log).split(NO_TASK)))
    if logs:
        print(f"  its log:   tail -F {min(logs)}")
    print(f"  its state: squeue -j {number}\n  its end:   scancel {number}", flush=True)
    if not stay:
        return 0
    try:
        return JobFollower(number, template, environ).run()
    except KeyboardInterrupt:
        print(f"\nhvdtrain: job {number} continues; scancel {number} ends it.", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class SlurmJob:
    """One job, or one task of an array, as `scontrol show job` describes it."""

    number: str  # as squeue prints it: 12, or 12_3 for a task, or 12_[3-8] for tasks that have not started
    own: str  # the job ID without the array notation; each task of an array has its own
    name: str
    state: str  # PENDING, RUNNING, COMPLETED …
    reason: str  # Slurm's keyword for why the job waits
    restarts: int
    code: int  # the exit code, or 128 plus the signal that ended it
    runtime: str  # as hours:minutes:seconds
    nodes: str
    log: Path

    @property
    def ended(self) -> bool:
        """Whether it has ended; it may still be requeued."""
        return self.state in _ENDED


def read_jobs(number: str, environ: Mapping[str, str]) -> list[SlurmJob] | None:
    """Ask Slurm for the state of a job, or of each task of an array.

    Returns:
        The job, or the tasks; empty if Slurm no longer knows the job; None if the controller does not answer.
    """
    result = run_program(["scontrol", "show", "job", number], environ, ANSWER_SECONDS)
    if result.code == 0:
        return [_read_job(record) for record in re.split(r"\n(?=JobId=)", result.out) if "JobId=" in record]
    return [] if "Invalid job id" in result.err else None


def _read_job(record: str) -> SlurmJob:
    def field(pattern: str) -> str:
        match = re.search(pattern, record, re.MULTILINE)
        return match[1] if match else ""

    own = number = field(r"^JobId=(\S+)")
    array, task = field(r"\sArrayJobId=(\S+)"), field(r"\sArrayTaskId=(\S+)")
    if task:
        number = f"{array}_{task if task.isdigit() else f'[{task}]'}"
    code, signal = int(field(r"\bExitCode=(\d+)") or 0), int(field(r"\bExitCode=\d+:(\d+)") or 0)
    return SlurmJob(
        number=number,
        own=own,
        name=field(r"\bJobName=(.*)$"),
        state=field(r"^\s+JobState=(\S+)"),
        reason=field(r"^\s+JobState=\S+ Reason=(\S+)"),
        restarts=int(field(r"\bRestarts=(\d+)") or 0),
        code=code or (128 + signal if signal else 0),
        runtime=field(r"^\s+RunTime=(\S+)"),
        nodes=field(r"^\s+NodeList=(\S*)"),
        log=Path(field(r"^\s+StdOut=(.*)$") or os.devnull),
    )


class Log:
    """A file that grows on another host, copied to standard output byte for byte."""

    def __init__(self, path: Path) -> None:
        self.path, self._position = path, 0

    def show(self) -> bool:
        """Print what was added since the last call, and return whether anything was."""
        try:
            with self.path.open("rb") as file:
                # A job with --open-mode=truncate starts its log again when it is requeued.
                self._position = self._position if file.seek(0, os.SEEK_END) >= self._position else 0
                file.seek(self._position)
                added = file.read()
        except OSError:
            return False
        self._position += len(added)
        sys.stdout.buffer.write(added)
        sys.stdout.buffer.flush()
        return bool(added)

    def finish(self) -> None:
        """Print the rest, until nothing was added for a moment."""
        while not _wait_until(lambda: not self.show(), LOG_SECONDS):
            continue
        time.sleep(LOG_SECONDS)
        self.show()

    def last_lines(self, count: int = 5) -> str:
        """Return its last lines that are not empty."""
        try:
            text = self.path.read_bytes()[-20_000:].decode(errors="replace")
        except OSError as error:
            return f"    (none: {error.strerror})"
        return "\n".join([f"    {line}" for line in text.splitlines() if line.strip()][-count:])


class JobFollower:
    """Follow a job, through requeues, or all tasks of an array."""

    def __init__(self, number: str, template: Template, environ: Mapping[str, str]) -> None:
        self._number, self._template, self._environ = number, template, environ
        self._known: dict[str, SlurmJob] = {}  # by job ID, as Slurm last described them
        self._reported: dict[str, str] = {}  # by job ID, the last message about the state
        self._codes: dict[str, int] = {}  # by job ID, the exit codes of those that have ended
        self._log: Log | None = None
        self._unanswered = False

    def run(self) -> int:
        """Wait until every task has ended, and return the first exit code that is not 0, else 0."""
        while not self._poll():
            _wait_until(self._show_log, POLL_SECONDS)
        return next(filter(None, self._codes.values()), 0)

    def _show_log(self) -> bool:
        if self._log:
            self._log.show()
        return False

    def _poll(self) -> bool:
        """Ask Slurm once, and return whether all tasks have ended."""
        jobs = read_jobs(self._number, self._environ)
        if jobs is None and not self._unanswered:
            _print("Slurm's controller does not answer. The job is not affected; asking again.")
        self._unanswered = jobs is None
        if jobs is None:
            return False
        if not jobs:
            self._conclude_forgotten()
            return True
        # The logs of an array are not shown, because their lines would mix.
        if not self._log and len(jobs) == 1 and "_" not in jobs[0].number:
            self._log = Log(jobs[0].log)
        for job in jobs:
            self._report_state(job)
            # An end counts when it is seen twice, because a requeued job is in a final state for a moment.
            if job.ended and self._known.get(job.number) == job and job.number not in self._codes:
                self._codes[job.number] = self._conclude(job)
        self._known = {job.number: job for job in jobs}
        return all(number in self._codes for number in self._known)

    def _report_state(self, job: SlurmJob) -> None:
        """Print the state of a job if it has changed; its end is printed by `_conclude`."""
        message = f"job {job.number} is {job.state}"
        if job.state == "RUNNING":
            message += f" on {job.nodes}"
        if job.state == "PENDING" and job.reason != "None":
            explanation = _REASONS.get(job.reason.split(",")[0])
            message += f" ({job.reason}: {explanation})" if explanation else f" ({job.reason})"
        if job.restarts:
            message += f", restart {job.restarts}"
        if self._reported.get(job.number) != message and not job.ended and job.state != "COMPLETING":
            self._reported[job.number] = message
            _print(message)

    def _conclude_forgotten(self) -> None:
        """Conclude from the done file, because Slurm forgets a job some minutes after its end."""
        for job in self._known.values():
            if job.number not in self._codes:
                self._codes[job.number] = self._conclude(replace(job, state="COMPLETED", runtime="some time"))

    def _conclude(self, job: SlurmJob) -> int:
        log = self._log or Log(job.log)
        completed = job.state == "COMPLETED"
        succeeded = completed and _wait_until(lambda: self._succeeded(job, log), FILE_SECONDS)
        if self._log:
            self._log.finish()
        if succeeded:
            _print(f"job {job.number} has done its work on {job.nodes} in {job.runtime}.")
            return 0
        code = f", exit code {job.code}" if job.code else ""
        reason = "nothing proves that every rank did its work" if completed else _ENDED[job.state]
        ended = f"job {job.number} ended as {job.state} after {job.runtime}{code}"
        ended += f": {reason}." if reason else "."
        _print(f"{ended} The last lines of {job.log}:\n{log.last_lines()}")
        return job.code or 1

    def _succeeded(self, job: SlurmJob, log: Log) -> bool:
        """Return whether the job has left its sign of success: a done file, or the last line of the smoke test."""
        if not self._template.proves:
            return self._template.name != "smoke" or SMOKE_PASSED in log.last_lines()
        # The templates name the file by the job's own ID, or by those of the array and the task.
        names = {f"{job.name}-{job.own}.done", f"{job.name}-{job.number.replace('_', '-')}.done"}
        # Listing the folder makes a network file system refresh its cache.
        return any(path.name in names and path.stat().st_size for path in Path.cwd().iterdir())


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, for a limited time, and return whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(LOG_SECONDS)
    return True


def _print(message: str) -> None:
    print(f"hvdtrain: {message}", file=sys.stderr, flush=True)
