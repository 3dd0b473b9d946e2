"""Names of the module `horovod` itself."""

from typing import Any, NoReturn

__all__ = ["run"]

__version__ = "0.28.1"  # the version of Horovod whose interface hvdtrain has


def run(func: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise an error that names the command for starting ranks: hvdtrain cannot start them inside a script."""
    raise NotImplementedError(
        "horovod.run starts ranks from inside a script, which hvdtrain does not do. Put the function into a script "
        "that calls it, and type: hvdtrain run --as-horovod -np 4 script.py"
    )
