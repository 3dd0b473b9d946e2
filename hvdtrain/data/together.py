"""Local work that all ranks do at the same point: an error on one is an error on all, and nobody waits."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hvdtrain.collectives.agreement import RAISED
from hvdtrain.collectives.base import Call, Engine, MismatchError, ranks_text

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
    if failures:
        raise RuntimeError(f"{what} failed on {'; '.join(failures)}")
    return result  # type: ignore[return-value]


def share_failures(engine: Engine, what: str, error: BaseException | None) -> list[str]:
    """Tells every rank which ranks have failed, and with what error."""
    if engine.size == 1:
        return []
    engine.agree(Call(what))
    said = None if error is None else f"{type(error).__name__}: {error}"
    everyone = engine.allgather_object(said)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]


def tell(engine: Engine, what: str, error: BaseException) -> None:
    """Lets all other ranks know, at whatever they do together next, why this one does not come.

    They get a `MismatchError` that quotes the error. Of an error that has been told, or that all ranks got
    together, nothing is told again.

    Args:
        engine: The ranks.
        what: What raised the error.
        error: The error, which the caller raises on.
    """
    if engine.size == 1 or is_everybodys(engine, error) or getattr(error, "hvdtrain_told", False):
        return
    error.hvdtrain_told = True  # type: ignore[attr-defined]
    with contextlib.suppress(MismatchError):
        engine.agree(Call(f"{what}{RAISED}{type(error).__name__}: {_short(str(error))}"))


def _short(text: str, most: int = 600) -> str:
    """Keeps the beginning and the end, where TensorFlow puts the cause behind a long stack."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most // 3]} … {words[-most * 2 // 3 :]}"


def is_everybodys(engine: Engine, error: BaseException) -> bool:
    """Tells whether all ranks got this error together, be it within one that TensorFlow made of it."""
    hidden = engine.last_error
    return isinstance(error, MismatchError) or (
        isinstance(hidden, MismatchError) and str(hidden) in str(error)
    )


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
