"""Divide the images over ranks with `hvd.shard`: the same losses on 1, 2 and 4 ranks.

hvdtrain run -np 4 keras_examples/sharded_digits.py
python keras_examples/sharded_digits.py        # the same script on one process prints the same numbers
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvdtrain.keras as hvd

TEST_IMAGES = 360
GLOBAL_BATCH = 64  # images per step over all ranks; 1437 images are 22 full batches and one of 29


def load():
    """Return all images on every rank; hvd.shard then gives each rank its part."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].astype("float32") / 16, labels[order]
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def main():
    hvd.init()
    keras.utils.set_random_seed(0)
    with hvd.first_on_node():  # one rank of each host downloads, then the others read the same files
        train, (x_test, y_test) = load()

    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(3e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    data = hvd.shard(train, batch_size=GLOBAL_BATCH, seed=1)
    history = model.fit(  # no batch_size: the data has its own
        data,
        epochs=8,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
        ],
        verbose=0,
    )
    accuracy = np.mean(model.predict(x_test, verbose=0).argmax(-1) == y_test)

    seen = [label for _, labels, weight in data for label in labels[weight > 0]]
    everyone = hvd.allgather_object(len(seen))
    if hvd.rank() == 0:
        print("loss of each epoch: " + " ".join(f"{loss:.4f}" for loss in history.history["loss"]))
        print(f"{hvd.size()} ranks | {len(data)} steps | {sum(everyone)} images an epoch: {everyone}")
        print(f"test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
