"""Provide data, model and the last line of output for the scripts in this folder; Horovod is not used here."""

import argparse
import zlib

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

TEST_IMAGES = 360


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--samples", type=int, default=1437, help="number of training images on all ranks together"
    )
    return parser.parse_args()


def load(rank, size, samples):
    """Return a rank's share of the training images, and all test images (scikit-learn contains 1797 images)."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8, 1).astype("float32") / 16, labels[order].astype("int64")
    # Equal shares, so that all ranks make the same number of steps.
    share = min(samples, len(images) - TEST_IMAGES) // size
    mine = slice(TEST_IMAGES + rank * share, TEST_IMAGES + (rank + 1) * share)
    return (images[mine], labels[mine]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def build(filters=32):
    return tf.keras.Sequential(
        [
            tf.keras.Input((8, 8, 1)),
            tf.keras.layers.Conv2D(filters, 3, activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dropout(0.2),
            tf.keras.layers.Dense(10, activation="softmax"),
        ]
    )


def accuracy(model, images, labels):
    return float(np.mean(np.argmax(model(images, training=False), axis=-1) == labels))


def checksum(model):
    """Return an array with one number, which differs between models that differ in a single bit."""
    return np.array([zlib.crc32(b"".join(weight.numpy().tobytes() for weight in model.weights))], "int64")


def closing_line(accuracy, checksums):
    """Return a line with the test accuracy and the number of ranks that hold the same weights as the first."""
    every = np.asarray(checksums).tolist()
    return (
        f"test accuracy {accuracy:.1%} | weights identical on {every.count(every[0])} of {len(every)} ranks"
    )
