"""Do local work on all ranks so that an error on one rank is raised on all, and no rank waits forever."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hvdtrain.collectives.engine import Call, Engine, MismatchError, ranks_text
from hvdtrain.collectives.errors import Known, mark

Result = TypeVar("Result")
Facts = Sequence[tuple[str, str]]


def together(engine: Engine, what: str, work: Callable[[], Result]) -> Result:
    """Return what `work` returns on this rank, once it has succeeded on every rank.

    Args:
        engine: The ranks; all call this.
        what: Name of the work, for error messages.
        work: Called without arguments; must not communicate.

    Returns:
        This rank's result.

    Raises:
        RuntimeError: On the ranks that succeeded, if another rank failed; its error is quoted. A rank that
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


def raise_reported(message: str, failures: list[str]) -> None:
    """Raise RuntimeError on a rank that has succeeded, if others have failed."""
    if failures:
        raise mark(RuntimeError(f"{message} {'; '.join(failures)}"), Known.REPORTED)


def share_failures(engine: Engine, what: str, error: BaseException | None) -> list[str]:
    """Send the errors of all ranks to every rank, and return a line for each rank that has failed."""
    if engine.size == 1:
        return []
    if error is not None:
        mark(error, Known.ORIGINAL)
    engine.agree(Call(what))
    failure = None if error is None else f"{type(error).__name__}: {error}"
    everyone = engine.allgather_object(failure)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]


def compare(engine: Engine, what: str, facts: Facts, advice: str | Mapping[str, str]) -> None:
    """Raise an error unless all ranks have the same facts, each a pair of a name and a value.

    Args:
        engine: The ranks.
        what: Subject of the facts, for error messages.
        facts: The facts of this rank.
        advice: Text that tells the user what to do about a difference, or one text for each name.

    Raises:
        MismatchError: On every rank, with the first fact that differs and its value on each rank.
    """
    if engine.size == 1:
        return
    engine.agree(Call(what))
    everyone = [dict(rank_facts) for rank_facts in engine.allgather_object(list(facts))]
    for name in dict.fromkeys(name for rank_facts in everyone for name in rank_facts):
        values = [rank_facts.get(name, "not given") for rank_facts in everyone]
        if len(set(values)) > 1:
            hint = advice if isinstance(advice, str) else advice[name]
            raise MismatchError(f"{what}: {name} differs between the ranks.\n{_listed(values)}\n{hint}")


def _listed(values: Sequence[str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "\n".join(f"  {ranks_text(ranks)}: {value}" for value, ranks in groups.items())
