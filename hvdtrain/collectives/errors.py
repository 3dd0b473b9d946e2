"""Share errors between ranks, and remember which errors all ranks know."""

import contextlib
import enum
from typing import TYPE_CHECKING, TypeVar

from hvdtrain.collectives.agreement import Call

if TYPE_CHECKING:
    from hvdtrain.collectives.engine import Engine

Error = TypeVar("Error", bound=BaseException)

_MOST_CHARACTERS = 600  # characters of an error that are sent to the other ranks


class MismatchError(ValueError):
    """The ranks request different operations. Raised on every rank, with the same explanation."""


class HorovodInternalError(RuntimeError):
    """Raised inside a function under `elastic.run`: all ranks restore the last commit and run it again."""


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818 - the name is Horovod's
    """Raised inside a function under `elastic.run`: it is run again with the current state, without restoring.

    Args:
        skip_sync: True to skip the synchronisation before the run.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__(skip_sync)
        self.skip_sync = skip_sync


class Known(enum.Enum):
    """State of an error that is already known on all ranks."""

    ORIGINAL = "raised by the work of this rank"
    REPORTED = "raised because another rank has failed"


def mark(error: Error, known: Known) -> Error:
    """Mark an error as known on all ranks; one that only reports another rank's must not end the job first."""
    error.hvdtrain_known = known  # type: ignore[attr-defined]
    return error


def known(error: BaseException) -> Known | None:
    """Return the mark that `mark` has set, or None for an error that only this rank knows."""
    return getattr(error, "hvdtrain_known", None)


def original(engine: "Engine", error: BaseException) -> BaseException:
    """Return the error of an engine that TensorFlow has replaced by `error`, or `error` itself."""
    hidden = engine.last_error
    # TensorFlow passes on nothing but the text, with other text before and after it.
    return hidden if hidden is not None and str(hidden) in str(error) else error


def report(engine: "Engine", what: str, error: BaseException) -> None:
    """Report an error of this rank to all other ranks, at their next operation.

    They get a `MismatchError` that quotes the error. An error that all ranks know already is not reported.

    Args:
        engine: The ranks.
        what: The function that raised the error.
        error: The error, which the caller raises.
    """
    first = original(engine, error)
    if engine.size == 1 or isinstance(first, MismatchError) or known(first) is not None:
        return
    mark(error, Known.ORIGINAL)
    text = " ".join(str(error).split())
    if len(text) > _MOST_CHARACTERS:  # TensorFlow puts the cause behind a long stack
        text = f"{text[: _MOST_CHARACTERS // 3]} … {text[-_MOST_CHARACTERS * 2 // 3 :]}"
    with contextlib.suppress(MismatchError):
        engine.agree(Call(f"{what} raised {type(error).__name__}: {text}", farewell=True))
