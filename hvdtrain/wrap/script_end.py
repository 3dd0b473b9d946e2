"""How a script ends: who comes to its end first waits for the others, because a rank that fails ends the job."""

import contextlib
from collections.abc import Iterator

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call, MismatchError
from hvdtrain.wrap import files


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Lets an error or `sys.exit` take effect when all ranks have come to it, or have heard of it."""
    try:
        yield
    except Exception as error:
        if runtime.is_initialized():
            runtime.engine().tell("the script", error)
        files.forget()  # a job that fails may end before Python does
        raise
    except SystemExit as stop:
        if stop.code and runtime.is_initialized():
            with contextlib.suppress(MismatchError):
                runtime.engine().agree(Call(f"sys.exit({stop.code})", farewell=True))
        if stop.code:
            files.forget()
        raise
