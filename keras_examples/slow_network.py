"""Send less, or less often, and compare what is learned: the same model with each compression, LocalSGD and DiLoCo.

hvdtrain run -np 2 keras_examples/slow_network.py                                  # digits, one seed, half a minute
hvdtrain run -np 2 keras_examples/slow_network.py --ways none,topk,DiLoCo
hvdtrain run -np 2 keras_examples/slow_network.py --data text --seeds 3 --plot slow_networks.svg
"""

import argparse
import pathlib
import pydoc_data.topics

import keras
import numpy as np
from sklearn.datasets import load_digits

import hvdtrain.keras as hvd

CONTEXT = 12  # characters from which the next one is predicted
COMPRESSION = {
    "none": hvd.Compression.none,
    "int8": hvd.Compression.int8(),
    "int4": hvd.Compression.int4(),
    "signsgd": hvd.Compression.signsgd(),
    "topk": hvd.Compression.topk(),
    "randomk": hvd.Compression.randomk(),
    "powersgd": hvd.Compression.powersgd(),
}
WAYS = [*COMPRESSION, "LocalSGD", "DiLoCo"]


def digits():
    """Return images and labels of the 1797 digits of scikit-learn, and a model for them."""
    images, labels = load_digits(return_X_y=True)
    layers = [keras.layers.Dense(256, "relu"), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
    return images.astype("float32") / 16, labels, [keras.Input((64,)), *layers]


def text():
    """Return contexts and next characters of Python's own help texts, and a model for them."""
    content = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    known, codes = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
    contexts = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[::2]
    layers = [
        keras.layers.CategoryEncoding(len(known), output_mode="one_hot"),
        keras.layers.Flatten(),
        keras.layers.Dense(256, "relu"),
        keras.layers.Dense(len(known)),
    ]
    return contexts[:, :CONTEXT].astype("int32"), contexts[:, CONTEXT], [keras.Input((CONTEXT,)), *layers]


def optimizer(way, rate):
    """Return the optimizer that sends gradients or weights in one of the ways."""
    inner = keras.optimizers.SGD(rate, momentum=0.9)
    if way == "LocalSGD":
        return hvd.LocalSGD(inner, every=8)
    if way == "DiLoCo":
        # A larger step of the outer optimizer for fewer of them: an epoch of digits has 22 steps.
        return hvd.DiLoCo(inner, keras.optimizers.SGD(0.7, momentum=0.5, nesterov=True), every=8)
    return hvd.DistributedOptimizer(inner, compression=COMPRESSION[way])


def train(way, seed, options):
    """Return the validation loss of each epoch and the accuracy on the samples left out."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    x, y, layers = {"digits": digits, "text": text}[options.data]()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    kept = len(x) // 5
    model = keras.Sequential(layers)
    model.compile(
        optimizer=optimizer(way, options.rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        hvd.shard((x[kept:], y[kept:]), batch_size=options.batch, seed=seed),
        validation_data=hvd.shard((x[:kept], y[:kept]), batch_size=1024, shuffle=False),
        epochs=options.epochs,
        callbacks=hvd.callbacks.distributed(),
        verbose=0,
    ).history
    return history["val_loss"], history["val_accuracy"][-1]


def draw(curves, path):
    """Plot the mean validation loss of each way over the epochs."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (way, losses) in enumerate(curves.items()):
        mean = np.mean(losses, axis=0)
        style = (
            {"lw": 4, "alpha": 0.4, "color": "black"} if way == "none" else {"ls": ("-", "--")[number % 2]}
        )
        axes.plot(np.arange(1, len(mean) + 1), mean, label=way, **style)
    axes.set(xlabel="epoch", ylabel="validation loss")
    axes.legend(ncols=3)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "text"], default="digits")
    parser.add_argument("--ways", default=",".join(WAYS), help="separated by commas: " + ", ".join(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="samples of a step over all ranks")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    parser.add_argument("--plot", type=pathlib.Path, help="a picture of the curves; needs matplotlib")
    options = parser.parse_args()
    unknown = set(options.ways.split(",")) - set(WAYS)
    if unknown:
        parser.error(f"--ways takes {', '.join(WAYS)}. Received: {', '.join(sorted(unknown))}.")
    hvd.init()
    curves = {}
    for way in options.ways.split(","):
        results = [train(way, seed, options) for seed in range(options.seeds)]
        curves[way] = [losses for losses, _ in results]
        accuracies = [accuracy for _, accuracy in results]
        if hvd.rank() == 0:
            print(
                f"{way:8} | accuracy {np.mean(accuracies):.1%} ({min(accuracies):.1%} to {max(accuracies):.1%})",
                flush=True,
            )
    if options.plot and hvd.rank() == 0:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
