"""Train with a fixed global batch and seed, and compare the loss curves of different numbers of ranks.

python keras_examples/same_curve.py --save curve1.json
hvdtrain run -np 2 keras_examples/same_curve.py --save curve2.json
hvdtrain run -np 4 keras_examples/same_curve.py --save curve4.json
python keras_examples/same_curve.py --compare curve1.json curve2.json curve4.json --plot same_curve.svg
"""

import argparse
import hashlib
import json
import pathlib

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvdtrain.keras as hvd

GLOBAL_BATCH = 64  # images per step over all ranks; 1797 images are 28 full batches and one of 5


class Curve(keras.callbacks.Callback):
    """Record after each step the loss of all images of the epoch so far."""

    def on_train_begin(self, logs=None):
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        # Each rank adds the losses of its own images. In the last step some ranks have one image less than
        # others, so the mean over all images is not the mean of the ranks' means.
        loss = self.model.metrics[0]
        total, count = hvd.allreduce(np.array([loss.total, loss.count], "float64"), op=hvd.Sum)
        self.losses.append(total / count)


def train(epochs, dropout):
    """Return the loss after each step and of each epoch, and a digest of the weights."""
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    images, labels = load_digits(return_X_y=True)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    data = hvd.shard((images.astype("float32") / 16, labels), batch_size=GLOBAL_BATCH, seed=1)
    curve = Curve()
    history = model.fit(data, epochs=epochs, callbacks=hvd.callbacks.distributed([curve]), verbose=0)
    weights = b"".join(each.numpy().tobytes() for each in model.weights)
    return {
        "ranks": hvd.size(),
        "epochs": history.history["loss"],
        "steps": curve.losses,
        "weights": hashlib.sha256(weights).hexdigest()[:16],
    }


def compare(paths, plot):
    """Print the largest difference of each curve from the first, and plot all curves in one picture."""
    curves = [json.loads(path.read_text()) for path in paths]
    first = np.array(curves[0]["steps"])
    for curve in curves:
        apart = np.max(np.abs(np.array(curve["steps"]) / first - 1))
        print(
            f"{curve['ranks']} ranks | farthest from the first curve: {apart:.1e} | weights {curve['weights']}"
        )
    if plot:
        draw(curves, plot)


def draw(curves, plot):
    """Plot the curves, and below them the relative difference of each from the first."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit(
            "--plot draws with matplotlib, which is not installed. Type: pip install matplotlib"
        ) from None
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(2, 1))
    first = np.array(curves[0]["steps"])
    styles = ({"lw": 6, "alpha": 0.3}, {"lw": 2.5, "alpha": 0.7}, {"lw": 1, "ls": "--"})
    for curve, style in zip(curves, styles, strict=False):
        steps, losses = np.arange(1, len(first) + 1), np.array(curve["steps"])
        above.plot(steps, losses, label=f"{curve['ranks']} rank{'s' if curve['ranks'] > 1 else ''}", **style)
        below.semilogy(steps, np.maximum(np.abs(losses / first - 1), 1e-9), **style)
    below.axhline(1e-5, color="grey", lw=0.8)
    above.set(ylabel="loss of the epoch so far")
    above.legend()
    below.set(xlabel="step", ylabel="relative difference", ylim=(5e-10, 1e-4))
    figure.tight_layout()
    figure.savefig(plot)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.0, help="other masks on each rank; 0 for none")
    parser.add_argument("--save", type=pathlib.Path, help="a JSON file for the curve")
    parser.add_argument("--compare", nargs="+", type=pathlib.Path, help="JSON files of runs that are done")
    parser.add_argument("--plot", type=pathlib.Path, help="with --compare: a picture of the curves")
    options = parser.parse_args()
    if options.compare:
        compare(options.compare, options.plot)
        return
    hvd.init()
    result = train(options.epochs, options.dropout)
    if hvd.rank() == 0:
        print("loss of each epoch: " + " ".join(f"{loss:.7f}" for loss in result["epochs"]))
        print(f"{hvd.size()} ranks | {len(result['steps'])} steps | weights {result['weights']}")
        if options.save:
            options.save.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
