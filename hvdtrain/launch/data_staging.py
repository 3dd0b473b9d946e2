"""Data on a disk of each node's own: copied there once, before the ranks start, and removed after them."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run_program import ask


def told(source: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what tells the script where its data will be: HVDTRAIN_DATA.

    Args:
        source: The folder or file to copy, which all nodes see, or None.
        environ: The environment. Outside a Slurm allocation nothing is copied: the one node has the data.

    Raises:
        LaunchError: If it is not there.
    """
    if source is None:
        return {}
    if not Path(source).exists():
        raise LaunchError(f"--stage {source} is not there (looked from {Path.cwd()}).")
    copied = slurm.in_allocation(environ)
    return {"HVDTRAIN_DATA": str(_place(source, environ) if copied else Path(source).absolute())}


@contextlib.contextmanager
def staged(source: str | None, environ: Mapping[str, str]) -> Iterator[None]:
    """Copy `source` to every node of the Slurm allocation, and removes the copies in the end.

    Raises:
        LaunchError: If a node could not copy it.
    """
    if source is None or not slurm.in_allocation(environ):
        yield
        return
    place = _place(source, environ)
    folder, what, where = (shlex.quote(str(each)) for each in (place.parent, source, place))
    try:
        _on_each_node(f"mkdir -p {folder} && cp -RL {what} {where}", environ)
        yield
    finally:
        with contextlib.suppress(LaunchError):
            _on_each_node(f"rm -rf {folder}", environ, 60)


def _place(source: str, environ: Mapping[str, str]) -> Path:
    """Choose a folder of this job's own, on the disk that the site gives to jobs."""
    disk = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    return Path(disk) / f"hvdtrain-{environ['SLURM_JOB_ID']}" / Path(source).resolve().name


def _on_each_node(command: str, environ: Mapping[str, str], seconds: float | None = None) -> None:
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    step = ["srun", f"--ntasks={nodes}", "--ntasks-per-node=1", *slurm.overlap(environ)]
    done = ask([*step, "sh", "-c", command], environ, seconds)
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise LaunchError(f"--stage: not every node could copy the data ({command}): {said}")
