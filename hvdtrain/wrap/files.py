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
import functools
import io
import os
import pathlib
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hvdtrain.patching import replace

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
        folder: Folder of the copies, each under its absolute path.
        since: Seconds since the epoch. Files that other ranks have made after this time are hidden from this rank.
    """

    def __init__(self, folder: str, since: float) -> None:
        self.folder = folder
        self.since = since
        self.shared: set[str] = set()
        self.removed: set[str] = set()

    def copy_path(self, path: str) -> str:
        """Return the path at which the copy of a file lies, if there is a copy."""
        return self.folder + path

    def is_exempt(self, path: str) -> bool:
        """Return whether all ranks use the same file at a path."""
        return path.startswith((*_EXEMPT, self.folder))

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
        """Return the path of the copy to write.

        Args:
            path: An absolute path.
            keep: Whether to copy the present content of the file first.
        """
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


_copies: _Copies | None = None
# The original functions, before `install` replaces them.
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
    """Redirect the files that this rank writes from now on."""
    global _copies
    folder = tempfile.mkdtemp(prefix="hvdtrain-wrap-")
    _copies = copies = _Copies(folder, time.time())
    atexit.register(remove_copies)
    builtins.open = io.open = _opening(copies, _open)
    replace(os, "open", lambda opening: _opening_by_flags(copies, opening))
    replace(os, "mkdir", lambda make: _making(copies, make))
    for change, names in (
        (_reading_copy, _ATTRIBUTES),
        (_removing, _REMOVING),
        (_renaming, _RENAMING),
        (_linking, _LINKING),
    ):
        for name in names:
            replace(os, name, functools.partial(change, copies))
    replace(shutil, "rmtree", functools.partial(_removing, copies))
    replace(os, "listdir", lambda _: lambda path=".": _list_names(copies, path))
    replace(os, "scandir", lambda _: lambda path=".": _Entries(copies, path))
    tarfile.bltn_open = io.open  # type: ignore[attr-defined] # tarfile has stored the original function
    _update_pathlib()


def drop_copies() -> None:
    """Remove the copies of this rank and show it all files as rank 0 has them on this host."""
    if _copies is not None:
        _rmtree(_copies.folder, ignore_errors=True)
        _makedirs(_copies.folder)
        _copies.removed.clear()


def remove_copies() -> None:
    """Remove all copies of this rank."""
    if _copies is not None:
        _rmtree(_copies.folder, ignore_errors=True)


def time_between_files() -> float:
    """Return a time after all files made so far and before all files made later by this process.

    Linux stamps files with a clock that advances every few milliseconds, so this waits for its next tick.

    Returns:
        Seconds since the epoch.
    """
    now = then = time.clock_gettime(_CLOCK_REALTIME_COARSE)
    while then <= now:
        time.sleep(0.001)
        then = time.clock_gettime(_CLOCK_REALTIME_COARSE)
    return (now + then) / 2


def show_files_until(moment: float) -> None:
    """Show this rank the files that other ranks have made until a time, where it has no copy.

    Args:
        moment: Seconds since the epoch, at which rank 0 reached the present point of the script.
    """
    if _copies is not None:
        _copies.since = max(_copies.since, moment)


def for_reading(path: Any) -> str:
    """Return the absolute path to read on this rank in place of a path."""
    absolute = os.path.abspath(os.fspath(path))
    return absolute if _copies is None else _copies.for_reading(absolute)


def share(path: Any) -> bool:
    """Show this rank a file that rank 0 has just written; return False if it does not exist on this host."""
    absolute = os.path.abspath(os.fspath(path))
    if _copies is None:
        return True
    if not _lexists(absolute):
        return False
    _copies.shared.add(absolute)
    return True


def for_writing(path: Any, keep: bool = False) -> str:
    """Return the absolute path to write on this rank in place of a path.

    Args:
        path: The path.
        keep: Whether to copy the present content of the file first.
    """
    absolute = os.path.abspath(os.fspath(path))
    return absolute if _copies is None else _copies.for_writing(absolute, keep)


def _opening(copies: _Copies, opening: Callable[..., Any]) -> Callable[..., Any]:
    def open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = _path(file)
        if path is None:
            return opening(file, mode, *args, **kwargs)
        if set(mode) & set("wax+"):
            return opening(copies.for_writing(path, keep="w" not in mode), mode, *args, **kwargs)
        return opening(copies.for_reading(path), mode, *args, **kwargs)

    return open


def _opening_by_flags(copies: _Copies, opening: Callable[..., int]) -> Callable[..., int]:
    def open(file: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        path = _path(file, kwargs)
        if path is None:
            return opening(file, flags, *args, **kwargs)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return opening(copies.for_writing(path, keep=not flags & os.O_TRUNC), flags, *args, **kwargs)
        return opening(copies.for_reading(path), flags, *args, **kwargs)

    return open


def _making(copies: _Copies, make: Callable[..., None]) -> Callable[..., None]:
    def mkdir(file: Any, *args: Any, **kwargs: Any) -> None:
        path = _path(file, kwargs)
        if path is None or copies.is_exempt(path):
            return make(file, *args, **kwargs)
        # A folder that rank 0 has made in the meantime does not count as existing.
        if not copies.is_hidden(path) and _lexists(path) and _stat(path).st_ctime < copies.since:
            raise FileExistsError(17, os.strerror(17), path)
        return make(copies.for_writing(path, keep=False), *args, **kwargs)

    return mkdir


def _reading_copy(copies: _Copies, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(file: Any, *args: Any, **kwargs: Any) -> Any:
        path = _path(file, kwargs)
        return function(file if path is None else copies.for_reading(path), *args, **kwargs)

    return call


def _removing(copies: _Copies, remove: Callable[..., None]) -> Callable[..., None]:
    def removed(file: Any, *args: Any, **kwargs: Any) -> None:
        path = _path(file, kwargs)
        if path is None or copies.is_exempt(path):
            remove(file, *args, **kwargs)
            return
        if _lexists(copies.copy_path(path)):
            remove(copies.copy_path(path), *args, **kwargs)
        elif path not in copies.shared and copies.is_hidden(path):
            raise FileNotFoundError(2, os.strerror(2), path)
        # Otherwise the file was there before, and rank 0 removes it or has removed it.
        copies.removed.add(path)
        copies.shared.discard(path)

    return removed


def _renaming(copies: _Copies, rename: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        old, new = _path(source), _path(target)
        if old is None or new is None or copies.is_exempt(old):
            rename(source, target, *args, **kwargs)
            return
        present, copy = copies.for_reading(old), copies.for_writing(new, keep=False)
        if present != old:
            rename(present, copy)
        elif _is_dir(present):
            shutil.copytree(present, copy)
        elif _lexists(present):
            shutil.copyfile(present, copy)
        copies.removed.add(old)

    return renamed


def _linking(copies: _Copies, link: Callable[..., None]) -> Callable[..., None]:
    def linked(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        path = _path(target, kwargs)
        link(source, target if path is None else copies.for_writing(path, keep=False), *args, **kwargs)

    return linked


def _list_names(copies: _Copies, file: Any) -> list[Any]:
    path = _path(file)
    if path is None or isinstance(file, bytes):
        return _listdir(file)
    copy = copies.copy_path(path)
    has_copy = _is_dir(copy) and not copies.is_exempt(path)
    copied = _listdir(copy) if has_copy else []
    if has_copy and not _is_dir(path):
        return copied
    visible = [name for name in _listdir(path) if not copies.is_hidden(os.path.join(path, name))]
    return list(dict.fromkeys([*visible, *copied]))


class _Entries:
    """The replacement for the result of `os.scandir`: entries of a folder and of this rank's copy of it."""

    def __init__(self, copies: _Copies, file: Any) -> None:
        self._entries = iter(self._list(copies, file))

    def _list(self, copies: _Copies, file: Any) -> list[Any]:
        path = _path(file)
        if path is None or isinstance(file, bytes):
            return list(_scandir(file))
        copy = copies.copy_path(path)
        has_copy = _is_dir(copy) and not copies.is_exempt(path)
        copied = list(_scandir(copy)) if has_copy else []
        if has_copy and not _is_dir(path):
            return copied
        names = {entry.name for entry in copied}
        visible = []
        for entry in _scandir(file):
            if entry.name not in names and not copies.is_hidden(os.path.abspath(entry.path)):
                visible.append(entry)
        return [*visible, *copied]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> "_Entries":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: all entries have been read."""


def _update_pathlib() -> None:
    """Give pathlib of Python 3.10, which has stored the original functions, the replacements."""
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if accessor is None:
        return
    for name in (
        "open",
        "stat",
        "listdir",
        "scandir",
        "mkdir",
        "rmdir",
        "unlink",
        "rename",
        "replace",
        "chmod",
    ):
        if hasattr(accessor, name):
            setattr(accessor, name, staticmethod(io.open if name == "open" else getattr(os, name)))


def _path(file: Any, kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return the absolute path of a file; None for a descriptor, or a path relative to the argument `dir_fd`."""
    if kwargs and kwargs.get("dir_fd") is not None:
        return None
    if isinstance(file, int) or not isinstance(file, str | bytes | os.PathLike):
        return None
    return os.path.abspath(os.fsdecode(file))


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
        return bool(_stat(path).st_mode & 0o170000 == 0o040000)
    except (OSError, ValueError):
        return False


def _makedirs(path: str) -> None:
    if not _is_dir(path):
        _makedirs(os.path.dirname(path))
        _mkdir(path)
