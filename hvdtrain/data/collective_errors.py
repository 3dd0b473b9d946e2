"""Local work that all ranks do at the same point: an error on one is an error on all, and nobody waits."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hvdtrain.collectives.agreement import Known, mark
from hvdtrain.collectives.engine import Call, Engine, MismatchError, ranks_text

Result = TypeVar("Result")
Facts = Sequence[tuple[str, str]]


def together(engine: Engine, what: str, work: Callable[[], Result]) -> Result:
    """Returns what `work` returns on this rank, once it has succeeded on every rank.

    Args:
        engine: Whose ranks do this.
        what: Names the work in errors.
        work: Called without arguments; must not communicate.

    Returns:
        This rank's result.

    Raises:
        RuntimeError: On the ranks that succeeded, if another failed; its error is quoted. A rank that
            failed raises its own error.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failures = share_failures(engine, what, error)
    if error is not None:
        raise error
    raise_reported(f"{what} failed on", failures)
    return result  # type: ignore[return-value]


def raise_reported(words: str, failures: list[str]) -> None:
    """Raises RuntimeError on a rank that has succeeded, if others have failed."""
    if failures:
        raise mark(RuntimeError(f"{words} {'; '.join(failures)}"), Known.REPORTED)


def share_failures(engine: Engine, what: str, error: BaseException | None) -> list[str]:
    """Tells every rank which ranks have failed, and with what error."""
    if engine.size == 1:
        return []
    if error is not None:
        mark(error, Known.ORIGINAL)
    engine.agree(Call(what))
    said = None if error is None else f"{type(error).__name__}: {error}"
    everyone = engine.allgather_object(said)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]


def compare(engine: Engine, what: str, facts: Facts, advice: str | Mapping[str, str]) -> None:
    """Makes sure that all ranks state the same facts, each a pair of a name and a value.

    Args:
        engine: The ranks.
        what: What the facts are about.
        facts: The facts of this rank.
        advice: What to do where one differs, or for each name what to do.

    Raises:
        MismatchError: On every rank, with the first fact that differs, as each rank states it.
    """
    if engine.size == 1:
        return
    engine.agree(Call(what))
    everyone = [dict(each) for each in engine.allgather_object(list(facts))]
    for name in dict.fromkeys(name for each in everyone for name in each):
        values = [each.get(name, "not given") for each in everyone]
        if len(set(values)) > 1:
            words = advice if isinstance(advice, str) else advice[name]
            raise MismatchError(f"{what}: {name} differs between the ranks.\n{_listed(values)}\n{words}")


def _listed(values: Sequence[str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "\n".join(f"  {ranks_text(ranks)}: {value}" for value, ranks in groups.items())
