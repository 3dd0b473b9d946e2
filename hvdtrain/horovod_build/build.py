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
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from hvdtrain.horovod_build.progress import Steps
from hvdtrain.horovod_build.target import HOROVOD, RECORD, CannotBuild, Target, inspect, installed_record
from hvdtrain.horovod_build.wheel import build_wheel, install, verify

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build(mpi: str, gpu: str, wheel_dir: str | None, verbose: bool) -> int:
    """Build Horovod, verify an allreduce over two ranks, and install it in this environment.

    Nothing is installed before the verification, so a failed or interrupted build leaves the environment unchanged.

    Args:
        mpi: Name or path of MPI's C++ compiler wrapper.
        gpu: "none", or "nccl" for allreduces between GPUs.
        wheel_dir: The cache of built wheels; by default `~/.cache/hvdtrain/wheels`.
        verbose: Whether to show the output of pip and the compiler.

    Returns:
        The exit code: 0 ready, 1 build or verification failed, 2 a requirement is missing, 130 interrupted.
    """
    console = Console(stderr=True)
    # A space in the path would split compiler flags.
    temporary = "/tmp" if " " in tempfile.gettempdir() else None
    started = time.monotonic()
    try:
        with (
            _signals_interrupt(),
            tempfile.TemporaryDirectory(prefix="hvdtrain-", dir=temporary) as folder,
        ):
            target = inspect(mpi, gpu, Path(folder))
            if (installed_record() or {}).get("key") != target.key:
                cache = _cache_folder(wheel_dir) / target.key
                with Steps(cache / "build.log", console, verbose) as steps:
                    _build_and_install(target, cache, Path(folder), steps)
        seconds = time.monotonic() - started
        message, exit_code = f"Horovod {HOROVOD} is ready for {target} ({seconds:.0f} s).", 0
    except CannotBuild as error:
        message, exit_code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, exit_code = "Interrupted: Horovod was not built, and the environment is unchanged.", 130
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    return exit_code


def _build_and_install(target: Target, cache: Path, folder: Path, steps: Steps) -> None:
    cached = _cached_wheel(cache, target)
    wheel = cached or build_wheel(target, folder, steps)
    steps.phase("verifying an allreduce of two ranks")
    wheels = verify(wheel, target, folder, steps)
    if not cached:
        # An atomic rename, so that no other process reads an incomplete file.
        part = cache / f".{os.getpid()}.{wheel.name}"
        part.write_bytes(wheel.read_bytes())
        part.replace(cache / wheel.name)
    steps.phase("installing")
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
