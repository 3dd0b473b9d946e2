"""Read and write the file in which `hvdtrain tune` stores the fastest settings for `hvdtrain run`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hvdtrain import settings
from hvdtrain.launch.hosts import LaunchError

VARIABLE, OFF = "HVDTRAIN_TUNED", "off"


@dataclass(frozen=True)
class Place:
    """The kind of job for which settings were measured.

    Args:
        mpi: The MPI's name in `mpirun.KNOWN`.
        hosts: "one" or "several".
        cpu: The model of the processors, as the kernel names it.
    """

    mpi: str
    hosts: str
    cpu: str


@dataclass(frozen=True)
class Tuned:
    """The settings found for one place.

    Args:
        place: The place.
        settings: The variables that made it faster.
        gains: For each benchmark, the time without the settings divided by the time with them.
        ranks: The number of ranks of the measurement.
        date: The date of the measurement.
    """

    place: Place
    settings: Mapping[str, str]
    gains: Mapping[str, float]
    ranks: int
    date: str


def config_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of this user's settings: `hvdtrain` in XDG_CONFIG_HOME, else in ~/.config."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hvdtrain"


def file_of(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the path of the file: HVDTRAIN_TUNED, else tuned.json in the user's settings; None if it is "off"."""
    named = settings.get(VARIABLE, environ)
    if named.lower() == OFF:
        return None
    return Path(named).expanduser().absolute() if named else config_folder(environ) / "tuned.json"


def read(path: Path) -> list[Tuned]:
    """Read the file; return an empty list if it does not exist.

    Raises:
        LaunchError: If the file cannot be read or has another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(Tuned(place=Place(**entry.pop("place")), **entry)) for entry in found]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}. {_CHOICE}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LaunchError(
            f"{path} is not what `hvdtrain tune` has written ({type(error).__name__}: {error}). {_CHOICE}"
        ) from error


def write(path: Path, tuned: Tuned) -> None:
    """Replace the entry of a place in the file; an entry without settings is removed.

    Raises:
        LaunchError: If the file cannot be written, or its present content has another format.
    """
    entries = [entry for entry in read(path) if entry.place != tuned.place]
    if tuned.settings:
        entries.append(tuned)
    found = [asdict(entry) for entry in entries]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}.") from error


def for_place(place: Place, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the settings found for a place, without those that the user has set, and a message about them.

    Raises:
        LaunchError: If the file cannot be read, or HVDTRAIN_TUNED names a file that does not exist.
    """
    path = file_of(environ)
    if path is None:
        return {}, ""
    if settings.is_set(VARIABLE, environ) and not path.exists():
        raise LaunchError(f"{VARIABLE}={settings.get(VARIABLE, environ)}: there is no such file. {_CHOICE}")
    for entry in read(path):
        if entry.place == place:
            found = {name: value for name, value in entry.settings.items() if name not in environ}
            assignments = " ".join(f"{name}={value}" for name, value in found.items())
            message = f"hvdtrain: set by `hvdtrain tune` of {entry.date[:10]} ({path}): {assignments}"
            return found, message if found else ""
    return {}, ""


_CHOICE = f"Type `hvdtrain tune`, or set {VARIABLE}={OFF}."


def _checked(tuned: Tuned) -> Tuned:
    texts: Sequence[object] = (tuned.date, *tuned.settings, *tuned.settings.values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("date and settings must be strings")
    return replace(tuned, settings=dict(tuned.settings), gains=dict(tuned.gains))
