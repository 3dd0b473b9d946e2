"""Run each command of a script once, on rank 0, and give its output, exit code and files to all ranks.

`os.system` and `subprocess.Popen` are replaced. `subprocess.run`, `call`, `check_output`, `getoutput` and
`os.popen` use it.
"""

import functools
import importlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.patching import replace
from hvdtrain.wrap import files, rank_zero

_METHODS = ("poll", "wait", "communicate", "send_signal", "terminate", "kill", "__exit__")
_STREAMS = ("stdin", "stdout", "stderr")


def install() -> None:
    """Replace the functions that start commands. Call this before the script imports anything."""
    replace(os, "system", _once)
    # The replacement is a class, because scripts and libraries may define subclasses of it.
    subprocess.Popen = _Command  # type: ignore[misc]


def _engine() -> Engine | None:
    """Return the ranks that share the command, or None if this process runs it alone."""
    if rank_zero.is_alone() or threading.current_thread() is not threading.main_thread():
        return None
    if not runtime.is_initialized():
        if {"keras", "tensorflow"} & sys.modules.keys():  # a command during the import of Keras
            return None
        importlib.import_module("keras")  # joins the ranks: see __main__.py
    return runtime.engine() if runtime.is_initialized() else None


def _run_once(engine: Engine, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0. Return its result on every rank, after its files have become visible there."""
    engine.barrier()  # other ranks may still have to read a file that the command changes
    try:
        return rank_zero.on_rank_zero(engine, work)
    finally:
        moment, host = engine.broadcast_object((files.time_between_files(), socket.gethostname()))
        files.show_files_until(moment)
        if host == socket.gethostname():
            files.drop_copies()


def _once(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        engine = _engine()
        if engine is None:
            return original(*args, **kwargs)
        return _run_once(engine, lambda: original(*args, **kwargs))

    return run


class _Command(subprocess.Popen):
    """A process of rank 0 that all ranks use: rank 0 makes each call, and all ranks get its result."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._engine = _engine()
        self.args: Any = args[0] if args else kwargs.get("args")
        self.returncode = None
        self._streams: dict[str, Any] = {}
        start = functools.partial(super().__init__, *args, **kwargs)
        self._call(start)
        if self._engine is not None:
            self._streams = {name: _Stream(self, name) for name in self._call(self._open_streams)}

    def _open_streams(self) -> list[str]:
        return [name for name in _STREAMS if vars(self).get(f"_real_{name}") is not None]

    def _call(self, work: Callable[[], Any]) -> Any:
        if self._engine is None or rank_zero.is_alone():
            return work()
        result, self.pid, self.returncode = _run_once(
            self._engine, lambda: (work(), self.pid, self.returncode)
        )
        return result


class _Stream(io.IOBase):
    """A pipe of rank 0's process, read and written by rank 0 for all ranks.

    Args:
        command: The process.
        name: The name of the stream: "stdin", "stdout" or "stderr".
    """

    def __init__(self, command: _Command, name: str) -> None:
        self._command, self._name = command, name

    def _use(self, method: str, *args: Any) -> Any:
        return self._command._call(lambda: getattr(vars(self._command)[f"_real_{self._name}"], method)(*args))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    def __enter__(self) -> "_Stream":
        return self

    def __del__(self) -> None:
        """Do nothing: the pipe belongs to the process on rank 0, and `io.IOBase` would close it."""

    @property
    def closed(self) -> bool:
        """Whether the stream is closed on rank 0."""
        return bool(self._use("__getattribute__", "closed"))


def _stream_method(name: str) -> Callable[..., Any]:
    return lambda self, *args: self._use(name, *args)


def _command_method(name: str) -> Callable[..., Any]:
    method = getattr(subprocess.Popen, name)

    @functools.wraps(method)
    def call(self: _Command, *args: Any, **kwargs: Any) -> Any:
        if name == "__exit__" and not rank_zero.is_alone():
            # The process needs no details of an error in the script, and the error may not be picklable.
            args = (None, None, None)
        return self._call(lambda: method(self, *args, **kwargs))

    return call


def _command_stream(name: str) -> property:
    def read(self: _Command) -> Any:
        real = vars(self).get(f"_real_{name}")
        if rank_zero.is_alone():
            return real
        return self._streams.get(name, real if self._engine is None else None)

    def write(self: _Command, stream: Any) -> None:
        vars(self)[f"_real_{name}"] = stream

    return property(read, write)


for _name in ("read", "readline", "readlines", "write", "writelines", "flush", "close", "fileno", "readable"):
    setattr(_Stream, _name, _stream_method(_name))
for _name in _METHODS:
    setattr(_Command, _name, _command_method(_name))
for _name in _STREAMS:
    setattr(_Command, _name, _command_stream(_name))
