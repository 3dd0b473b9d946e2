"""An error on one rank becomes known to the others, at whatever they do next."""

import contextlib
from collections.abc import Iterator

from hvdtrain.collectives.engine import Engine
from hvdtrain.keras.elastic.events import HorovodInternalError, HostsUpdatedInterrupt


@contextlib.contextmanager
def telling(
    engine: Engine, what: str, kinds: tuple[type[BaseException], ...] = (Exception, SystemExit)
) -> Iterator[None]:
    """Let all other ranks know why this one does not come, if the block raises.

    Args:
        engine: The ranks. Their next operation raises `MismatchError` with the error's text.
        what: What is done in the block, for the message.
        kinds: Of which errors they are told.
    """
    try:
        yield
    except (HorovodInternalError, HostsUpdatedInterrupt):
        raise  # the business of hvd.elastic, which tells the others itself
    except kinds as error:
        engine.tell(what, error)
        raise
