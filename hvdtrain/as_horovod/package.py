"""What `import horovod` itself offers."""

from typing import Any, NoReturn

# The version whose interface hvdtrain has.
__version__ = "0.28.1"


def run(func: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Says how ranks are started here, in place of Horovod's launcher inside a script."""
    raise NotImplementedError(
        "horovod.run starts ranks from inside a script, which hvdtrain does not do. Put the function into a script "
        "that calls it, and type: hvdtrain run --as-horovod -np 4 script.py"
    )


__all__ = ["run"]
