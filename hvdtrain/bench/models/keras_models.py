"""Build the models in Keras 3 or tf_keras."""

from typing import Any

from hvdtrain.bench.models.workloads import BLOCKS, HEADS, WIDTH, WORKLOADS


def build(keras: Any, name: str) -> Any:
    """Build one of the models, without an optimizer; its weights depend on the current random seed.

    Args:
        keras: The module `keras` or `tf_keras`.
        name: One of `WORKLOADS`.
    """
    makers = {"resnet20": _resnet20, "cnn": _cnn, "mlp": _mlp, "vgg": _vgg, "transformer": _transformer}
    workload = WORKLOADS[name]
    inputs = keras.Input(workload.shape, dtype="int32" if workload.is_text else "float32")
    features = makers[name](keras, inputs)
    return keras.Model(inputs, keras.layers.Dense(workload.classes)(features), name=name)


def compiled(keras: Any, name: str, wrap: Any = lambda optimizer: optimizer, xla: bool = False) -> Any:
    """Build and compile one of the models.

    Args:
        keras: The module `keras` or `tf_keras`.
        name: One of `WORKLOADS`.
        wrap: Returns the distributed form of the optimizer.
        xla: Whether XLA compiles the step.
    """
    workload = WORKLOADS[name]
    optimizers = keras.optimizers
    optimizer = optimizers.Adam(workload.rate) if workload.adam else optimizers.SGD(workload.rate, 0.9)
    model = build(keras, name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(wrap(optimizer), loss, **({"jit_compile": True} if xla else {}))
    return model


def _resnet20(keras: Any, x: Any) -> Any:
    """ResNet-20 as for CIFAR-10: three stages of three blocks, 0.27 million parameters."""
    x = _normalized(keras, x, 16)
    for filters in (16, 32, 64):
        for block in range(3):
            x = _residual(keras, x, filters, 2 if filters > 16 and block == 0 else 1)
    return keras.layers.GlobalAveragePooling2D()(x)


def _residual(keras: Any, x: Any, filters: int, strides: int) -> Any:
    layers = keras.layers
    y = _normalized(keras, x, filters, strides)
    y = _normalized(keras, y, filters, activation=None)
    if strides > 1:
        x = layers.Conv2D(filters, 1, strides=strides, use_bias=False)(x)
    return layers.ReLU()(layers.Add()([x, y]))


def _normalized(keras: Any, x: Any, filters: int, strides: int = 1, activation: str | None = "relu") -> Any:
    layers = keras.layers
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x) if activation else x


def _cnn(keras: Any, x: Any) -> Any:
    """Two convolutions and one wide layer: 6.4 million parameters, nearly all of them in that layer."""
    layers = keras.layers
    for filters in (48, 64):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    return layers.Dense(1552, activation="relu")(layers.Flatten()(x))


def _mlp(keras: Any, x: Any) -> Any:
    """Four wide layers: 14.7 million parameters and little computing for each."""
    for _ in range(4):
        x = keras.layers.Dense(2048, activation="relu")(x)
    return x


def _vgg(keras: Any, x: Any) -> Any:
    """VGG-16 as for CIFAR-10: thirteen convolutions, 14.7 million parameters."""
    for filters, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x = _normalized(keras, x, filters)
        x = keras.layers.MaxPooling2D()(x)
    return keras.layers.Flatten()(x)


def _transformer(keras: Any, x: Any) -> Any:
    """A causal language model: 10 million parameters, 2.3 of them in an embedding with sparse gradients."""
    layers, workload = keras.layers, WORKLOADS["transformer"]
    x = _positions(keras)(layers.Embedding(workload.classes, WIDTH)(x))
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.Dense(4 * WIDTH, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    return layers.LayerNormalization()(x)


def _positions(keras: Any) -> Any:
    """Return the layer that adds a learned embedding of its position to each token."""

    class Positions(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(name="table", shape=tuple(shape[1:]), initializer="uniform")

        def call(self, x: Any) -> Any:
            return x + self.table

    return Positions()
