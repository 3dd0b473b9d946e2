"""Define five models: their data and optimizer, the same in every framework, and their layers in Keras."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCHES = 4  # different batches, used in turn
WIDTH, HEADS, BLOCKS = 384, 6, 3  # of the transformer


@dataclass(frozen=True)
class Workload:
    """One model's data and optimizer."""

    shape: tuple[
        int, ...
    ]  # of a sample: (height, width, channels) of an image, (length,) of a text or vector
    classes: int = 10  # of an image, or tokens of the vocabulary
    batch: int = 64  # default number of samples for each rank and step
    rate: float = 0.01  # the learning rate
    adam: bool = False  # otherwise the optimizer is SGD with a momentum of 0.9

    @property
    def is_text(self) -> bool:
        """Whether a sample is a sequence of tokens; the label of each token is the next token."""
        return len(self.shape) == 1 and self.classes > 1000

    @property
    def unit(self) -> str:
        """The unit of throughput."""
        return "tokens" if self.is_text else "images"

    @property
    def units(self) -> int:
        """Number of units in a sample."""
        return self.shape[0] if self.is_text else 1

    def batches(self, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield inputs of shape `(size, *shape)`, float32 or int32 for text, and int32 labels, of one rank."""
        rng = np.random.default_rng(seed)
        for _ in range(BATCHES):
            if self.is_text:
                text = rng.integers(self.classes, size=(size, self.shape[0] + 1))
                yield text[:, :-1].astype("int32"), text[:, 1:].astype("int32")
            else:
                pixels = rng.normal(size=(size, *self.shape)).astype("float32")
                yield pixels, rng.integers(self.classes, size=size).astype("int32")


WORKLOADS = {
    "resnet20": Workload((32, 32, 3)),
    "cnn": Workload((32, 32, 3)),
    "mlp": Workload((1024,)),
    "vgg": Workload((32, 32, 3), batch=16),
    "transformer": Workload((64,), classes=6_000, batch=8, rate=1e-3, adam=True),
}


def build(keras: Any, name: str) -> Any:
    """Build one of `WORKLOADS` in `keras` or `tf_keras`; its weights depend on the current random seed."""
    makers = {"resnet20": _resnet20, "cnn": _cnn, "mlp": _mlp, "vgg": _vgg, "transformer": _transformer}
    workload = WORKLOADS[name]
    inputs = keras.Input(workload.shape, dtype="int32" if workload.is_text else "float32")
    features = makers[name](keras.layers, inputs)
    return keras.Model(inputs, keras.layers.Dense(workload.classes)(features), name=name)


def compiled(keras: Any, name: str, wrap: Callable[[Any], Any] | None = None, xla: bool = False) -> Any:
    """Build and compile one of `WORKLOADS`; `wrap` returns the distributed form of the optimizer."""
    workload = WORKLOADS[name]
    optimizers = keras.optimizers
    optimizer = optimizers.Adam(workload.rate) if workload.adam else optimizers.SGD(workload.rate, 0.9)
    model = build(keras, name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(wrap(optimizer) if wrap else optimizer, loss, **({"jit_compile": True} if xla else {}))
    return model


def _resnet20(layers: Any, x: Any) -> Any:
    """ResNet-20 as for CIFAR-10: three stages of three blocks, 0.27 million parameters."""
    x = _normalized(layers, x, 16)
    for filters in (16, 32, 64):
        for block in range(3):
            x = _residual(layers, x, filters, 2 if filters > 16 and block == 0 else 1)
    return layers.GlobalAveragePooling2D()(x)


def _residual(layers: Any, x: Any, filters: int, strides: int) -> Any:
    y = _normalized(layers, x, filters, strides)
    y = _normalized(layers, y, filters, relu=False)
    if strides > 1:
        x = layers.Conv2D(filters, 1, strides=strides, use_bias=False)(x)
    return layers.ReLU()(layers.Add()([x, y]))


def _normalized(layers: Any, x: Any, filters: int, strides: int = 1, relu: bool = True) -> Any:
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x) if relu else x


def _cnn(layers: Any, x: Any) -> Any:
    """Two convolutions and one wide layer: 6.4 million parameters, nearly all of them in that layer."""
    for filters in (48, 64):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    return layers.Dense(1552, activation="relu")(layers.Flatten()(x))


def _mlp(layers: Any, x: Any) -> Any:
    """Four wide layers: 14.7 million parameters and little computing for each."""
    for _ in range(4):
        x = layers.Dense(2048, activation="relu")(x)
    return x


def _vgg(layers: Any, x: Any) -> Any:
    """VGG-16 as for CIFAR-10: thirteen convolutions, 14.7 million parameters."""
    for filters, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x = _normalized(layers, x, filters)
        x = layers.MaxPooling2D()(x)
    return layers.Flatten()(x)


def _transformer(layers: Any, x: Any) -> Any:
    """A causal language model: 10 million parameters, 2.3 of them in an embedding with sparse gradients."""
    x = _positions(layers)(layers.Embedding(WORKLOADS["transformer"].classes, WIDTH)(x))
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.Dense(4 * WIDTH, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    return layers.LayerNormalization()(x)


def _positions(layers: Any) -> Any:
    """Return the layer that adds a learned embedding of its position to each token."""

    class Positions(layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(name="table", shape=tuple(shape[1:]), initializer="uniform")

        def call(self, x: Any) -> Any:
            return x + self.table

    return Positions()
