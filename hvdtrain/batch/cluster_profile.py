"""What a cluster needs from every job, written down once: ~/.config/hvdtrain/cluster.toml."""

import dataclasses
import datetime
import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.tuned_settings import config_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# How each kind of value is named to a person, what TOML makes of it, and how it is written.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), 'a text in quotes: {key} = "{written}"'),
    int: ((int,), "a whole number of 1 or more: {key} = 4"),
    int | str: ((int, str), 'a number or a text in quotes: {key} = "{written}"'),
    tuple[str, ...]: ((list,), 'a list of texts: {key} = ["…", "…"]'),
}


@dataclass(frozen=True)
class Profile:
    """A cluster's own words; whatever is empty is left to Slurm, the template and the command line.

    Args:
        partition: Where jobs go.
        account: Who pays.
        qos: Quality of service.
        time: Time limit, as sbatch takes it.
        mem: Memory of a node, as sbatch takes it.
        nodes: How many nodes.
        ntasks_per_node: Ranks a node.
        cpus_per_task: CPUs a rank.
        gpus_per_node: GPUs a node, or "kind:number".
        template: What is submitted when the command line does not say.
        image: The container's image, for the template `container`.
        sbatch: More options for sbatch.
        modules: What `module load` loads on the nodes, in this order.
        venv: The folder of a virtual environment to activate on the nodes.
        conda: The name or the folder of a conda environment to activate on the nodes.
        setup: Lines of bash that the nodes run after modules, venv and conda.
        pmi: What `srun --mpi=` gets.
        launcher: "srun" or "mpirun".
        network: The network interface over which ranks talk.
        path: The file all this was read from.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: int | str = ""
    mem: int | str = ""
    nodes: int = 0
    ntasks_per_node: int = 0
    cpus_per_task: int = 0
    gpus_per_node: int | str = ""
    template: str = ""
    image: str = ""
    sbatch: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    venv: str = ""
    conda: str = ""
    setup: tuple[str, ...] = ()
    pmi: str = ""
    launcher: str = ""
    network: str = ""
    path: Path | None = None


def read_profile(named: str | None, environ: Mapping[str, str] = os.environ) -> Profile:
    """Reads a cluster's profile, so that nobody types account and partition twice.

    Args:
        named: A file, or the name of one in the folder of settings; HVDTRAIN_CLUSTER, else "cluster", if None.
        environ: The environment.

    Returns:
        The profile; an empty one where none was named and there is none.

    Raises:
        LaunchError: If the one that was named is not there, or it cannot be understood.
    """
    said = named or environ.get("HVDTRAIN_CLUSTER")
    path = _place(said or "cluster", environ)
    if not said and not path.exists():
        return Profile()
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"The cluster profile {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise LaunchError(
            f"The cluster profile {path} is not TOML: {error}. Texts stand in quotes."
        ) from error
    # Keys may be written as sbatch writes its options, too.
    values = {key.replace("-", "_"): value for key, value in read.items()}
    return Profile(**{key: _checked(path, key, value) for key, value in values.items()}, path=path)


def _place(named: str, environ: Mapping[str, str]) -> Path:
    """A word without a slash and without .toml is the name of a profile, as in --cluster=gpu."""
    if "/" in named or named.endswith(".toml"):
        return Path(named).expanduser().absolute()
    return config_folder(environ) / f"{named}.toml"


def _checked(path: Path, key: str, value: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(Profile) if field.name != "path"}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(fields)}."
        raise LaunchError(f"The cluster profile {path} has the key {key}, which means nothing here: {hint}")
    types, wanted = _KINDS[fields[key].type]
    texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    right = (
        isinstance(value, types) and not isinstance(value, bool) and (texts or not isinstance(value, list))
    )
    if not right or (isinstance(value, int) and value < (key != "gpus_per_node")):
        written = str(value) if isinstance(value, datetime.time) else "…"
        wanted = wanted.format(key=key, written=written)
        raise LaunchError(f"The cluster profile {path} has {key} = {value!r}; expected {wanted}")
    if key == "launcher" and value not in ("srun", "mpirun"):
        raise LaunchError(f"The cluster profile {path} has launcher = {value!r}; it may be srun or mpirun.")
    return tuple(value) if isinstance(value, list) else value
