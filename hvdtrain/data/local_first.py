"""Let one rank do work first while the others wait: downloads, caches, other work on a shared disk."""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.data.collective_errors import raise_reported, share_failures

REMIND = 60.0  # seconds after which a waiting rank prints which ranks it waits for


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
    with _first("hvd.first_on_node", lambda local_rank, rank: local_rank == 0, timeout) as mine:
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
        TimeoutError: On the waiting ranks, after `timeout` seconds. The ranks cannot communicate any more.
        RuntimeError: On every other rank, if the block failed on rank 0; its error is quoted.
        MismatchError: On every rank, if some ranks call another operation.
    """
    with _first("hvd.first_overall", lambda local_rank, rank: rank == 0, timeout) as mine:
        yield mine


@contextlib.contextmanager
def _first(what: str, is_first: Callable[[int, int], bool], timeout: float) -> Iterator[bool]:
    engine = runtime.engine()
    if engine.size == 1:
        yield True
        return
    places = engine.allgather_object((engine.world.local_rank, timeout))
    first = [rank for rank, (local_rank, _) in enumerate(places) if is_first(local_rank, rank)]
    if engine.rank not in first:
        _raise(what, _waited(engine, what, first, timeout))
        yield False
        return
    try:
        yield True
    except BaseException as error:
        share_failures(engine, what, error)
        raise
    _raise(what, share_failures(engine, what, None))


def _raise(what: str, failures: list[str]) -> None:
    raise_reported(f"{what}: the block that one rank runs for others failed on", failures)


def _waited(engine: Engine, what: str, first: list[int], timeout: float) -> list[str]:
    """Wait for the first ranks, in a separate thread because a collective has no time limit."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def wait() -> None:
        try:
            results.put((share_failures(engine, what, None), None))
        except Exception as error:
            results.put(([], error))

    threading.Thread(target=wait, name=what, daemon=True).start()
    try:
        failures, error = _received(results, engine, what, first, timeout)
    except queue.Empty:
        raise TimeoutError(
            f"Rank {engine.rank}: {what} has waited {timeout:g} s for {ranks_text(first)}, which runs the block "
            f"first and is not done. If the work takes longer, give it time: {what}(timeout={2 * timeout:g})."
        ) from None
    if error is not None:
        raise error
    return failures


def _received(results: Any, engine: Engine, what: str, first: list[int], timeout: float) -> Any:
    with contextlib.suppress(queue.Empty):
        return results.get(timeout=min(REMIND, timeout))
    if timeout <= REMIND:
        raise queue.Empty
    if engine.rank == min(set(range(engine.size)) - set(first)):
        print(
            f"hvdtrain: {what}: waiting for {ranks_text(first)} since {REMIND:g} s, for {timeout:g} s at most.",
            file=sys.stderr,
            flush=True,
        )
    return results.get(timeout=timeout - REMIND)
