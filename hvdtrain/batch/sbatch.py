"""sbatch itself: asked whether it would take a job, then given it; its refusals are shown in its own words."""

import re
from collections.abc import Mapping, Sequence

from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.doctor.finding import Finding, note, ok, wrong
from hvdtrain.doctor.program import Result, run_program
from hvdtrain.launch.hosts import LaunchError

SECONDS = 120

_MINE = "sacctmgr show assoc user=$USER format=account,partition,qos"

# What Slurm says, and what to type then.
_HINTS = {
    r"invalid partition": "sinfo",
    r"[Ii]nvalid account|InvalidAccount": f"--account=… with one of yours: {_MINE}",
    r"[Ii]nvalid qos": f"--sbatch='--qos=…' with one of yours: {_MINE}",
    r"node configuration is not available": "sinfo -N -l, for what the nodes have; --sbatch may ask for more",
    r"[Tt]ime limit": "scontrol show partition, for MaxTime",
    r"generic resource|gres": "sinfo -o '%P %G', for the GPUs there are",
    r"group not permitted": "scontrol show partition, for AllowGroups",
    r"[Pp]olicy|[Ll]imit": f"{_MINE},maxsubmit,maxjobs; squeue --me",
    r"contact slurm|[Cc]onnection refused|[Tt]imed out|configuration source": "scontrol ping",
    r"unrecognized option|ambiguous|doesn't allow an argument|requires an argument": "sbatch --help",
}


def examine_test(batch: Batch, environ: Mapping[str, str], waits: bool) -> Finding:
    """Asks sbatch whether it would take a job.

    Args:
        batch: The job.
        environ: The environment of sbatch.
        waits: Whether nodes that the job needs are known to be out of order: sbatch then objects to what it
            would take all the same.

    Returns:
        When and where the job would start, or sbatch's objection.
    """
    result = run_program(batch.command("--test-only"), environ, SECONDS)
    said = _said(result)
    if result.code == 0:
        planned = re.search(r"to start at (\S+) using .*? on nodes (\S+)", said)
        when = f"it would start at {planned[1]} on {planned[2]}" if planned else "it would take the job"
        return ok("sbatch --test-only", when)
    if waits and "not available" in said:
        return note("sbatch --test-only", f"sbatch says, as long as these nodes are missing: {said}")
    return wrong("sbatch --test-only", f"sbatch would refuse this job: {said}", hint(said))


def submit_batch(batch: Batch, environ: Mapping[str, str]) -> str:
    """Submits a job.

    Returns:
        Its number.

    Raises:
        LaunchError: If sbatch refuses it, in sbatch's words.
    """
    result = run_program(batch.command("--parsable"), environ, SECONDS)
    number = re.search(r"^(\d+)(;\S*)?$", result.out, re.MULTILINE)
    if result.code is None:
        raise LaunchError(
            f"sbatch has not answered within {SECONDS} s; whether the job is there, `squeue --me` says."
        )
    if result.code or not number:
        said = _said(result)
        raise LaunchError(f"sbatch refused the job: {said}\n  -> {hint(said)}")
    return number[1]


def hint(said: str) -> str:
    """Gives what to type where Slurm has said something."""
    found: Sequence[str] = [told for words, told in _HINTS.items() if re.search(words, said)]
    return found[0] if found else "sbatch --help, or ask those who run the cluster, with these words"


def _said(result: Result) -> str:
    """Joins Slurm's lines, without the tags that repeat who speaks."""
    if result.code is None:
        return f"nothing within {result.seconds:g} s"
    lines = [
        re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in (result.err or result.out).splitlines()
    ]
    return " ".join(dict.fromkeys(line for line in lines if line)) or f"nothing, with exit code {result.code}"
