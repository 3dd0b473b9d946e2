"""Let the ranks end a script together: a rank that ends with an error would otherwise stop the others early."""

import contextlib
from collections.abc import Iterator

from hvdtrain import runtime
from hvdtrain.collectives.engine import Call, MismatchError
from hvdtrain.collectives.errors import report
from hvdtrain.wrap import files


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Delay an error or `sys.exit` until all ranks have reached it or have been told about it."""
    try:
        yield
    except Exception as error:
        if runtime.is_initialized():
            report(runtime.engine(), "the script", error)
        files.remove_copies()  # a job that fails may be stopped before Python runs its exit functions
        raise
    except SystemExit as stop:
        if stop.code and runtime.is_initialized():
            with contextlib.suppress(MismatchError):
                runtime.engine().agree(Call(f"sys.exit({stop.code})", farewell=True))
        if stop.code:
            files.remove_copies()
        raise
