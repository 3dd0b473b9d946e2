"""What faulthandler writes of a process's threads, cut down to what a person needs."""

import re

# Where threads are that have nothing to do.
_RESTING = re.compile(r"/(threading|queue|selectors|socket|multiprocessing/\w+|concurrent/futures/\w+)\.py$")
_FILE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_ENDS = 8  # lines kept of the inner and of the outer end of a long stack


def telling(text: str) -> str:
    """Return the stack of the main thread and of one other that is at work, innermost calls first.

    Args:
        text: What faulthandler wrote for all threads.
    """
    threads = _threads(text)
    if not threads:
        return ""
    main = _main(threads)
    others = [each for each in threads if each is not main and not _RESTING.search(_file(each))]
    shown = ["\n".join(_short(_users(main)))]
    shown += ["  In another thread:\n" + "\n".join(_short(_users(each))) for each in others[:1]]
    return "\n".join(shown)


def innermost(text: str) -> str:
    """Return the file in which the main thread is; empty if that is not known."""
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
    """The main thread runs the script; where that is not to be seen, it is the oldest, which comes last."""
    scripts = [each for each in threads if any("hvdtrain/script.py" in line for line in each)]
    return (scripts or threads)[-1]


def _file(lines: list[str]) -> str:
    found = _FILE.match(lines[0])
    return found.group(1) if found else ""


def _users(lines: list[str]) -> list[str]:
    ends = [number for number, line in enumerate(lines) if "hvdtrain/script.py" in line]
    return lines[: ends[0]] if ends else lines


def _short(lines: list[str]) -> list[str]:
    if len(lines) <= 2 * _ENDS + 1:
        return lines
    return [*lines[:_ENDS], f"  ... {len(lines) - 2 * _ENDS} calls ...", *lines[-_ENDS:]]
