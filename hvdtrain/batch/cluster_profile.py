"""Read a cluster profile, the settings for all jobs of a cluster: ~/.config/hvdtrain/cluster.toml."""

import dataclasses
import datetime
import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain import settings
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.tuned_settings import config_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# For each type of a field: the Python types of a valid TOML value, and the description in error messages.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), 'a text in quotes: {key} = "{written}"'),
    int: ((int,), "a whole number of 1 or more: {key} = 4"),
    int | str: ((int, str), 'a number or a text in quotes: {key} = "{written}"'),
    tuple[str, ...]: ((list,), 'a list of texts: {key} = ["…", "…"]'),
}


@dataclass(frozen=True)
class Profile:
    """The settings of a cluster, as docs/slurm.md describes them.

    For empty ones the command line, the template or Slurm decides.
    """

    # Options of sbatch, and more of them in `sbatch`.
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: int | str = ""
    mem: int | str = ""
    nodes: int = 0
    ntasks_per_node: int = 0
    cpus_per_task: int = 0
    gpus_per_node: int | str = ""
    sbatch: tuple[str, ...] = ()
    template: str = ""
    image: str = ""
    # What the nodes load, activate and run before the script, in this order.
    modules: tuple[str, ...] = ()
    venv: str = ""
    conda: str = ""
    setup: tuple[str, ...] = ()
    # The value of `srun --mpi=`, "srun" or "mpirun", and the interface for messages between ranks.
    pmi: str = ""
    launcher: str = ""
    network: str = ""
    path: Path | None = None


def read_profile(named: str | None, environ: Mapping[str, str] = os.environ) -> Profile:
    """Read a cluster profile.

    Args:
        named: A file, or the name of a profile in the settings folder; if None, HVDTRAIN_CLUSTER, else "cluster".
        environ: The environment variables.

    Returns:
        The profile; an empty one if none is named and the default file does not exist.

    Raises:
        LaunchError: If the named profile does not exist, or its content is not valid.
    """
    path = _profile_path(named or settings.get("HVDTRAIN_CLUSTER", environ), environ)
    chosen = named or settings.is_set("HVDTRAIN_CLUSTER", environ)
    if not chosen and not path.exists():
        return Profile()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"The cluster profile {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise LaunchError(
            f"The cluster profile {path} is not valid TOML: {error}. Texts need quotes."
        ) from error
    # Keys may also be written with dashes, as the options of sbatch.
    values = {key.replace("-", "_"): value for key, value in table.items()}
    return Profile(**{key: _checked(path, key, value) for key, value in values.items()}, path=path)


def _profile_path(named: str, environ: Mapping[str, str]) -> Path:
    """Return the file of a profile; a text without a slash and without .toml is the name of a profile."""
    if "/" in named or named.endswith(".toml"):
        return Path(named).expanduser().absolute()
    return config_folder(environ) / f"{named}.toml"


def _checked(path: Path, key: str, value: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(Profile) if field.name != "path"}
    if key not in fields:
        similar = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"the keys are {', '.join(fields)}."
        raise LaunchError(f"The cluster profile {path} has the unknown key {key}: {hint}")
    types, expected = _KINDS[fields[key].type]
    if not _valid(key, value, types):
        # TOML reads 08:00:00 without quotes as a time of day; the message then shows the value with quotes.
        written = str(value) if isinstance(value, datetime.time) else "…"
        expected = expected.format(key=key, written=written)
        raise LaunchError(f"The cluster profile {path} has {key} = {value!r}; expected {expected}")
    if key == "launcher" and value not in ("srun", "mpirun"):
        raise LaunchError(f"The cluster profile {path} has launcher = {value!r}; it may be srun or mpirun.")
    return tuple(value) if isinstance(value, list) else value


def _valid(key: str, value: Any, types: tuple[type, ...]) -> bool:
    # bool is a subclass of int, but true is not a number of nodes.
    if not isinstance(value, types) or isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= (0 if key == "gpus_per_node" else 1)
    return not isinstance(value, list) or all(isinstance(item, str) for item in value)
