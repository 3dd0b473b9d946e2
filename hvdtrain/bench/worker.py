"""Run a contender's work on one rank: read requests from standard input, write answers to standard output.

    python -m hvdtrain.bench.worker hvdtrain.bench.work.mpi_allreduce

The first line holds the settings. Everything that libraries print goes to standard error.
"""

import importlib
import json
import os
import sys

from hvdtrain.bench.json_lines import pack_message


def main() -> None:
    """Prepare the work, report that it is ready, and answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    answer = importlib.import_module(sys.argv[1]).prepare(json.loads(sys.stdin.readline()))
    answers.write(pack_message({"ready": True}))
    for line in sys.stdin:
        answers.write(pack_message(answer(json.loads(line))))


if __name__ == "__main__":
    main()
