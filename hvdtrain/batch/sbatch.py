"""Test and submit a job with sbatch, and show its error messages with advice."""

import re
from collections.abc import Mapping

from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.program import Result, run_program
from hvdtrain.launch.hosts import LaunchError

SECONDS = 120  # the time limit of sbatch

_ASSOCIATIONS = "sacctmgr show assoc user=$USER format=account,partition,qos"

# Error messages of Slurm, and what to type.
_HINTS = {
    r"invalid partition": "sinfo",
    r"[Ii]nvalid account|InvalidAccount": f"--account=… with one of yours: {_ASSOCIATIONS}",
    r"[Ii]nvalid qos": f"--sbatch='--qos=…' with one of yours: {_ASSOCIATIONS}",
    r"node configuration is not available": "sinfo -N -l, for the resources of the nodes; see also --sbatch",
    r"[Tt]ime limit": "scontrol show partition, for MaxTime",
    r"generic resource|gres": "sinfo -o '%P %G', for the GPUs there are",
    r"group not permitted": "scontrol show partition, for AllowGroups",
    r"[Pp]olicy|[Ll]imit": f"{_ASSOCIATIONS},maxsubmit,maxjobs; squeue --me",
    r"contact slurm|[Cc]onnection refused|[Tt]imed out|configuration source": "scontrol ping",
    r"unrecognized option|ambiguous|doesn't allow an argument|requires an argument": "sbatch --help",
}


def examine_test(batch: Batch, environ: Mapping[str, str], waits: bool) -> Finding:
    """Ask sbatch whether it would accept a job.

    Args:
        batch: The job.
        environ: The environment variables of sbatch.
        waits: Whether nodes that the job needs are known to be down. `sbatch --test-only` then refuses a job that
            sbatch itself would accept.

    Returns:
        When and where the job would start, or the error message of sbatch.
    """
    result = run_program(batch.command("--test-only"), environ, SECONDS)
    message = _message(result)
    if result.code == 0:
        start = re.search(r"to start at (\S+) using .*? on nodes (\S+)", message)
        found = f"it would start at {start[1]} on {start[2]}" if start else "sbatch would accept the job"
        return ok("sbatch --test-only", found)
    if waits and "not available" in message:
        return note("sbatch --test-only", f"While these nodes are missing, sbatch prints: {message}")
    return wrong("sbatch --test-only", f"sbatch would refuse this job: {message}", hint(message))


def submit_batch(batch: Batch, environ: Mapping[str, str]) -> str:
    """Submit a job.

    Returns:
        The job ID.

    Raises:
        LaunchError: If sbatch refuses it; the text has the error message of sbatch.
    """
    result = run_program(batch.command("--parsable"), environ, SECONDS)
    number = re.search(r"^(\d+)(;\S*)?$", result.out, re.MULTILINE)
    if result.code is None:
        raise LaunchError(
            f"sbatch has not answered within {SECONDS} s. Check with `squeue --me` whether the job was submitted."
        )
    if result.code or not number:
        message = _message(result)
        raise LaunchError(f"sbatch refused the job: {message}\n  -> {hint(message)}")
    return number[1]


def hint(message: str) -> str:
    """Return what to type after an error message of Slurm."""
    for pattern, advice in _HINTS.items():
        if re.search(pattern, message):
            return advice
    return "sbatch --help, or send this message to the administrators of the cluster"


def _message(result: Result) -> str:
    """Join the lines that sbatch printed, without the prefix `sbatch: error:`."""
    if result.code is None:
        return f"nothing within {result.seconds:g} s"
    lines = [
        re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in (result.err or result.out).splitlines()
    ]
    return " ".join(dict.fromkeys(line for line in lines if line)) or f"nothing, with exit code {result.code}"
