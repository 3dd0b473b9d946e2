"""What `hvdtrain tune` has found, kept in a file where `hvdtrain run` picks it up."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hvdtrain.launch.hosts import LaunchError

VARIABLE, OFF = "HVDTRAIN_TUNED", "off"


@dataclass(frozen=True)
class Place:
    """For what kind of job something was measured.

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
    """What was found for one place.

    Args:
        place: Where.
        settings: The variables that made it faster.
        gains: How much: for each thing measured the time before over the time after.
        ranks: With how many ranks it was measured.
        date: When.
    """

    place: Place
    settings: Mapping[str, str]
    gains: Mapping[str, float]
    ranks: int
    date: str


def config_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of this user's settings: hvdtrain's folder in XDG_CONFIG_HOME, else in ~/.config."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hvdtrain"


def file_of(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Say where it is kept: what HVDTRAIN_TUNED names, else tuned.json among this user's settings; None if off."""
    named = environ.get(VARIABLE, "")
    if named.lower() == OFF:
        return None
    return Path(named).expanduser().absolute() if named else config_folder(environ) / "tuned.json"


def read(path: Path) -> list[Tuned]:
    """Read all that was found; nothing where there is no file.

    Raises:
        LaunchError: If the file cannot be understood.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(Tuned(place=Place(**each.pop("place")), **each)) for each in found]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}. {_CHOICE}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LaunchError(
            f"{path} is not what `hvdtrain tune` has written ({type(error).__name__}: {error}). {_CHOICE}"
        ) from error


def write(path: Path, tuned: Tuned) -> None:
    """Add what was found, in place of what was found for the same place before; nothing to set removes that.

    Raises:
        LaunchError: If the file cannot be written, or what is there cannot be understood.
    """
    others = [each for each in read(path) if each.place != tuned.place]
    found = [asdict(each) for each in (*others, *([tuned] if tuned.settings else []))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}.") from error


def for_place(place: Place, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return what was found for a place and the user has not set otherwise, and a line that says so.

    Raises:
        LaunchError: If the file is there and cannot be understood, or was named and is not there.
    """
    path = file_of(environ)
    if path is None:
        return {}, ""
    if environ.get(VARIABLE) and not path.exists():
        raise LaunchError(f"{VARIABLE}={environ[VARIABLE]}: there is no such file. {_CHOICE}")
    for each in read(path):
        if each.place == place:
            settings = {name: value for name, value in each.settings.items() if name not in environ}
            words = " ".join(f"{name}={value}" for name, value in settings.items())
            line = f"hvdtrain: set by `hvdtrain tune` of {each.date[:10]} ({path}): {words}"
            return settings, line if settings else ""
    return {}, ""


_CHOICE = f"Type `hvdtrain tune`, or set {VARIABLE}={OFF}."


def _checked(tuned: Tuned) -> Tuned:
    words: Sequence[object] = (tuned.date, *tuned.settings, *tuned.settings.values())
    if not all(isinstance(each, str) for each in words):
        raise ValueError("date and settings are texts")
    return replace(tuned, settings=dict(tuned.settings), gains=dict(tuned.gains))
