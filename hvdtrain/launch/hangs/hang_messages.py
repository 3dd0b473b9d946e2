"""The words for ranks that wait for one another."""

from collections.abc import Callable, Iterable, Sequence

from hvdtrain.heartbeat import Beat
from hvdtrain.launch.hangs import stacks
from hvdtrain.launch.hangs.rank_states import Answer, Standing

_SHOWN = 3  # kinds of late ranks of which one stack is shown


def sentence(standing: Standing, now: float) -> str:
    """Say who waits where and since when, and where those are and what they do that are waited for.

    Args:
        standing: What is known of all ranks.
        now: The time on this host's monotonic clock, in seconds.
    """
    waiting = standing.waiting(now)
    late = standing.late(waiting)
    waits = [
        f"{_named(ranks)} wait{'s' if len(ranks) == 1 else ''} {place} since "
        f"{max(waiting[each] for each in ranks):.0f} s"
        for place, ranks in _alike(waiting, lambda number: _place(standing.ranks[number].beat)).items()
    ]
    if late:
        return "; ".join([*waits, _late(standing, late, now)])
    return f"{', '.join(waits)}, and none is missing: MPI, or the network between them, may hang."


def all_stacks(standing: Standing, now: float) -> str:
    """Write down all that is known of all ranks."""
    lines = [sentence(standing, now), ""]
    for number, known in enumerate(standing.verdict.ranks):
        rank = standing.ranks.get(number)
        pid = f", pid {rank.beat.pid}" if rank else ""
        lines += [f"rank {number} (host {known.host}{pid}) {_standing(standing, number, now)}"]
        lines += [standing.answers.get(number, Answer()).stacks or "no stack\n"]
    return "\n".join(lines) + "\n"


def _late(standing: Standing, late: Sequence[int], now: float) -> str:
    """Describe the ranks that are waited for, those alike together, with the stack of one of each kind."""
    kinds = _alike(late, lambda number: _standing(standing, number, now))
    told = []
    for kind, ranks in list(kinds.items())[:_SHOWN]:
        stack = stacks.telling(standing.answers.get(ranks[0], Answer()).stacks)
        words = kind if len(ranks) == 1 else _plural(kind)
        told.append(f"{_named(ranks)} {words}" + (f", in:\n{stack}" if stack else ""))
    more = [each for ranks in list(kinds.values())[_SHOWN:] for each in ranks]
    return ";\n".join(told) + (f";\nlate as well: {_named(more)}" if more else "")


def _standing(standing: Standing, number: int, now: float) -> str:
    """Say where a rank is and what it does, to stand after its name."""
    rank, known = standing.ranks.get(number), standing.verdict.ranks[number]
    if known.gone:
        return "has ended"
    if not known.up:
        return "has not come to life"
    if rank is None or standing.silent(number):
        return f"does not answer: its host {known.host}, or the link to it, may be gone"
    return f"is {_place(rank.beat)}{_condition(standing, number, now)}"


def _condition(standing: Standing, number: int, now: float) -> str:
    beat, host = standing.ranks[number].beat, standing.verdict.ranks[number].host
    if beat.state == "T":
        return f", stopped (SIGSTOP): `kill -CONT {beat.pid}` on {host} lets it go on"
    if beat.state == "t":
        return f", held by a debugger (pid {beat.pid} on {host})"
    if beat.state == "D":
        where = standing.answers.get(number, Answer()).waits_in
        return f", waiting for a disk or a device{f' ({where})' if where else ''}"
    return ", at work" if beat.waiting is None and standing.works(number, now) else ""


def _place(beat: Beat) -> str:
    step = "" if beat.step is None else f"at step {beat.step}"
    if beat.waiting is not None:
        return " ".join(filter(None, [beat.doing, beat.among and f"of {beat.among}", step]))
    doing = f" ({beat.doing})" if beat.doing else ""
    return (step or (f"after {beat.waits} collectives" if beat.waits else "before hvd.init()")) + doing


def _alike(ranks: Iterable[int], words: Callable[[int], str]) -> dict[str, list[int]]:
    """Put together the ranks of which the same is to be said."""
    groups: dict[str, list[int]] = {}
    for number in ranks:
        groups.setdefault(words(number), []).append(number)
    return groups


def _named(ranks: Sequence[int]) -> str:
    """Write "rank 3", or "ranks 0,1,3-6"."""
    runs = [(each, each) for each in ranks[:1]]
    for each in ranks[1:]:
        first, last = runs[-1]
        if each == last + 1:
            runs[-1] = (first, each)
        else:
            runs.append((each, each))
    words = [",".join(map(str, range(a, b + 1))) if b - a < 3 else f"{a}-{b}" for a, b in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {','.join(words)}"


def _plural(words: str) -> str:
    for one, many in (("is ", "are "), ("has ", "have "), ("does ", "do ")):
        if words.startswith(one):
            return many + words.removeprefix(one).replace("its host", "their host")
    return words
