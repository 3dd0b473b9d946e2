"""Train one model on handwritten digits on all ranks, and check that all ranks hold the same weights.

hvdtrain run -np 4 keras_examples/digits_cnn.py
horovodrun -np 4 python keras_examples/digits_cnn.py
python keras_examples/digits_cnn.py            # the same script on one process
"""

import argparse
import time
import zlib

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvdtrain.keras as hvd
from hvdtrain import runtime

TEST_IMAGES = 360


def load(rank, size):
    """Return this rank's share of the training images, and all test images (scikit-learn ships 1797)."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8, 1).astype("float32") / 16, labels[order]
    train = slice(TEST_IMAGES, None)
    # Equal shares, so that all ranks take the same number of steps.
    share = (len(images) - TEST_IMAGES) // size
    mine = slice(rank * share, (rank + 1) * share)
    return (images[train][mine], labels[train][mine]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def build():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--global-batch", type=int, default=64, help="images a step over all ranks")
    options = parser.parse_args()

    hvd.init()
    if options.global_batch % hvd.size():
        parser.error(f"--global-batch {options.global_batch} must divide by the {hvd.size()} ranks")
    keras.utils.set_random_seed(hvd.rank())  # dropout differs between ranks; the callback makes weights equal
    (x_train, y_train), (x_test, y_test) = load(hvd.rank(), hvd.size())

    model = build()
    model.compile(
        optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(2e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    started = time.perf_counter()
    model.fit(
        x_train,
        y_train,
        batch_size=options.global_batch // hvd.size(),
        epochs=options.epochs,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
        ],
        verbose=2 if hvd.rank() == 0 else 0,
    )
    seconds = time.perf_counter() - started
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)

    digests = hvd.allgather_object(zlib.crc32(b"".join(weight.numpy().tobytes() for weight in model.weights)))
    seen = int(hvd.allreduce(len(x_train) * options.epochs, op=hvd.Sum))
    if hvd.rank() == 0:
        same = "weights identical on all ranks" if len(set(digests)) == 1 else "WEIGHTS DIFFER BETWEEN RANKS"
        print(
            f"\nengine {runtime.engine().name} | {hvd.size()} ranks | global batch {options.global_batch} | "
            f"{seen / seconds:.0f} images/s | test accuracy {accuracy:.1%} | {same}"
        )
    if len(set(digests)) > 1:
        raise SystemExit(f"rank {hvd.rank()}: the ranks ended with different weights")


if __name__ == "__main__":
    main()
