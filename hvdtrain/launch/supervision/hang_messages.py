"""Write the messages about ranks that wait for one another, with their stacks."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.supervision.verdict import RankState
from hvdtrain.topology import consecutive

_SHOWN = 3  # groups of late ranks for which a stack is shown
_ENDS = 8  # lines kept at the inner and at the outer end of a long stack
_FILE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
# Files in which idle threads wait.
_IDLE = re.compile(r"/(threading|queue|selectors|socket|multiprocessing/\w+|concurrent/futures/\w+)\.py$")


@dataclass(frozen=True)
class Waits:
    """Which ranks wait for which."""

    waiting: dict[int, float]  # for how many seconds each waiting rank has waited
    late: list[int]  # the ranks that they wait for
    working: set[int]  # the ranks that compute, read or write


def sentence(ranks: Sequence[RankState], waits: Waits) -> str:
    """Return a message: which ranks wait, where and for how long, and the state of the ranks they wait for."""
    parts = []
    for place, numbers in _group(waits.waiting, lambda number: _place(ranks[number].beat)).items():
        verb = "waits" if len(numbers) == 1 else "wait"
        longest = max(waits.waiting[number] for number in numbers)
        parts.append(f"{_named(numbers)} {verb} {place} for {longest:.0f} s")
    if waits.late:
        return "; ".join([*parts, _late(ranks, waits)])
    return f"{', '.join(parts)}, and none is missing: MPI, or the network between them, may hang."


def all_stacks(ranks: Sequence[RankState], waits: Waits) -> str:
    """Return the state and the stacks of all ranks, for the file of stacks."""
    lines = [sentence(ranks, waits), ""]
    for number, rank in enumerate(ranks):
        pid = f", pid {rank.beat.pid}" if rank.beat.pid else ""
        lines.append(f"rank {number} (host {rank.host}{pid}) {_state(rank, number in waits.working)}")
        lines.append(_stacks(rank) or "no stack\n")
    return "\n".join(lines) + "\n"


def innermost_file(stacks: str) -> str:
    """Return the file of the innermost call of the main thread in the output of faulthandler; empty if unknown."""
    threads = _threads(stacks)
    return _file(_main(threads)) if threads else ""


def _late(ranks: Sequence[RankState], waits: Waits) -> str:
    """Describe the late ranks, grouped by their state, with the stack of one rank of each group."""
    groups = list(_group(waits.late, lambda number: _state(ranks[number], number in waits.working)).items())
    described = []
    for state, numbers in groups[:_SHOWN]:
        stack = _summarize(_stacks(ranks[numbers[0]]))
        text = state if len(numbers) == 1 else _plural(state)
        described.append(f"{_named(numbers)} {text}" + (f", in:\n{stack}" if stack else ""))
    more = [number for _, numbers in groups[_SHOWN:] for number in numbers]
    if more:
        described.append(f"also late: {_named(more)}")
    return ";\n".join(described)


def _state(rank: RankState, works: bool) -> str:
    """Describe where a rank is and what it does; the text continues a sentence after its name."""
    beat = rank.beat
    if rank.gone:
        return "has ended"
    if not rank.up:
        return "has not started"
    if not beat.pid or rank.silent:
        return f"does not answer: its host {rank.host}, or the link to it, may be gone"
    condition = ", at work" if beat.waiting is None and works else ""
    if beat.state == "T":
        condition = f", stopped (SIGSTOP): `kill -CONT {beat.pid}` on {rank.host} continues it"
    elif beat.state == "t":
        condition = f", stopped by a debugger (pid {beat.pid} on {rank.host})"
    elif beat.state == "D":
        where = rank.answer.get("waits_in")
        condition = f", waiting for a disk or a device{f' ({where})' if where else ''}"
    return f"is {_place(beat)}{condition}"


def _place(beat: Beat) -> str:
    step = "" if beat.step is None else f"at step {beat.step}"
    if beat.waiting is not None:
        return " ".join(filter(None, [beat.doing, beat.among and f"of {beat.among}", step]))
    doing = f" ({beat.doing})" if beat.doing else ""
    return (step or (f"after {beat.waits} collectives" if beat.waits else "before hvd.init()")) + doing


def _group(numbers: Iterable[int], describe: Callable[[int], str]) -> dict[str, list[int]]:
    """Group ranks by their description."""
    groups: dict[str, list[int]] = {}
    for number in numbers:
        groups.setdefault(describe(number), []).append(number)
    return groups


def _named(numbers: Sequence[int]) -> str:
    """Return "rank 3", or "ranks 0,1,3-6": only runs of four or more ranks are written with a hyphen."""
    runs = consecutive(numbers)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 3 else ",".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(numbers) > 1 else ''} {','.join(texts)}"


def _plural(text: str) -> str:
    for singular, plural in (("is ", "are "), ("has ", "have "), ("does ", "do ")):
        if text.startswith(singular):
            return plural + text.removeprefix(singular).replace("its host", "their host")
    return text


def _stacks(rank: RankState) -> str:
    return str(rank.answer.get("stacks", ""))


def _summarize(stacks: str) -> str:
    """Return the stack of the main thread and of one other thread that is not idle, innermost calls first."""
    threads = _threads(stacks)
    if not threads:
        return ""
    main = _main(threads)
    busy = [thread for thread in threads if thread is not main and not _IDLE.search(_file(thread))]
    shown = _short(main)
    if busy:
        shown += ["  In another thread:", *_short(busy[0])]
    return "\n".join(shown)


def _threads(stacks: str) -> list[list[str]]:
    found: list[list[str]] = []
    for line in stacks.splitlines():
        if line.endswith("(most recent call first):"):
            found.append([])
        elif found and _FILE.match(line):
            found[-1].append(line)
    return [lines for lines in found if lines]


def _main(threads: list[list[str]]) -> list[str]:
    """Return the thread that runs the script; if none is found, the oldest thread, which comes last."""
    scripts = [thread for thread in threads if any(map(_starts_script, thread))]
    return (scripts or threads)[-1]


def _starts_script(line: str) -> bool:
    return "hvdtrain/script.py" in line


def _file(lines: list[str]) -> str:
    found = _FILE.match(lines[0])
    return found.group(1) if found else ""


def _short(lines: list[str]) -> list[str]:
    """Return the user's part of a stack, without the middle of a long one."""
    ends = [number for number, line in enumerate(lines) if _starts_script(line)]
    lines = lines[: ends[0]] if ends else lines
    if len(lines) <= 2 * _ENDS + 1:
        return [*lines]
    return [*lines[:_ENDS], f"  ... {len(lines) - 2 * _ENDS} calls ...", *lines[-_ENDS:]]
