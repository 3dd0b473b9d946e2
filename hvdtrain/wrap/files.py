"""Redirect the files that ranks other than 0 write to a temporary folder of each rank.

Every rank runs the whole script, so each rank would write the same file to the same path. Only rank 0 does so.
On another rank, a file that the script opens for writing lies in a temporary folder, and later uses of the same
path on this rank find this copy.
"""

# Path objects must not be used here: pathlib calls the functions that this module replaces.
# ruff: noqa: PTH100, PTH118, PTH120

import atexit
import builtins
import contextlib
import io
import os
import pathlib
import re
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hvdtrain.patching import Make, replace

_CLOCK_REALTIME_COARSE = 5  # the time module does not define it
_EXEMPT = ("/dev/", "/proc/", "/sys/")
# Functions of `os` that read or change the attributes of a path.
_ATTRIBUTES = (
    *("stat", "lstat", "access", "chmod", "chown", "lchown", "utime", "readlink"),
    *("listxattr", "getxattr", "setxattr"),
)
_RENAMING = ("rename", "replace")
_LINKING = ("link", "symlink")
_REMOVING = ("remove", "unlink", "rmdir")


class _Copies:
    """The copies of files that this rank has written.

    Args:
        folder: Folder of the copies, each under its absolute path; "" on rank 0, which uses the files themselves.
        since: Seconds since the epoch. Files that other ranks have made after this time are hidden from this rank.
    """

    def __init__(self, folder: str, since: float) -> None:
        self.folder = folder
        self.since = since
        self.shared: set[str] = set()
        self.removed: set[str] = set()

    def copy_path(self, path: str) -> str:
        return self.folder + path

    def is_exempt(self, path: str) -> bool:
        """Return whether all ranks use the same file at a path."""
        return not self.folder or path.startswith((*_EXEMPT, self.folder))

    def for_reading(self, path: str) -> str:
        """Return the path to read on this rank: that of the copy, or of a file that was there before."""
        if self.is_exempt(path):
            return path
        if _lexists(self.copy_path(path)) or self.is_hidden(path):
            return self.copy_path(path)
        return path

    def is_hidden(self, path: str) -> bool:
        """Return whether a path exists for other ranks only."""
        if self.is_exempt(path) or _is_inside(path, self.shared):
            return False
        if _is_inside(path, self.removed):
            return True
        try:
            return _lstat(path).st_ctime >= self.since and not _is_dir(path)
        except OSError:
            return False

    def for_writing(self, path: str, keep: bool) -> str:
        """Return the path of the copy to write, to which `keep` first copies the present content of the file."""
        if self.is_exempt(path):
            return path
        # The order matters: a file that another rank makes at this moment either does not exist yet, or is hidden.
        exists, copy, before = _lexists(path), self.copy_path(path), self.for_reading(path)
        if _is_dir(self.for_reading(os.path.dirname(path))):
            _makedirs(os.path.dirname(copy))
        if keep and exists and before != copy and not _is_dir(before):
            # With the original open: the replaced one would hide the file as soon as another rank appends to it.
            with contextlib.suppress(FileNotFoundError), _open(before, "rb") as old, _open(copy, "wb") as new:
                shutil.copyfileobj(old, new)
        return copy


_copies = _Copies("", 0)
# The original functions, before `install` replaces them.
_open, _lstat, _stat, _mkdir, _scandir = io.open, os.lstat, os.stat, os.mkdir, os.scandir
_rmtree = shutil.rmtree


def install() -> None:
    """Redirect the files that this rank writes from now on."""
    global _copies
    _copies = _Copies(tempfile.mkdtemp(prefix="hvdtrain-wrap-"), time.time())
    atexit.register(remove_copies)
    replace(io, "open", redirected(for_mode, "file"))
    builtins.open = io.open
    for names, make in (
        (("open",), redirected(_for_flags, "path")),
        (("mkdir",), redirected(_for_new_folder, "path")),
        (_ATTRIBUTES, redirected(for_reading, "path")),
        (_LINKING, redirected(for_writing, "dst", 1)),
        (_REMOVING, _removing),
        (_RENAMING, _renaming),
    ):
        for name in names:
            replace(os, name, make)
    replace(shutil, "rmtree", _removing)
    replace(os, "listdir", lambda _: lambda path=".": [entry.name for entry in _entries(path)])
    replace(os, "scandir", lambda _: lambda path=".": _Entries(_entries(path)))
    tarfile.bltn_open = io.open  # type: ignore[attr-defined] # tarfile has stored the original function
    accessor = getattr(pathlib, "_NormalAccessor", None)  # in Python 3.10 pathlib has stored them too
    for name in ("mkdir", "listdir", "scandir", *_ATTRIBUTES, *_REMOVING, *_RENAMING, *_LINKING):
        if hasattr(accessor, name):
            setattr(accessor, name, staticmethod(getattr(os, name)))
    if accessor is not None:
        accessor.open = staticmethod(io.open)


def drop_copies() -> None:
    """Remove the copies of this rank and show it all files as rank 0 has them on this host."""
    if _copies.folder:
        remove_copies()
        _makedirs(_copies.folder)
        _copies.removed.clear()


def remove_copies() -> None:
    """Remove all copies of this rank."""
    if _copies.folder:
        _rmtree(_copies.folder, ignore_errors=True)


def time_between_files() -> float:
    """Return a time after all files made so far and before all files made later, in seconds since the epoch.

    Linux stamps files with a clock that advances every few milliseconds, so this waits for its next tick.
    """
    now = then = time.clock_gettime(_CLOCK_REALTIME_COARSE)
    while then <= now:
        time.sleep(0.001)
        then = time.clock_gettime(_CLOCK_REALTIME_COARSE)
    return (now + then) / 2


def show_files_until(moment: float) -> None:
    """Show this rank the files that other ranks have made until a time in seconds since the epoch."""
    _copies.since = max(_copies.since, moment)


def share(path: Any) -> bool:
    """Show this rank a file that rank 0 has just written; return False if it does not exist on this host."""
    absolute = os.path.abspath(path)
    if not _lexists(absolute):
        return False
    _copies.shared.add(absolute)
    return True


def redirected(choose: Callable[..., str], name: str, index: int = 0) -> Make:
    """Return a function that wraps another one so that it uses other paths.

    Args:
        choose: Takes an absolute path and the arguments after it; returns the path to use.
        name: Name of the argument that is a path or a list of paths.
        index: Its position.
    """

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, given, after = args[:index], args[index : index + 1], args[index + 1 :]

            def moved(file: Any) -> Any:
                if isinstance(file, list | tuple):
                    return [moved(item) for item in file]
                path = _path(file, kwargs)
                return file if path is None else choose(path, *after, **kwargs)

            if name in kwargs:
                kwargs[name] = moved(kwargs[name])
            return function(*before, *map(moved, given), *after, **kwargs)

        return call

    return make


def for_reading(path: Any, /, *args: Any, **kwargs: Any) -> str:
    """Return the absolute path to read on this rank in place of a path."""
    return _copies.for_reading(os.path.abspath(path))


def for_writing(path: Any, /, *args: Any, **kwargs: Any) -> str:
    """Return the absolute path to write on this rank in place of a path."""
    return _copies.for_writing(os.path.abspath(path), keep=False)


def for_mode(path: str, /, mode: str = "r", *args: Any, **kwargs: Any) -> str:
    """Return the path to open on this rank in a mode of `open`."""
    if set(mode) & set("wax+"):
        return _copies.for_writing(path, keep="w" not in mode)
    return _copies.for_reading(path)


def _for_flags(path: str, /, flags: int, *args: Any, **kwargs: Any) -> str:
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return _copies.for_writing(path, keep=not flags & os.O_TRUNC)
    return _copies.for_reading(path)


def _for_new_folder(path: str, /, *args: Any, **kwargs: Any) -> str:
    # A folder that rank 0 has made in the meantime does not count as existing.
    if not _copies.is_hidden(path) and _lexists(path) and _stat(path).st_ctime < _copies.since:
        raise FileExistsError(17, os.strerror(17), path)
    return _copies.for_writing(path, keep=False)


def _removing(remove: Callable[..., None]) -> Callable[..., None]:
    def removed(file: Any, *args: Any, **kwargs: Any) -> None:
        path = _path(file, kwargs)
        if path is None or _copies.is_exempt(path):
            remove(file, *args, **kwargs)
            return
        if _lexists(_copies.copy_path(path)):
            remove(_copies.copy_path(path), *args, **kwargs)
        elif path not in _copies.shared and _copies.is_hidden(path):
            raise FileNotFoundError(2, os.strerror(2), path)
        # Otherwise the file was there before, and rank 0 removes it or has removed it.
        _copies.removed.add(path)
        _copies.shared.discard(path)

    return removed


def _renaming(rename: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        old, new = _path(source), _path(target)
        if old is None or new is None or _copies.is_exempt(old):
            rename(source, target, *args, **kwargs)
            return
        present, copy = _copies.for_reading(old), _copies.for_writing(new, keep=False)
        if present != old:
            rename(present, copy)
        elif _is_dir(present):
            shutil.copytree(present, copy)
        elif _lexists(present):
            shutil.copyfile(present, copy)
        _copies.removed.add(old)

    return renamed


def _entries(file: Any) -> list[os.DirEntry]:
    """List the entries of a folder that this rank sees, and those of its copy of the folder."""
    path = _path(file)
    if path is None or isinstance(file, bytes):
        return list(_scandir(file))
    copy = _copies.copy_path(path)
    has_copy = _is_dir(copy) and not _copies.is_exempt(path)
    if has_copy and not _is_dir(path):
        return list(_scandir(copy))
    entries = {}
    for entry in _scandir(file):
        if not _copies.is_hidden(os.path.join(path, entry.name)):
            entries[entry.name] = entry
    if has_copy:
        entries.update((entry.name, entry) for entry in _scandir(copy))
    return list(entries.values())


class _Entries(contextlib.ExitStack):
    """The replacement for the result of `os.scandir`: an iterator with `close`, which can be used in `with`."""

    def __init__(self, entries: Iterable[os.DirEntry]) -> None:
        super().__init__()
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry]:
        return self._entries

    def __next__(self) -> os.DirEntry:
        return next(self._entries)


def _path(file: Any, kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return the absolute path of a file; None for a descriptor, an address, or a path relative to `dir_fd`."""
    if kwargs and kwargs.get("dir_fd") is not None:
        return None
    if not isinstance(file, str | bytes | os.PathLike):
        return None
    path = os.fsdecode(file)
    return None if re.match(r"\w+://", path) else os.path.abspath(path)


def _is_inside(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of the folders, or lies inside one of them."""
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _lexists(path: str) -> bool:
    try:
        _lstat(path)
    except (OSError, ValueError):
        return False
    return True


def _is_dir(path: str) -> bool:
    try:
        return stat.S_ISDIR(_stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _makedirs(path: str) -> None:
    if not _is_dir(path):
        _makedirs(os.path.dirname(path))
        _mkdir(path)
