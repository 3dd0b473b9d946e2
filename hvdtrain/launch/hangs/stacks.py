"""Shorten the stacks that faulthandler writes to the part that helps a user."""

import re

# Files in which idle threads wait.
_IDLE = re.compile(r"/(threading|queue|selectors|socket|multiprocessing/\w+|concurrent/futures/\w+)\.py$")
_FILE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_ENDS = 8  # lines kept at the inner and at the outer end of a long stack


def summarize(text: str) -> str:
    """Return the stack of the main thread and of one other thread that is not idle, innermost calls first.

    Args:
        text: The output of faulthandler for all threads.
    """
    threads = _threads(text)
    if not threads:
        return ""
    main = _main(threads)
    busy = [thread for thread in threads if thread is not main and not _IDLE.search(_file(thread))]
    shown = [*_short(_user_part(main))]
    if busy:
        shown += ["  In another thread:", *_short(_user_part(busy[0]))]
    return "\n".join(shown)


def innermost_file(text: str) -> str:
    """Return the file of the innermost call of the main thread; empty if unknown."""
    threads = _threads(text)
    return _file(_main(threads)) if threads else ""


def _threads(text: str) -> list[list[str]]:
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.endswith("(most recent call first):"):
            found.append([])
        elif found and _FILE.match(line):
            found[-1].append(line)
    return [lines for lines in found if lines]


def _main(threads: list[list[str]]) -> list[str]:
    """Return the thread that runs the script; if none is found, the oldest thread, which comes last."""
    scripts = [thread for thread in threads if any("hvdtrain/script.py" in line for line in thread)]
    return (scripts or threads)[-1]


def _file(lines: list[str]) -> str:
    found = _FILE.match(lines[0])
    return found.group(1) if found else ""


def _user_part(lines: list[str]) -> list[str]:
    ends = [number for number, line in enumerate(lines) if "hvdtrain/script.py" in line]
    return lines[: ends[0]] if ends else lines


def _short(lines: list[str]) -> list[str]:
    if len(lines) <= 2 * _ENDS + 1:
        return lines
    return [*lines[:_ENDS], f"  ... {len(lines) - 2 * _ENDS} calls ...", *lines[-_ENDS:]]
