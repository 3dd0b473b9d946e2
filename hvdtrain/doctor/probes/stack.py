"""Import TensorFlow and Keras as a training script would, and print their versions or errors."""

import json
import os


def main() -> None:
    """Print one JSON object: versions, backend and GPUs, or the error that each import raised."""
    facts: dict[str, object] = {}
    for examine in (_tensorflow, _keras):
        try:
            facts |= examine()
        except BaseException as error:  # a broken wheel may raise anything, SystemExit too
            facts[f"{examine.__name__[1:]}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print("\n" + json.dumps(facts), flush=True)
    os._exit(0)  # skips TensorFlow's shutdown, which is slow and may print messages


def _tensorflow() -> dict[str, object]:
    import tensorflow

    facts = {"tensorflow": tensorflow.__version__}
    gpus = [gpu.name for gpu in tensorflow.config.list_physical_devices("GPU")]
    return facts | {"gpus": gpus, "cuda": bool(tensorflow.test.is_built_with_cuda())}


def _keras() -> dict[str, object]:
    import keras

    return {"keras": keras.__version__, "backend": keras.backend.backend()}


if __name__ == "__main__":
    main()
