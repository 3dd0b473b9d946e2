"""Send an error on one rank to the others, which raise it at their next operation."""

import contextlib
from collections.abc import Iterator

from hvdtrain.collectives.engine import Engine
from hvdtrain.collectives.errors import report
from hvdtrain.keras.elastic.state import HorovodInternalError, HostsUpdatedInterrupt


@contextlib.contextmanager
def telling(
    engine: Engine, what: str, kinds: tuple[type[BaseException], ...] = (Exception, SystemExit)
) -> Iterator[None]:
    """Send the error to all other ranks if the block raises one.

    Args:
        engine: The ranks. Their next operation raises `MismatchError` with the error's text.
        what: Name of the work in the block, for the message.
        kinds: Classes of errors that are sent.
    """
    try:
        yield
    except (HorovodInternalError, HostsUpdatedInterrupt):
        raise  # hvd.elastic informs the other ranks itself
    except kinds as error:
        report(engine, what, error)
        raise
