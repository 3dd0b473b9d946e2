"""Copy data to a local disk of each node before the ranks start, and remove it when they have ended."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run_program import ask


def data_variable(source: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return HVDTRAIN_DATA, the variable that tells the script where its data will be.

    Args:
        source: The folder or file to copy, visible on all nodes, or None.
        environ: The environment. Outside a Slurm allocation nothing is copied: the script reads `source` itself.

    Raises:
        LaunchError: If `source` does not exist.
    """
    if source is None:
        return {}
    if not Path(source).exists():
        raise LaunchError(f"--stage {source} is not there (looked for from {Path.cwd()}).")
    copied = slurm.in_allocation(environ)
    return {"HVDTRAIN_DATA": str(_target(source, environ) if copied else Path(source).absolute())}


@contextlib.contextmanager
def staged(source: str | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Copy `source` to every node of the Slurm allocation, and remove the copies at the end of the block.

    Raises:
        LaunchError: If a node cannot copy it.
    """
    if source is None or not slurm.in_allocation(environ):
        yield
        return
    target = _target(source, environ)
    folder, original, copy = (shlex.quote(str(path)) for path in (target.parent, source, target))
    try:
        _on_each_node(f"mkdir -p {folder} && cp -RL {original} {copy}", environ)
        yield
    finally:
        with contextlib.suppress(LaunchError):
            _on_each_node(f"rm -rf {folder}", environ, 60)


def _target(source: str, environ: Mapping[str, str]) -> Path:
    """Return the path of the copy, in a folder of this job on the local disk that the site provides for jobs."""
    disk = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    return Path(disk) / f"hvdtrain-{environ['SLURM_JOB_ID']}" / Path(source).resolve().name


def _on_each_node(command: str, environ: Mapping[str, str], seconds: float | None = None) -> None:
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", *slurm.overlap(environ)]
    done = ask([*step, "sh", "-c", command], environ, seconds)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise LaunchError(f"--stage: not every node could copy the data ({command}): {reason}")
