"""Read the state of a job from Slurm's controller, which may not answer for a while."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.doctor.program import run_program

SECONDS = 30  # the time limit of a question to the controller

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class SlurmJob:
    """One job, or one task of an array, as `scontrol show job` describes it.

    Args:
        number: The job ID as squeue prints it: 12, or 12_3 for a task, or 12_[3-8] for tasks that have not started.
        own: The job ID without the array notation; each task of an array has its own.
        name: The name of the job.
        state: The state: PENDING, RUNNING, COMPLETED …
        reason: Slurm's keyword for why the job waits.
        restarts: How often it was requeued.
        code: The exit code, or 128 plus the signal that ended it.
        runtime: How long it has run, as hours:minutes:seconds.
        nodes: The nodes on which it runs.
        log: The file of its output; None if Slurm does not print it.
    """

    number: str
    own: str
    name: str
    state: str
    reason: str
    restarts: int
    code: int
    runtime: str
    nodes: str
    log: Path | None

    @property
    def ended(self) -> bool:
        """Whether it has ended; it may still be requeued."""
        return self.state in _ENDED

    @property
    def stems(self) -> tuple[str, str]:
        """The names of this job's files in the templates: with its own job ID, and with that of its task."""
        return f"{self.name}-{self.own}", f"{self.name}-{self.number.replace('_', '-')}"


def read_jobs(number: str, environ: Mapping[str, str]) -> list[SlurmJob] | None:
    """Ask Slurm for the state of a job, or of each task of an array.

    Returns:
        The job, or the tasks; empty if Slurm no longer knows the job; None if the controller does not answer.
    """
    result = run_program(["scontrol", "show", "job", number], environ, SECONDS)
    if result.code == 0:
        return [_read(record) for record in re.split(r"\n(?=JobId=)", result.out) if "JobId=" in record]
    return [] if "Invalid job id" in result.err else None


def _read(record: str) -> SlurmJob:
    facts = dict(re.findall(r"(?<!\S)(\w+)=(\S*)", record))
    code, _, signal = facts.get("ExitCode", "0:0").partition(":")
    signal_code = 128 + int(signal) if signal not in ("", "0") else 0
    task = facts.get("ArrayTaskId")
    number = facts["JobId"]
    if task is not None:
        number = f"{facts['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
    return SlurmJob(
        number=number,
        own=facts["JobId"],
        name=_field(r"\bJobName=(.*)$", record),
        state=_field(r"^\s+JobState=(\S+)", record),
        reason=_field(r"^\s+JobState=\S+ Reason=(\S+)", record),
        restarts=int(_field(r"\bRestarts=(\d+)", record) or 0),
        code=int(code) or signal_code,
        runtime=_field(r"^\s+RunTime=(\S+)", record),
        nodes=_field(r"^\s+NodeList=(\S*)", record),
        log=Path(_field(r"^\s+StdOut=(.*)$", record) or "/dev/null"),
    )


def _field(pattern: str, record: str) -> str:
    match = re.search(pattern, record, re.MULTILINE)
    return match[1] if match else ""
