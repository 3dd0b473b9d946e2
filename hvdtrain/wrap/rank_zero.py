"""Run functions and commands once, on rank 0, and give their results, errors and files to all ranks.

`os.system` and `subprocess.Popen` are replaced. `subprocess.run`, `call`, `check_output`, `getoutput` and
`os.popen` use it.
"""

import functools
import importlib
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.collectives.errors import Known, mark
from hvdtrain.patching import replace
from hvdtrain.wrap import files

_Popen = subprocess.Popen
_STREAMS = ("stdin", "stdout", "stderr")
_COMMAND_METHODS = ("poll", "wait", "communicate", "send_signal", "terminate", "kill", "__exit__")
_STREAM_METHODS = (
    *("read", "readline", "readlines", "write", "writelines", "flush", "close", "fileno", "readable"),
)

_alone: ContextVar[bool] = ContextVar("rank 0 runs a function while the others wait", default=False)


def on_rank_zero(engine: Engine, work: Callable[[], Any]) -> Any:
    """Return on every rank what `work` returns on rank 0.

    Args:
        engine: The ranks.
        work: A function that is called on rank 0 only. It must not communicate.

    Raises:
        Exception: On every rank, the exception that `work` raised on rank 0.
    """
    result, error = None, None
    if engine.rank == 0:
        token = _alone.set(True)
        try:
            result = work()
        except Exception as caught:
            error = caught
        finally:
            _alone.reset(token)
    result, failure = engine.broadcast_object((result, _portable(error)))
    if failure is not None:
        raise mark(failure, Known.REPORTED) if error is None else mark(error, Known.ORIGINAL)
    return result


def _portable(error: Exception | None) -> Exception | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def install() -> None:
    """Replace the functions that start commands. Call this before the script imports anything."""
    replace(os, "system", _once)
    # The replacement is a class, because scripts and libraries may define subclasses of it.
    subprocess.Popen = _Command  # type: ignore[misc]


def _engine() -> Engine | None:
    """Return the ranks that share the command, or None if this process runs it alone."""
    if _alone.get() or threading.current_thread() is not threading.main_thread():
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
        return on_rank_zero(engine, work)
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
        if self._engine is None:
            super().__init__(*args, **kwargs)
            return
        self.args: Any = args[0] if args else kwargs.get("args")
        self.text_mode = any(
            kwargs.get(name) for name in ("text", "universal_newlines", "encoding", "errors")
        )
        self._process: Any = None  # on rank 0 the process

        def start() -> list[str]:
            self._process = _Popen(*args, **kwargs)
            return [name for name in _STREAMS if getattr(self._process, name) is not None]

        opened = self._call(start)
        for name in _STREAMS:
            setattr(self, name, _Stream(self, name) if name in opened else None)

    def _call(self, work: Callable[[], Any]) -> Any:
        if self._engine is None or _alone.get():
            return work()
        result, self.pid, self.returncode = _run_once(
            self._engine, lambda: (work(), self._process.pid, self._process.returncode)
        )
        return result


class _Stream(io.IOBase):
    """A pipe of rank 0's process, "stdin", "stdout" or "stderr", read and written by rank 0 for all ranks."""

    def __init__(self, command: _Command, name: str) -> None:
        self._command, self._name = command, name

    def _use(self, method: str, *args: Any) -> Any:
        return self._command._call(
            lambda: getattr(getattr(self._command._process, self._name), method)(*args)
        )

    def __del__(self) -> None:
        """Do nothing: the pipe belongs to the process on rank 0, and `io.IOBase` would close it."""

    @property
    def closed(self) -> bool:
        """Whether the stream is closed on rank 0."""
        return bool(self._use("__getattribute__", "closed"))


def _stream_method(name: str) -> Callable[..., Any]:
    return lambda self, *args: self._use(name, *args)


def _command_method(name: str) -> Callable[..., Any]:
    method = getattr(_Popen, name)

    @functools.wraps(method)
    def call(self: _Command, *args: Any, **kwargs: Any) -> Any:
        if self._engine is None:
            return method(self, *args, **kwargs)
        if name == "__exit__":
            # The process needs no details of an error in the script, and the error may not be picklable.
            args = (None, None, None)
        return self._call(lambda: getattr(self._process, name)(*args, **kwargs))

    return call


for _name in _COMMAND_METHODS:
    setattr(_Command, _name, _command_method(_name))
for _name in _STREAM_METHODS:
    setattr(_Stream, _name, _stream_method(_name))
