"""Write the messages about ranks that wait for one another."""

from collections.abc import Callable, Iterable, Sequence

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs import stacks
from hvdtrain.launch.hangs.rank_states import Answer, RankStates

_SHOWN = 3  # groups of late ranks for which a stack is shown


def sentence(states: RankStates, now: float) -> str:
    """Return a message: which ranks wait, where and for how long, and the state of the ranks they wait for.

    Args:
        states: The states of all ranks.
        now: The time on this host's monotonic clock, in seconds.
    """
    waiting = states.waiting(now)
    late = states.late(waiting)
    waits = []
    for place, ranks in _group(waiting, lambda number: _place(states.ranks[number].beat)).items():
        verb = "waits" if len(ranks) == 1 else "wait"
        waits.append(f"{_named(ranks)} {verb} {place} for {max(waiting[rank] for rank in ranks):.0f} s")
    if late:
        return "; ".join([*waits, _late(states, late, now)])
    return f"{', '.join(waits)}, and none is missing: MPI, or the network between them, may hang."


def all_stacks(states: RankStates, now: float) -> str:
    """Return the state and the stacks of all ranks, for the file of stacks."""
    lines = [sentence(states, now), ""]
    for number, known in enumerate(states.verdict.ranks):
        rank = states.ranks.get(number)
        pid = f", pid {rank.beat.pid}" if rank else ""
        lines += [f"rank {number} (host {known.host}{pid}) {_state(states, number, now)}"]
        lines += [states.answers.get(number, Answer()).stacks or "no stack\n"]
    return "\n".join(lines) + "\n"


def _late(states: RankStates, late: Sequence[int], now: float) -> str:
    """Describe the late ranks, grouped by their state, with the stack of one rank of each group."""
    groups = list(_group(late, lambda number: _state(states, number, now)).items())
    described = []
    for state, ranks in groups[:_SHOWN]:
        stack = stacks.summarize(states.answers.get(ranks[0], Answer()).stacks)
        text = state if len(ranks) == 1 else _plural(state)
        described.append(f"{_named(ranks)} {text}" + (f", in:\n{stack}" if stack else ""))
    more = [rank for _, ranks in groups[_SHOWN:] for rank in ranks]
    if more:
        described.append(f"also late: {_named(more)}")
    return ";\n".join(described)


def _state(states: RankStates, number: int, now: float) -> str:
    """Describe where a rank is and what it does; the text continues a sentence after its name."""
    rank, known = states.ranks.get(number), states.verdict.ranks[number]
    if known.gone:
        return "has ended"
    if not known.up:
        return "has not started"
    if rank is None or states.silent(number):
        return f"does not answer: its host {known.host}, or the link to it, may be gone"
    return f"is {_place(rank.beat)}{_condition(states, number, now)}"


def _condition(states: RankStates, number: int, now: float) -> str:
    beat, host = states.ranks[number].beat, states.verdict.ranks[number].host
    if beat.state == "T":
        return f", stopped (SIGSTOP): `kill -CONT {beat.pid}` on {host} continues it"
    if beat.state == "t":
        return f", stopped by a debugger (pid {beat.pid} on {host})"
    if beat.state == "D":
        where = states.answers.get(number, Answer()).waits_in
        return f", waiting for a disk or a device{f' ({where})' if where else ''}"
    return ", at work" if beat.waiting is None and states.works(number, now) else ""


def _place(beat: Beat) -> str:
    step = "" if beat.step is None else f"at step {beat.step}"
    if beat.waiting is not None:
        return " ".join(filter(None, [beat.doing, beat.among and f"of {beat.among}", step]))
    doing = f" ({beat.doing})" if beat.doing else ""
    return (step or (f"after {beat.waits} collectives" if beat.waits else "before hvd.init()")) + doing


def _group(ranks: Iterable[int], describe: Callable[[int], str]) -> dict[str, list[int]]:
    """Group ranks by their description."""
    groups: dict[str, list[int]] = {}
    for number in ranks:
        groups.setdefault(describe(number), []).append(number)
    return groups


def _named(ranks: Sequence[int]) -> str:
    """Return "rank 3", or "ranks 0,1,3-6": only runs of four or more ranks are written with a hyphen."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 3 else ",".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {','.join(texts)}"


def _plural(text: str) -> str:
    for singular, plural in (("is ", "are "), ("has ", "have "), ("does ", "do ")):
        if text.startswith(singular):
            return plural + text.removeprefix(singular).replace("its host", "their host")
    return text
