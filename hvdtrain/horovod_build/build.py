"""Build, verify and install Horovod for this environment: `hvdtrain build-horovod`."""

import json
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from hvdtrain.horovod_build.progress import BuildProgress, Steps
from hvdtrain.horovod_build.target import HOROVOD, RECORD, CannotBuild, Target, inspect, installed_record
from hvdtrain.horovod_build.wheel import build_wheel, install, verify

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class BuildOptions:
    """The options of `hvdtrain build-horovod`.

    Args:
        mpi: Name or path of MPI's C++ compiler wrapper.
        gpu: "none", or "nccl" for allreduces between GPUs.
        wheel_dir: The cache of built wheels; by default `~/.cache/hvdtrain/wheels`.
        verbose: Whether to show the output of pip and the compiler.
    """

    mpi: str = "mpicxx"
    gpu: str = "none"
    wheel_dir: str | None = None
    verbose: bool = False


def build(options: BuildOptions) -> int:
    """Build Horovod, verify an allreduce over two ranks, and install it in this environment.

    Nothing is installed before the verification, so a failed or interrupted build leaves the environment unchanged.

    Args:
        options: The options of the command.

    Returns:
        The exit code: 0 ready, 1 build or verification failed, 2 a requirement is missing, 130 interrupted.
    """
    console = Console(stderr=True)
    try:
        with (
            _signals_interrupt(),
            tempfile.TemporaryDirectory(prefix="hvdtrain-", dir=_plain_folder()) as name,
        ):
            started = time.monotonic()
            target = inspect(options.mpi, options.gpu, Path(name))
            if (installed_record() or {}).get("key") != target.key:
                _build_and_install(target, options, Path(name), console)
            ready = f"Horovod {HOROVOD} is ready for {target} ({time.monotonic() - started:.0f} s)."
        console.print(ready, markup=False, highlight=False, soft_wrap=True)
    except CannotBuild as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("Interrupted: Horovod was not built, and the environment is unchanged.")
        return 130
    return 0


def _build_and_install(target: Target, options: BuildOptions, folder: Path, console: Console) -> None:
    cache = _cache_folder(options.wheel_dir) / target.key
    with BuildProgress(console, options.verbose) as progress:
        steps = Steps(cache / "build.log", progress)
        wheel = _cached_wheel(cache, target)
        cached = wheel is not None
        wheel = wheel or build_wheel(target, folder, steps, progress)
        progress.phase("verifying an allreduce of two ranks")
        wheels = verify(wheel, target, folder, steps)
        if not cached:
            _add_to_cache(wheel, cache)
        progress.phase("installing")
        _ignore_signals()
        install(wheels, steps)


def _cache_folder(asked: str | None) -> Path:
    """Return a writable folder for wheels: the one asked for, else in the home, else in the environment."""
    if asked:
        folders = [Path(asked).expanduser().absolute()]
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/nonexistent", ".cache")
        folders = [Path(home, "hvdtrain/wheels"), Path(sys.prefix, "var/hvdtrain/wheels")]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise CannotBuild(
        f"Wheels cannot be stored in {folders[-1]}: the folder cannot be created or written. "
        "Name a writable folder: `hvdtrain build-horovod --wheel-dir FOLDER`."
    )


def _cached_wheel(cache: Path, target: Target) -> Path | None:
    """Return the wheel of an earlier build whose record names this target; None if there is none."""
    for wheel in cache.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                record = json.loads(archive.read(RECORD))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError):
            continue
        if record.get("key") == target.key:
            return wheel
    return None


def _add_to_cache(wheel: Path, cache: Path) -> None:
    """Copy the wheel into the cache by an atomic rename, so that no other process reads an incomplete file."""
    part = cache / f".{os.getpid()}.{wheel.name}"
    part.write_bytes(wheel.read_bytes())
    part.replace(cache / wheel.name)


def _plain_folder() -> str:
    """Return a folder for temporary files without spaces in its path, which would split compiler flags."""
    folder = tempfile.gettempdir()
    return "/tmp" if " " in folder else folder


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, so that processes and temporary files are removed."""
    before = {number: signal.signal(number, _interrupt_once) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_once(*_: object) -> NoReturn:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """Ignore further signals, so that the installation or the cleanup is completed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
