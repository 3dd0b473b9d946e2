"""Worker for the tests of `bench step`: its model is one array, and it fails in the ways that models fail."""

import json
import os
from pathlib import Path

import numpy as np

from hvdtrain.bench.worker import StepWorker


def prepare(settings):
    rank = settings["rank"]
    weights = [np.zeros(1000, np.float32)]
    if settings.get("differs") == rank:
        weights[0][-1] = 1e-7
    diary = Path(settings["diary"])

    def run(batch, steps):
        with diary.open("a") as file:
            print(json.dumps([settings["name"], rank, batch, steps]), file=file)
        if settings.get("fails at") == batch:
            raise RuntimeError("out of something")
        return float("nan") if settings.get("diverges") else 1.0

    assert os.environ.get("RANK") == (None if settings["name"] == "alone" else str(rank))
    return StepWorker(run, lambda: weights, rank)
