"""Start Python without the working directory in `sys.path`, as `python -P` does from Python 3.11 on.

`python -c` and `python -m` search the working directory before Python's own library: a file `json.py` or `token.py`
there would be imported by whatever starts in that folder. `python script.py` searches the script's folder instead.
"""

import sys
from itertools import pairwise
from pathlib import Path

# `-c` puts "" into the path. Only `sys` can be imported safely before it is removed: it is compiled into Python.
_CLEAN_PATH = "import sys; sys.path[:] = filter(None, sys.path); "


def code(text: str) -> list[str]:
    """Return the options with which Python runs `text`, as `-c` does."""
    return ["-c", _CLEAN_PATH + text]


def main_of(module: str) -> list[str]:
    """Return the options with which Python calls `main()` of a module and exits with its return value."""
    return code(f"from {module} import main; sys.exit(main())")


def leave_working_directory() -> None:
    """Remove the working directory that `python -m hvdtrain.…` has put first into `sys.path`."""
    words = sys.orig_argv
    ours = any(word == "-m" and name.startswith("hvdtrain.") for word, name in pairwise(words))
    if ours and sys.path[:1] == [str(Path.cwd())]:
        del sys.path[0]
