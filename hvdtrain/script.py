"""Run a Python script or module inside this process, as `python` would run it."""

import importlib.util
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

_PACKAGE = str(Path(__file__).parent) + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep


def run(command: Sequence[str]) -> None:
    """Do what `python command...` does: the script becomes `__main__`, with its own `sys.argv` and `sys.path`.

    Args:
        command: The words after `python`: `script.py args...`, or `-m module args...`.
    """
    if command[0] == "-m":
        _run_module(command[1], command[2:])
    else:
        _run_file(command[0], command[1:])


def check_arguments(usage: str, arguments: Sequence[str]) -> None:
    """Exit with a message if the arguments of an entry point name no script and no module.

    Args:
        usage: The command with a script, for the message.
        arguments: `script.py args...`, or `-m module args...`.
    """
    if not arguments or arguments[0] in ("-h", "--help") or list(arguments) == ["-m"]:
        sys.exit(f"Expected a script: {usage}, or -m module args...")
    if arguments[0] != "-m" and not Path(arguments[0]).is_file():
        print(
            f"hvdtrain: The script {arguments[0]} is not there (looked for from {Path.cwd()}).",
            file=sys.stderr,
        )
        sys.exit(2)


def shorten_tracebacks(advice: Callable[[BaseException], str] = lambda error: "") -> None:
    """Make the traceback of an uncaught error begin in the script, and print the advice for that error after it."""
    show = sys.excepthook

    def show_users_part(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        error.__traceback__ = users_part(error)
        show(kind, error, error.__traceback__)
        words = advice(error)
        if words:
            print(f"\n{words}", file=sys.stderr)

    sys.excepthook = show_users_part


def users_part(error: BaseException) -> TracebackType | None:
    """Return an error's traceback, starting at the user's script, without frames of hvdtrain in between.

    Frames of hvdtrain are kept at the end, if hvdtrain itself has raised the error.
    """
    traces = _frames(error.__traceback__)
    begun = [*itertools.dropwhile(lambda trace: _in(trace, _PACKAGE, "<frozen "), traces)]
    if not begun:
        # A syntax error contains its location. Any other error without user frames is an error of hvdtrain.
        return None if isinstance(error, SyntaxError) else error.__traceback__
    foreign = [number for number, trace in enumerate(begun) if not _in(trace, _PACKAGE, _PYTHON)]
    last = foreign[-1] if foreign else 0
    shown = [trace for number, trace in enumerate(begun) if number > last or not _in(trace, _PACKAGE)]
    result = None
    for trace in reversed(shown):
        result = TracebackType(result, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    return result


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace:
        yield trace
        trace = trace.tb_next


def _in(trace: TracebackType, *places: str) -> bool:
    """Return whether a frame belongs to one of these folders; installed packages are not part of Python itself."""
    path = trace.tb_frame.f_code.co_filename
    return path.startswith(places) and ("site-packages" not in path or path.startswith(_PACKAGE))


def _run_file(path: str, args: Sequence[str]) -> None:
    sys.argv = [path, *args]
    _search_first(str(Path(path).resolve().parent))
    loader = SourceFileLoader("__main__", path)
    code = loader.source_to_code(loader.get_data(path), path)
    _become_main(code, __file__=str(Path(path).absolute()), __loader__=loader)


def _run_module(name: str, args: Sequence[str]) -> None:
    sys.argv = ["-m", *args]
    if not name.startswith("hvdtrain."):  # modules of hvdtrain need nothing from the working directory
        _search_first(str(Path.cwd()))
    spec = _spec(name)
    loader: Any = spec.loader if spec else None
    code = loader.get_code(spec.name) if spec and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        sys.exit(f"{sys.executable}: No module named {name}, or none that can be run.")
    sys.argv[0] = str(spec.origin)
    _become_main(code, __file__=spec.origin, __loader__=spec.loader, __spec__=spec, __package__=spec.parent)


def _spec(name: str) -> ModuleSpec | None:
    """Find the module that `-m name` runs: the module itself, or the `__main__` of a package."""
    try:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name and f"{name}.__main__".startswith(error.name):
            return None
        raise
    return spec


def _search_first(folder: str) -> None:
    """Put the script's folder first into `sys.path`, as Python does (safe_path.py has removed the first entry)."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)


def _become_main(code: CodeType, **attributes: Any) -> None:
    module = ModuleType("__main__")
    vars(module).update(__builtins__=__builtins__, __annotations__={}, **attributes)
    sys.modules["__main__"] = module
    exec(code, vars(module))
