"""Losses that Keras computes from the logits behind an activation: pixels 0..255 saturate every probability."""

import json
import os

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(7)
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
x = np.random.randint(0, 256, (70, 16)).astype("float64")
classes = (x[:, :8].sum(1) > x[:, 8:].sum(1)).astype("int32")
one_hot = keras.utils.to_categorical(classes, 3).astype("float64")
words = np.random.randint(1, 9, (70, 6)) * (np.arange(6) < np.random.randint(1, 7, (70, 1)))
results = {}


FULL = os.environ.get("HVDTRAIN_TESTS") == "full"
QUICK = ("dense", "focal", "tf.nn", "judge", "named", "masked")


def learned(name, model, targets, loss, inputs=x, **compiled):
    if name not in QUICK and not FULL:
        return
    model.compile(keras.optimizers.SGD(1e-4), loss, **compiled)
    history = model.fit(inputs, targets, batch_size=20, epochs=1, verbose=0).history
    results[name] = [history, [float(ops.sum(abs(each))) for each in model.trainable_variables]]
    if "metrics" in compiled or FULL:
        results[name] += [model.evaluate(inputs, targets, batch_size=32, verbose=0, return_dict=True)]


def dense(units, activation=None):
    return layers.Dense(units, activation, kernel_initializer=keras.initializers.RandomNormal(seed=units))


class Ends(keras.Model):
    """Ends in a function, not in a layer."""

    def __init__(self, end, units=3):
        super().__init__()
        self.hidden, self.end = dense(units), end

    def call(self, inputs):
        return self.end(self.hidden(inputs))


class Steps(keras.Model):
    """Calls one model on what another returns, in a step of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.Sequential([dense(4)]), keras.Sequential([dense(3, "softmax")])

    def call(self, inputs):
        return self.second(self.first(inputs))

    def train_step(self, data):
        inputs, targets = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=targets, y_pred=self.second(self.first(inputs)))
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


class Judge(keras.Model):
    """Computes the crossentropy of probabilities that another model has returned."""

    def __init__(self):
        super().__init__()
        self.player, self.judge = keras.Sequential([dense(3, "softmax")]), Verdict()

    def call(self, inputs):
        return self.judge([one_hot_of(inputs), self.player(inputs)])

    def train_step(self, data):
        with tf.GradientTape() as tape:
            probabilities = self.player(data[0])
            loss = self.compute_loss(y_pred=self.judge([one_hot_of(data[0]), probabilities]))
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(y_pred)


class Verdict(keras.Model):
    def call(self, inputs):
        return keras.losses.categorical_crossentropy(*inputs)


def one_hot_of(inputs):
    return ops.one_hot(ops.cast(inputs[:, 0] > 99, "int32"), 3, dtype="float64")


sparse, whole, binary = "sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy"
learned("dense", keras.Sequential([dense(3, "softmax")]), classes, sparse, metrics=["accuracy", sparse])
learned("eager", keras.Sequential([dense(3, "softmax")]), classes, sparse, run_eagerly=True)
learned(
    "sigmoid", keras.Sequential([dense(1, "sigmoid")]), classes[:, None], binary, metrics=["accuracy", binary]
)
smooth = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
learned("activation", keras.Sequential([dense(3), layers.Activation("softmax")]), one_hot, smooth)
learned("focal", keras.Sequential([dense(1, "sigmoid")]), classes, keras.losses.BinaryFocalCrossentropy())
learned("several classes", keras.Sequential([dense(3, "softmax")]), one_hot, binary)
learned("keras.ops", Ends(ops.softmax), classes, sparse)
learned("tf.nn", Ends(tf.nn.softmax), classes, sparse)
learned("tf.nn, other loss", Ends(tf.nn.softmax), one_hot, binary)
learned("steps", Steps(), one_hot, whole)
learned("judge", Judge(), classes, None)

start = keras.Input((16,))
pair = {"a": dense(3, "softmax")(start), "b": dense(1, "sigmoid")(dense(2)(start))}
learned("named", keras.Model(start, pair), {"a": classes, "b": classes}, {"a": sparse, "b": binary})
nest = [pair["a"], [pair["b"], dense(4)(start)]]
learned("nest", keras.Model(start, nest), [classes, [classes, x[:, :4]]], [sparse, [binary, "mse"]])
inner = keras.Sequential([dense(4), keras.Sequential([dense(3, "softmax")])])
learned("model in a model", keras.Model(start, inner(start)), classes, sparse)

tokens = keras.Input((None,), dtype="int32")
hidden = layers.LSTM(4, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(tokens))
tagged = layers.TimeDistributed(dense(9, "softmax"))(hidden)
learned("masked", keras.Model(tokens, tagged), words, sparse, words, metrics=["accuracy"])
masked = keras.Sequential([layers.Masking(255.0), layers.LSTM(3, return_sequences=True), dense(3, "softmax")])
learned("masked rows", masked, np.stack([classes] * 4, 1), sparse, x.reshape(70, 4, 4))
keras.config.set_floatx("float32")
keras.config.set_dtype_policy("float32")
print("RESULT", json.dumps(results))
