"""What Slurm knows of a job that was submitted, asked of its controller, which may be away for a while."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.doctor.program import run_program

SECONDS = 30

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
        number: As squeue writes it: 12, or 12_3 for a task, or 12_[3-8] for tasks that have not started.
        own: The number that it has besides as a task of an array.
        name: Its name.
        state: PENDING, RUNNING, COMPLETED …
        reason: Why it waits, in Slurm's word.
        restarts: How often it was requeued.
        code: Its exit code, or 128 plus the signal that ended it.
        runtime: How long it has run, as hours:minutes:seconds.
        nodes: Where.
        log: Its output; None where Slurm does not say.
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
        """Whether it is over, unless it is requeued."""
        return self.state in _ENDED

    @property
    def stems(self) -> tuple[str, str]:
        """How the templates call the files of this job, and of a sweep's trial."""
        return f"{self.name}-{self.own}", f"{self.name}-{self.number.replace('_', '-')}"


def show(number: str, environ: Mapping[str, str]) -> list[SlurmJob] | None:
    """Asks for a job, or for each task of an array.

    Returns:
        What is known; nothing once Slurm has forgotten it; None while the controller does not answer.
    """
    result = run_program(["scontrol", "show", "job", number], environ, SECONDS)
    if result.code == 0:
        return [_read(record) for record in re.split(r"\n(?=JobId=)", result.out) if "JobId=" in record]
    return [] if "Invalid job id" in result.err else None


def _read(record: str) -> SlurmJob:
    facts = dict(re.findall(r"(?<!\S)(\w+)=(\S*)", record))
    code, _, signal = facts.get("ExitCode", "0:0").partition(":")
    task = facts.get("ArrayTaskId")
    number = (
        facts["JobId"] if task is None else f"{facts['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
    )
    return SlurmJob(
        number=number,
        own=facts["JobId"],
        name=_line(r"\bJobName=(.*)$", record),
        state=_line(r"^\s+JobState=(\S+)", record),
        reason=_line(r"^\s+JobState=\S+ Reason=(\S+)", record),
        restarts=int(_line(r"\bRestarts=(\d+)", record) or 0),
        code=int(code) or (128 + int(signal) if signal not in ("", "0") else 0),
        runtime=_line(r"^\s+RunTime=(\S+)", record),
        nodes=_line(r"^\s+NodeList=(\S*)", record),
        log=Path(_line(r"^\s+StdOut=(.*)$", record) or "/dev/null"),
    )


def _line(pattern: str, record: str) -> str:
    match = re.search(pattern, record, re.MULTILINE)
    return match[1] if match else ""
