"""Define the settings that may make a job faster, and the file in which `hvdtrain tune` stores those that do.

`hvdtrain run` sets the variables of that file, and those that were faster in all measurements.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain import settings
from hvdtrain.launch.hosts import LaunchError

VARIABLE, OFF = "HVDTRAIN_TUNED", "off"
_CHOICE = f"Type `hvdtrain tune`, or set {VARIABLE}={OFF}."

# The benchmark that judges a setting: allreduces of all sizes, or training steps.
SUMS, STEPS = "sums", "steps"


@dataclass(frozen=True)
class Knob:
    """One value of a setting that differs from its default."""

    name: str  # name of the value
    choice: str  # name of the setting; at most one value of a setting is used
    environ: Mapping[str, str]  # the variables that set it
    shows: str = SUMS  # the benchmark that judges it
    # Prefix of the names, as in `mpirun.KNOWN`, of the MPIs that have this setting; empty for all MPIs.
    mpi: str = ""
    hosts: str = ""  # "one" or "several" if it has an effect only then; empty for both
    engine: str = ""  # the only engine that it applies to; empty for all engines
    always: bool = False  # whether it is set by default, because it was faster in all measurements

    def fits(self, mpi: str, hosts: str) -> bool:
        """Return whether it has an effect for an MPI in `mpirun.KNOWN` on "one" host or "several"."""
        return mpi.startswith(self.mpi) and self.hosts in ("", hosts)


def _open_mpi() -> Iterator[Knob]:
    # The shared-memory transport has different names in Open MPI 4 and 5.
    for mpi, memory in (("Open MPI 4", "vader"), ("Open MPI 5", "sm")):
        limit = f"OMPI_MCA_btl_{memory}_eager_limit"
        # Above its default limit of 4 KiB Open MPI does a handshake first, so 64 KiB take as long as 128 KiB.
        for kib in (128, 32, 4):
            name, environ = f"up to {kib} KiB at once", {limit: str(kib << 10)}
            yield Knob(name, "messages in memory", environ, mpi=mpi, hosts="one", always=kib == 128)
    yield Knob(
        "copied twice, through shared memory",
        "copies in memory",
        {"OMPI_MCA_btl_vader_single_copy_mechanism": "none", "OMPI_MCA_btl_vader_max_send_size": "131072"},
        mpi="Open MPI 4",
        hosts="one",
    )
    for number, name in ((3, "recursive doubling"), (4, "a ring"), (6, "Rabenseifner's")):
        settings = {"use_dynamic_rules": "1", "allreduce_algorithm": str(number)}
        environ = {f"OMPI_MCA_coll_tuned_{key}": value for key, value in settings.items()}
        yield Knob(name, "MPI's own algorithm", environ, mpi="Open MPI")
    for kib in (16, 256):
        environ = {f"OMPI_MCA_btl_tcp_{which}eager_limit": str(kib << 10) for which in ("", "rndv_")}
        name = f"up to {kib} KiB at once"
        yield Knob(name, "messages between hosts", environ, mpi="Open MPI", hosts="several")
    environ = {"OMPI_MCA_btl_tcp_links": "2"}
    yield Knob("two connections", "connections between hosts", environ, mpi="Open MPI", hosts="several")


def _other_mpis() -> Iterator[Knob]:
    for name in ("recursive_doubling", "reduce_scatter_allgather"):
        environ = {"MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": name}
        yield Knob(name.replace("_", " "), "MPI's own algorithm", environ, mpi="MPICH")
    environ = {"MPIR_CVAR_NEMESIS_SHM_EAGER_MAX_SZ": "131072"}
    yield Knob("up to 128 KiB at once", "messages in memory", environ, mpi="MPICH", hosts="one")
    for number, name in ((1, "recursive doubling"), (2, "Rabenseifner's"), (8, "a ring")):
        environ = {"I_MPI_ADJUST_ALLREDUCE": str(number)}
        yield Knob(name, "MPI's own algorithm", environ, mpi="Intel MPI")
    environ = {"I_MPI_SHM_EAGER_THRESHOLD": "131072"}
    yield Knob("up to 128 KiB at once", "messages in memory", environ, mpi="Intel MPI", hosts="one")


def _horovod() -> Iterator[Knob]:
    for ms in ("0.2", "5"):
        environ = {"HOROVOD_CYCLE_TIME": ms}
        yield Knob(f"every {ms} ms", "Horovod's cycle", environ, shows=STEPS, engine="horovod")
    for mib in (0, 64):
        environ = {"HOROVOD_FUSION_THRESHOLD": str(mib << 20)}
        name = f"gradients of up to {mib} MiB as one" if mib else "each gradient by itself"
        yield Knob(name, "Horovod's fusion", environ, shows=STEPS, engine="horovod")


# Freed memory stays with the process, so that the next step needs no new pages from the kernel.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str((2 << 30) - 1)}

KNOBS = (
    *_open_mpi(),
    *_other_mpis(),
    *_horovod(),
    Knob("large", "the C library's pages", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, shows=STEPS),
    Knob("kept for the next step", "freed memory", _KEEP_MEMORY, shows=STEPS),
)


@dataclass(frozen=True)
class Place:
    """The kind of job for which settings were measured."""

    mpi: str  # the MPI's name in `mpirun.KNOWN`
    hosts: str  # "one" or "several"
    cpu: str  # the model of the processors, as the kernel names it


@dataclass(frozen=True)
class Tuned:
    """The settings found for one place."""

    place: Place  # the place
    settings: Mapping[str, str]  # the variables that made it faster
    # For each benchmark, the time without the settings divided by the time with them.
    gains: Mapping[str, float]
    ranks: int  # the number of ranks of the measurement
    date: str  # the date of the measurement


def unasked(mpi: str, hosts: str) -> dict[str, str]:
    """Return the variables that are set by default, without a measurement on this machine."""
    found: dict[str, str] = {}
    for knob in KNOBS:
        if knob.always and knob.fits(mpi, hosts):
            found |= knob.environ
    return found


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
    """Read the file; return an empty list if it does not exist, raise a LaunchError if it cannot be read."""
    try:
        return [_tuned(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}. {_CHOICE}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LaunchError(
            f"{path} is not what `hvdtrain tune` has written ({type(error).__name__}: {error}). {_CHOICE}"
        ) from error


def write(path: Path, tuned: Tuned) -> None:
    """Replace the entry of a place in the file; an entry without settings is removed."""
    entries = [entry for entry in read(path) if entry.place != tuned.place]
    found = [asdict(entry) for entry in (*entries, tuned) if entry.settings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}.") from error


def for_place(place: Place, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the settings found for a place, without those that the user has set, and a message about them."""
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


def _tuned(entry: dict[str, Any]) -> Tuned:
    texts = (entry["date"], *entry["settings"], *entry["settings"].values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("date and settings must be strings")
    known = {"place": Place(**entry["place"]), "gains": dict(entry["gains"])}
    return Tuned(**{**entry, **known})
