"""Losses that layers add: Keras sums them all, whatever their shape; some are means over rows, some sums."""

import json
import os

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(7)
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
x = np.random.normal(size=(70, 5))
results = {}


def dense(units, *args, **kwargs):
    return layers.Dense(
        units, *args, kernel_initializer=keras.initializers.RandomNormal(seed=units), **kwargs
    )


class Adds(layers.Layer):
    """Adds what a function makes of its input."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        self.add_loss(self.function(inputs))
        return inputs


class Penalized(layers.Layer):
    """Adds a loss of its weight, and holds a layer that adds one of rows."""

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), "ones")
        self.inner = Adds(lambda made: [ops.sum(made**2), ops.mean(made)])

    def call(self, inputs):
        self.add_loss(0.1 * ops.sum(self.scale**2))
        return self.inner(inputs) * self.scale


class Variational(keras.Model):
    """Encodes and decodes in a step of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([dense(4), Adds(divergence), layers.Dropout(0.3, seed=3)])
        self.decoder = keras.Sequential([dense(5, activity_regularizer="l2")])

    def call(self, inputs):
        return self.decoder(self.encoder(inputs))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            made = self.decoder(self.encoder(data[0], training=True), training=True)
            loss = ops.mean(ops.square(made - data[0])) + sum(map(ops.sum, self.losses))
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss, "added": ops.mean(self.losses[0])}


class Total(keras.Model):
    """Returns its loss, which is a sum."""

    def __init__(self):
        super().__init__()
        self.hidden = dense(3)

    def call(self, inputs):
        return ops.sum(self.hidden(inputs) ** 2)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred


def divergence(made):
    return -0.5 * ops.sum(1 + made - made**2 - ops.exp(made), axis=-1)


FULL = os.environ.get("HVDTRAIN_TESTS") == "full"
QUICK = ("mean", "sum", "several", "penalized", "variational", "whole_mixed")


def learned(name, model, loss="mse", **compiled):
    if name not in QUICK and not FULL:
        return
    model.compile(keras.optimizers.SGD(1e-4), loss, **compiled)
    history = model.fit(x, x[:, :3], batch_size=20, epochs=1, verbose=0).history
    results[name] = [history, [float(ops.sum(abs(each))) for each in model.trainable_variables]]
    if FULL or name in ("mean", "sum", "penalized", "total", "whole_spread"):
        results[name] += [model.evaluate(x, x[:, :3], batch_size=32, verbose=0)]


def of_rows(name, function, **compiled):
    model = keras.Sequential([dense(4), Adds(function), dense(3)], name=name)
    learned(name, model, **compiled)


of_rows("mean", lambda made: ops.mean(made**2))
of_rows("sum", lambda made: ops.sum(made**2))
of_rows("of_each_row", lambda made: ops.mean(made**2, axis=-1))
of_rows("of_each_number", ops.abs)
of_rows("mean_of_features", lambda made: ops.mean(made**2, axis=0))
of_rows("several", lambda made: {"a": ops.sum(made), "b": [ops.mean(made), made[:, 0] ** 2]})
of_rows("counted", lambda made: ops.sum(ops.cast(made > 0, "int32")))
of_rows("large_only", lambda made: ops.mean(ops.relu(made - 0.4)))
of_rows("eager", lambda made: ops.sum(made**2, axis=-1), run_eagerly=True)
penalized = keras.Sequential(
    [dense(4, kernel_regularizer="l2", activity_regularizer="l1"), Penalized(), dense(3)]
)
learned("penalized", penalized)
shared, start = Adds(ops.square), keras.Input((5,))
inner = keras.Sequential([dense(4, activity_regularizer="l2"), shared])
learned("twice", keras.Model(start, dense(3)(shared(inner(start)))))
learned("variational", Variational(), None)
learned("total", Total(), None)
# These need whole batches.
of_rows("whole_abs_of_mean", lambda made: ops.abs(ops.mean(made)))
of_rows("whole_spread", lambda made: ops.std(made, axis=0))
of_rows("whole_limit", lambda made: ops.relu(ops.mean(made) - 0.05))
of_rows("whole_zero", lambda made: 0.0 * ops.sum(made))
of_rows("whole_mixed", lambda made: ops.mean(made**2) + ops.sum(made**2))
keras.config.set_floatx("float32")
keras.config.set_dtype_policy("float32")
print("RESULT", json.dumps(results))
