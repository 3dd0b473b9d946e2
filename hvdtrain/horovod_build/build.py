"""`hvdtrain build-horovod`: Horovod's native core for the TensorFlow and the MPI of this environment."""

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
from hvdtrain.horovod_build.wheel import build_wheel, install, prove

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class BuildOptions:
    """What `hvdtrain build-horovod` was asked for.

    Args:
        mpi: Name or path of MPI's C++ compiler wrapper.
        gpu: "none", or "nccl" for reductions between GPUs.
        wheel_dir: The cache of built wheels; `~/.cache/hvdtrain/wheels` by default.
        verbose: Whether to show what the compiler prints.
    """

    mpi: str = "mpicxx"
    gpu: str = "none"
    wheel_dir: str | None = None
    verbose: bool = False


def build(options: BuildOptions) -> int:
    """Gives this environment a Horovod that was seen to sum right on two ranks.

    Nothing is installed before the proof, so a failed or interrupted build leaves the environment as it was.

    Args:
        options: What was asked for.

    Returns:
        The exit code: 0 ready, 1 the build or its proof failed, 2 a piece is missing, 130 interrupted.
    """
    console = Console(stderr=True)
    try:
        with (
            _endings_interrupt(),
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
        console.print("Interrupted: Horovod was not built, and the environment is as it was.")
        return 130
    return 0


def _build_and_install(target: Target, options: BuildOptions, folder: Path, console: Console) -> None:
    cache = _cache_folder(options.wheel_dir) / target.key
    with BuildProgress(console, options.verbose) as progress:
        steps = Steps(cache / "build.log", progress)
        wheel = _cached_wheel(cache, target)
        fresh = wheel is None
        wheel = wheel or build_wheel(target, folder, steps, progress)
        progress.phase("proving it: two ranks sum")
        wheels = prove(wheel, target, folder, steps)
        if fresh:
            _keep(wheel, cache)
        progress.phase("installing")
        _ignore_endings()
        install(wheels, steps)


def _cache_folder(asked: str | None) -> Path:
    """Finds a folder for wheels that may be written: asked for, in the home, or in the environment."""
    if asked:
        places = [Path(asked).expanduser().absolute()]
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/nonexistent", ".cache")
        places = [Path(home, "hvdtrain/wheels"), Path(sys.prefix, "var/hvdtrain/wheels")]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise CannotBuild(
        f"No wheel can be kept in {places[-1]}: it cannot be made or written. "
        "Name a folder of yours: `hvdtrain build-horovod --wheel-dir FOLDER`."
    )


def _cached_wheel(cache: Path, target: Target) -> Path | None:
    """Finds the wheel of an earlier build that says of itself that it was built for this target."""
    for wheel in cache.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                record = json.loads(archive.read(RECORD))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError):
            continue
        if record.get("key") == target.key:
            return wheel
    return None


def _keep(wheel: Path, cache: Path) -> None:
    """Moves the wheel into the cache in one stroke, so that nobody finds half of it."""
    half = cache / f".{os.getpid()}.{wheel.name}"
    half.write_bytes(wheel.read_bytes())
    half.replace(cache / wheel.name)


def _plain_folder() -> str:
    """Names a folder for temporary files whose path compiler flags can carry."""
    usual = tempfile.gettempdir()
    return "/tmp" if " " in usual else usual


@contextmanager
def _endings_interrupt() -> Iterator[None]:
    """Makes every polite way to end this process a KeyboardInterrupt, so that what it began is taken down."""
    before = {number: signal.signal(number, _interrupt_once) for number in _ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_once(*_: object) -> NoReturn:
    _ignore_endings()
    raise KeyboardInterrupt


def _ignore_endings() -> None:
    """Lets what takes a moment and must be whole run to its end: installing, and clearing up."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
