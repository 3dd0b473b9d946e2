"""Files that ranks other than 0 write are copies of their own, which they and nobody else find where they put them.

Every rank runs the whole script, so each would write the same file at the same place. Rank 0 does. On another rank
what the script opens for writing lies in a temporary folder; whatever it does with that path later means the copy.
"""

# pathlib asks by the very functions that are changed here.
# ruff: noqa: PTH100, PTH118, PTH120

import atexit
import builtins
import contextlib
import functools
import io
import os
import pathlib
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from hvdtrain.patching import replace

_COARSE = 5  # CLOCK_REALTIME_COARSE, which the time module does not name
_EXEMPT = ("/dev/", "/proc/", "/sys/")
# Functions of `os` that ask about a path, by which argument says on which folder it is relative.
_ASKING = (
    *("stat", "lstat", "access", "chmod", "chown", "lchown", "utime", "readlink"),
    *("listxattr", "getxattr", "setxattr"),
)
_RENAMING = ("rename", "replace")
_LINKING = ("link", "symlink")
_REMOVING = ("remove", "unlink", "rmdir")


class _Copies:
    """This rank's own files.

    Args:
        folder: Where they lie, each under its whole path.
        since: Time of the start in seconds; what others have made since then is not there for this rank.
    """

    def __init__(self, folder: str, since: float) -> None:
        self.folder = folder
        self.since = since
        self.shared: set[str] = set()
        self.gone: set[str] = set()

    def own(self, path: str) -> str:
        """Returns where this rank's copy of a path is, if there is one."""
        return self.folder + path

    def exempt(self, path: str) -> bool:
        """Tells whether a path means the same for everyone."""
        return path.startswith((*_EXEMPT, self.folder))

    def found(self, path: str) -> str:
        """Returns what a path means on this rank: its copy, or what was there before."""
        if self.exempt(path) or _lexists(self.own(path)):
            return path if self.exempt(path) else self.own(path)
        return self.own(path) if self.hidden(path) else path

    def hidden(self, path: str) -> bool:
        """Tells whether a path is there for others only."""
        if self.exempt(path) or any(path == each or path.startswith(each + os.sep) for each in self.shared):
            return False
        if any(path == each or path.startswith(each + os.sep) for each in self.gone):
            return True
        try:
            return _lstat(path).st_ctime >= self.since and not _is_dir(path)
        except OSError:
            return False

    def for_writing(self, path: str, keep: bool) -> str:
        """Returns where to write, with what was there before if that is to be kept."""
        if self.exempt(path):
            return path
        # In this order: what another rank makes at this moment is either not there yet, or hidden.
        there, own, before = _lexists(path), self.own(path), self.found(path)
        if _is_dir(self.found(os.path.dirname(path))):
            _makedirs(os.path.dirname(own))
        if keep and there and before != own and not _is_dir(before):
            # Past the functions that are changed here, which would no longer see it once another rank adds to it.
            with contextlib.suppress(FileNotFoundError), _open(before, "rb") as old, _open(own, "wb") as new:
                shutil.copyfileobj(old, new)
        return own


_copies: _Copies | None = None
_rmtree = shutil.rmtree
_lstat, _stat, _mkdir, _listdir, _open, _scandir = (
    os.lstat,
    os.stat,
    os.mkdir,
    os.listdir,
    io.open,
    os.scandir,
)


def install() -> None:
    """Begins to keep this rank's files apart."""
    global _copies
    folder = tempfile.mkdtemp(prefix="hvdtrain-wrap-")
    _copies = copies = _Copies(folder, time.time())
    atexit.register(forget)
    builtins.open = io.open = _opening(copies, _open)
    replace(os, "open", lambda opening: _opening_by_flags(copies, opening))
    replace(os, "mkdir", lambda make: _making(copies, make))
    for change, names in (
        (_asking, _ASKING),
        (_removing, _REMOVING),
        (_renaming, _RENAMING),
        (_linking, _LINKING),
    ):
        for name in names:
            replace(os, name, functools.partial(change, copies))
    replace(shutil, "rmtree", functools.partial(_removing, copies))
    replace(os, "listdir", lambda _: lambda path=".": _names(copies, path))
    replace(os, "scandir", lambda _: lambda path=".": _Entries(copies, path))
    tarfile.bltn_open = io.open  # type: ignore[attr-defined] # it keeps the function that it found at first
    _follow_pathlib()


def drop_copies() -> None:
    """Let this rank see all files as rank 0 has them on this host; its own copies of them are removed."""
    if _copies is not None:
        _rmtree(_copies.folder, ignore_errors=True)
        _makedirs(_copies.folder)
        _copies.gone.clear()


def forget() -> None:
    """Removes this rank's own files."""
    if _copies is not None:
        _rmtree(_copies.folder, ignore_errors=True)


def moment() -> float:
    """Return a time after all files made so far and before all that this process makes next, in seconds.

    Linux stamps files with a clock that advances every few milliseconds, so the next tick is awaited.
    """
    now = then = time.clock_gettime(_COARSE)
    while then <= now:
        time.sleep(0.001)
        then = time.clock_gettime(_COARSE)
    return (now + then) / 2


def see_until(moment: float) -> None:
    """Lets this rank see what others have made by now, where it has no copy of its own.

    Args:
        moment: Seconds since the epoch, at which rank 0 came to where this rank is now.
    """
    if _copies is not None:
        _copies.since = max(_copies.since, moment)


def found(path: Any) -> str:
    """Returns what a path means on this rank."""
    place = os.path.abspath(os.fspath(path))
    return place if _copies is None else _copies.found(place)


def share(path: Any) -> bool:
    """Lets this rank see what rank 0 has just written; False if it is not there for this host."""
    place = os.path.abspath(os.fspath(path))
    if _copies is None:
        return True
    if not _lexists(place):
        return False
    _copies.shared.add(place)
    return True


def private(path: Any, keep: bool = False) -> str:
    """Returns where this rank's own copy of a path is to be written.

    Args:
        path: The path.
        keep: Whether what is there is to be copied first.
    """
    place = os.path.abspath(os.fspath(path))
    return place if _copies is None else _copies.for_writing(place, keep)


def _opening(copies: _Copies, opening: Callable[..., Any]) -> Callable[..., Any]:
    def open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = _path(file)
        if path is None:
            return opening(file, mode, *args, **kwargs)
        if set(mode) & set("wax+"):
            return opening(copies.for_writing(path, keep="w" not in mode), mode, *args, **kwargs)
        return opening(copies.found(path), mode, *args, **kwargs)

    return open


def _opening_by_flags(copies: _Copies, opening: Callable[..., int]) -> Callable[..., int]:
    def open(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        path = None if kwargs.get("dir_fd") is not None else _path(file)
        if path is None:
            return opening(file, flags, *args, **kwargs)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return opening(copies.for_writing(path, keep=not flags & os.O_TRUNC), flags, *args, **kwargs)
        return opening(copies.found(path), flags, *args, **kwargs)

    return open


def _making(copies: _Copies, make: Callable[..., None]) -> Callable[..., None]:
    def mkdir(file: Any, *args: Any, **kwargs: Any) -> None:
        path = None if kwargs.get("dir_fd") is not None else _path(file)
        if path is None or copies.exempt(path):
            return make(file, *args, **kwargs)
        # A folder that rank 0 has made meanwhile is none that was there before.
        if not copies.hidden(path) and _lexists(path) and _stat(path).st_ctime < copies.since:
            raise FileExistsError(17, os.strerror(17), path)
        return make(copies.for_writing(path, keep=False), *args, **kwargs)

    return mkdir


def _asking(copies: _Copies, ask: Callable[..., Any]) -> Callable[..., Any]:
    def asked(file: Any, *args: Any, **kwargs: Any) -> Any:
        path = None if kwargs.get("dir_fd") is not None else _path(file)
        return ask(file if path is None else copies.found(path), *args, **kwargs)

    return asked


def _removing(copies: _Copies, remove: Callable[..., None]) -> Callable[..., None]:
    def removed(file: Any, *args: Any, **kwargs: Any) -> None:
        path = None if kwargs.get("dir_fd") is not None else _path(file)
        if path is None or copies.exempt(path):
            remove(file, *args, **kwargs)
            return
        if _lexists(copies.own(path)):
            remove(copies.own(path), *args, **kwargs)
        elif path not in copies.shared and copies.hidden(path):
            raise FileNotFoundError(2, os.strerror(2), path)
        # Otherwise it was there before, and rank 0 removes it, or has done so.
        copies.gone.add(path)
        copies.shared.discard(path)

    return removed


def _renaming(copies: _Copies, rename: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        here, there = _path(source), _path(target)
        if here is None or there is None or copies.exempt(here):
            rename(source, target, *args, **kwargs)
            return
        found, own = copies.found(here), copies.for_writing(there, keep=False)
        if found != here:
            rename(found, own)
        elif _lexists(found):
            shutil.copytree(found, own) if _is_dir(found) else shutil.copyfile(found, own)
        copies.gone.add(here)

    return renamed


def _linking(copies: _Copies, link: Callable[..., None]) -> Callable[..., None]:
    def linked(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        there = None if kwargs.get("dir_fd") is not None else _path(target)
        link(source, target if there is None else copies.for_writing(there, keep=False), *args, **kwargs)

    return linked


def _names(copies: _Copies, file: Any) -> list[Any]:
    path = _path(file)
    if path is None or isinstance(file, bytes):
        return _listdir(file)
    own = copies.own(path)
    kept = _is_dir(own) and not copies.exempt(path)
    mine = _listdir(own) if kept else []
    if kept and not _is_dir(path):
        return mine
    others = [each for each in _listdir(path) if not copies.hidden(os.path.join(path, each))]
    return list(dict.fromkeys([*others, *mine]))


class _Entries:
    """What `os.scandir` returns: entries of a folder, and of this rank's copy of it."""

    def __init__(self, copies: _Copies, file: Any) -> None:
        self._entries = iter(self._found(copies, file))

    def _found(self, copies: _Copies, file: Any) -> list[Any]:
        path = _path(file)
        if path is None or isinstance(file, bytes):
            return list(_scandir(file))
        own = copies.own(path)
        kept = _is_dir(own) and not copies.exempt(path)
        mine = list(_scandir(own)) if kept else []
        if kept and not _is_dir(path):
            return mine
        taken = {each.name for each in mine}
        return [
            *(
                each
                for each in _scandir(file)
                if each.name not in taken and not copies.hidden(os.path.abspath(each.path))
            ),
            *mine,
        ]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> "_Entries":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing: all entries have been read."""


def _follow_pathlib() -> None:
    """Lets Python 3.10's pathlib, which keeps the functions it found at first, find these."""
    accessor = getattr(pathlib, "_NormalAccessor", None)
    for name in (
        "stat",
        "open",
        "listdir",
        "scandir",
        "mkdir",
        "unlink",
        "rmdir",
        "rename",
        "replace",
        "chmod",
    ):
        if accessor is not None and hasattr(accessor, name):
            setattr(accessor, name, staticmethod(io.open if name == "open" else getattr(os, name)))


def _path(file: Any) -> str | None:
    """Returns the whole path of what is one, None for a descriptor."""
    if isinstance(file, int) or not isinstance(file, str | bytes | os.PathLike):
        return None
    return os.path.abspath(os.fsdecode(file))


def _lexists(path: str) -> bool:
    try:
        _lstat(path)
    except (OSError, ValueError):
        return False
    return True


def _is_dir(path: str) -> bool:
    try:
        return bool(_stat(path).st_mode & 0o170000 == 0o040000)
    except (OSError, ValueError):
        return False


def _makedirs(path: str) -> None:
    if not _is_dir(path):
        _makedirs(os.path.dirname(path))
        _mkdir(path)
