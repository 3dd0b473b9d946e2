"""Do local work on all ranks, or on one of them first, so that an error on one rank is raised on all."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call, Engine, MismatchError, ranks_text
from hvdtrain.collectives.errors import Known, mark

Result = TypeVar("Result")

REMIND = 60.0  # seconds after which a waiting rank prints which ranks it waits for


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
    try:
        result = work()
    except Exception as error:
        _share_failures(engine, what, error)
        raise
    _raise_reported(f"{what} failed on", _share_failures(engine, what, None))
    return result


def compare(
    engine: Engine, what: str, facts: Sequence[tuple[str, str]], advice: str | Mapping[str, str]
) -> None:
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
        ranks_with: dict[str, list[int]] = {}
        for rank, rank_facts in enumerate(everyone):
            ranks_with.setdefault(rank_facts.get(name, "not given"), []).append(rank)
        if len(ranks_with) > 1:
            listed = "\n".join(f"  {ranks_text(ranks)}: {value}" for value, ranks in ranks_with.items())
            hint = advice if isinstance(advice, str) else advice[name]
            raise MismatchError(f"{what}: {name} differs between the ranks.\n{listed}\n{hint}")


@contextlib.contextmanager
def first_on_node(timeout: float = 1800.0) -> Iterator[bool]:
    """Let one rank of each host run a block first, so that a download to a local disk happens once per host.

    The other ranks wait, then run the same block and find the files:

    ```python
    with hvd.first_on_node():
        (x, y), _ = keras.datasets.mnist.load_data()
    ```

    All ranks must reach this block, and it must not communicate.

    Args:
        timeout: Seconds that the other ranks wait for the first.

    Yields:
        True on a rank that runs first, False on those that waited.

    Raises:
        TimeoutError: On the waiting ranks, after `timeout` seconds. The ranks cannot communicate any more.
        RuntimeError: On every other rank, if the block failed on a rank that runs it first; its error is quoted.
        MismatchError: On every rank, if some ranks call another operation.
    """
    with _first("hvd.first_on_node", timeout, of_each_host=True) as mine:
        yield mine


@contextlib.contextmanager
def first_overall(timeout: float = 1800.0) -> Iterator[bool]:
    """Let rank 0 run a block first, so that work on a disk shared by all hosts is done once.

    The other ranks wait, then run the same block and find the work done. All ranks must reach this block, and
    it must not communicate.

    Args:
        timeout: Seconds that the other ranks wait for rank 0.

    Yields:
        True on rank 0, False on those that waited.

    Raises:
        Exception: As `first_on_node`.
    """
    with _first("hvd.first_overall", timeout, of_each_host=False) as mine:
        yield mine


@contextlib.contextmanager
def _first(what: str, timeout: float, of_each_host: bool) -> Iterator[bool]:
    engine = runtime.engine()
    if engine.size == 1:
        yield True
        return
    local_ranks = engine.allgather_object(engine.world.local_rank)
    first = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0] if of_each_host else [0]
    failed = f"{what}: the block that one rank runs for others failed on"
    if engine.rank not in first:
        _raise_reported(failed, _wait(engine, what, first, timeout))
        yield False
        return
    try:
        yield True
    except BaseException as error:
        _share_failures(engine, what, error)
        raise
    _raise_reported(failed, _share_failures(engine, what, None))


def _wait(engine: Engine, what: str, first: list[int], timeout: float) -> list[str]:
    """Wait for the failures of the first ranks, in a separate thread because a collective has no time limit."""
    results: list[list[str] | Exception] = []

    def receive() -> None:
        try:
            results.append(_share_failures(engine, what, None))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=receive, name=what, daemon=True)
    thread.start()
    thread.join(min(REMIND, timeout))
    if not results and timeout > REMIND:
        if engine.rank == min(set(range(engine.size)) - set(first)):
            waiting = f"waiting for {ranks_text(first)} since {REMIND:g} s, for {timeout:g} s at most."
            print(f"hvdtrain: {what}: {waiting}", file=sys.stderr, flush=True)
        thread.join(timeout - REMIND)
    if not results:
        raise TimeoutError(
            f"Rank {engine.rank}: {what} has waited {timeout:g} s for {ranks_text(first)}, which runs the block "
            f"first and is not done. If the work takes longer, give it time: {what}(timeout={2 * timeout:g})."
        )
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _raise_reported(message: str, failures: list[str]) -> None:
    """Raise RuntimeError on a rank that has succeeded, if others have failed."""
    if failures:
        raise mark(RuntimeError(f"{message} {'; '.join(failures)}"), Known.REPORTED)


def _share_failures(engine: Engine, what: str, error: BaseException | None) -> list[str]:
    """Send the errors of all ranks to every rank, and return a line for each rank that has failed."""
    if engine.size == 1:
        return []
    if error is not None:
        mark(error, Known.ORIGINAL)
    engine.agree(Call(what))
    failure = None if error is None else f"{type(error).__name__}: {error}"
    everyone = engine.allgather_object(failure)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]
