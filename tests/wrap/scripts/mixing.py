"""Layers that look at several rows at once, or change a state by what they see of a batch; sparse input."""

import json

import keras
import numpy as np
import scipy.sparse
from keras import layers, ops

keras.utils.set_random_seed(13)
x = np.random.rand(70, 5).astype("float32")
results = {}


def learned(name, inputs, outputs, data, *targets):
    model = keras.Model(inputs, outputs)
    model.compile("rmsprop", None if not targets else "mse")
    results[name] = model.fit(data, *targets, batch_size=20, epochs=2, shuffle=False, verbose=0).history


class Endpoint(layers.Layer):
    """Adds its own loss and keeps its own metric, as the guide to custom layers shows."""

    def __init__(self):
        super().__init__()
        self.loss, self.metric = (
            keras.losses.BinaryCrossentropy(from_logits=True),
            keras.metrics.BinaryAccuracy(),
        )

    def call(self, targets, logits):
        self.add_loss(self.loss(targets, logits))
        self.metric.update_state(targets, logits)
        return ops.softmax(logits)


class SumOfSquares(layers.Layer):
    """A penalty that grows with the number of rows."""

    def call(self, x):
        self.add_loss(0.01 * ops.sum(x**2))
        return x


class Mixup(layers.Layer):
    """Mixes each row with another while training."""

    def call(self, x, training=False):
        return 0.7 * x + 0.3 * ops.flip(x, axis=0) if training else x


class Center(layers.Layer):
    """Subtracts a moving average of what it has seen."""

    def build(self, shape):
        self.seen = self.add_weight((shape[-1],), "zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.seen.assign(0.9 * self.seen + 0.1 * ops.mean(x, axis=0))
        return x - self.seen


first, second = keras.Input((5,)), keras.Input((4,))
learned("endpoint", [first, second], Endpoint()(second, layers.Dense(4)(first)), [x, (x[:, :4] > 0.5) * 1.0])
for layer in (SumOfSquares(), Mixup(), Center(), layers.GaussianNoise(0.1), layers.AlphaDropout(0.2)):
    start = keras.Input((5,))
    hidden = layers.Dropout(0.2)(layer(layers.Dense(6, activation="relu")(start)))
    learned(layer.name, start, layers.Dense(1)(hidden), x, x.sum(1))
ones = scipy.sparse.csr_matrix((np.ones(70), (np.arange(70), np.arange(70) % 30)), dtype="float32")
sparse = keras.Input((30,), sparse=True)
learned("sparse", sparse, layers.Dense(1)(layers.Dense(4, activation="relu")(sparse)), ones, x[:, 0])
print("RESULT", json.dumps(results))
