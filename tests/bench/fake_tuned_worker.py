"""Worker for the tests of `tune`: environment variables set how long its work takes."""

import os


def prepare(settings):
    factor = 1.0
    for name, value in os.environ.items():
        if name.startswith("HVDTRAIN_TEST_FACTOR"):
            factor *= float(value)
    if {"HVDTRAIN_TEST_CLASH_1", "HVDTRAIN_TEST_CLASH_2"} <= set(os.environ):
        factor *= 3
    if "HVDTRAIN_TEST_BROKEN" in os.environ:
        raise RuntimeError("it does not start with this")
    wrong = "HVDTRAIN_TEST_WRONG" in os.environ

    def work(request):
        large = request.get("bytes", 0) > 1 << 20
        slow = float(os.environ.get("HVDTRAIN_TEST_LARGE", "1")) if large else 1.0
        return {"seconds": 0.1 * factor * slow, "right": not wrong}

    return work
