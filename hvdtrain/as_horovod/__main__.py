"""Start a script with `python -m hvdtrain.as_horovod old_script.py args...`, alone or under a launcher."""

import sys
from collections.abc import Sequence

from hvdtrain import as_horovod, script, topology


def main(arguments: Sequence[str]) -> None:
    """Run a script or a module in this process, with hvdtrain in the place of Horovod.

    Args:
        arguments: `script.py args...`, or `-m module args...`.
    """
    script.check_arguments("python -m hvdtrain.as_horovod old_script.py args...", arguments)
    as_horovod.install()
    place = topology.detect()
    is_first = place is None or place.rank == 0
    script.shorten_tracebacks(lambda error: as_horovod.advice(error) if is_first else "")
    script.run(arguments)


main(sys.argv[1:])
