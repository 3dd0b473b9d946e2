"""The process that does a contender's work on one rank: requests come in by stdin, answers go out by stdout.

    python -m hvdtrain.bench.worker hvdtrain.bench.work.mpi_allreduce

The first line holds the settings. What libraries print goes to stderr.
"""

import importlib
import json
import os
import sys

from hvdtrain.bench.json_lines import packed


def main() -> None:
    """Gets ready, says so, and answers each request in its turn, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    act = importlib.import_module(sys.argv[1]).prepare(json.loads(sys.stdin.readline()))
    answers.write(packed({"ready": True}))
    for line in sys.stdin:
        answers.write(packed(act(json.loads(line))))


if __name__ == "__main__":
    main()
