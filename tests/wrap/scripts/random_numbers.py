"""Random numbers of every kind, drawn before, within and after a training whose model is tried first."""

import json
import random

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

tf.random.set_seed(None)  # whatever ran before
again = tf.random.uniform((2,), seed=5)  # the kernel of this draw is kept, and goes on below
order = [int(each) for each in tf.data.Dataset.range(9).shuffle(9, seed=1)]
keras.utils.set_random_seed(11)
x = np.random.normal(size=(40, 3)).astype("float32")
numpys, tensorflows = np.random.default_rng(1), tf.random.Generator.from_seed(2)


class Noise(layers.Layer):
    """Adds the same number to all rows, from every source of random numbers, and different ones to each row."""

    def call(self, inputs, training=False):
        of_all = random.random() + np.random.rand() + numpys.random()
        of_all += tensorflows.uniform(()) + tf.random.uniform((), seed=5) + keras.random.uniform(())
        return inputs + ops.cast(of_all, inputs.dtype) + 0.1 * tf.random.normal(tf.shape(inputs))


class Sampling(layers.Layer):
    """Of a variational autoencoder."""

    def call(self, inputs):
        return inputs + tf.random.normal(shape=tf.shape(inputs)) * keras.random.normal((3,))


def learned(layer, name=None, **compiled):
    start = layers.Dense(3, kernel_initializer="ones", bias_initializer="zeros")
    model = keras.Sequential([start, layer, layers.Dense(1, kernel_initializer="ones")], name=name)
    model.compile(keras.optimizers.SGD(1e-3), "mse", **compiled)
    history = model.fit(x, x.sum(1), batch_size=8, epochs=1, shuffle=False, verbose=0).history
    return [history["loss"], [float(ops.sum(each)) for each in model.trainable_variables]]


results = {
    "graph": learned(Sampling(), "whole_sampling"),
    "noise": learned(Noise()),
    "eager": learned(Noise(), run_eagerly=True),
}
results["order"] = order
results["after"] = [
    random.random(),
    float(np.random.rand()),
    numpys.random(),
    float(tensorflows.uniform(())),
    float(keras.random.uniform(())),
    float(tf.random.normal(())),
    *map(float, again),
    float(tf.random.uniform((), seed=5)),
    *map(float, tf.random.uniform((2,), seed=5)),
]
print("RESULT", json.dumps(results))
