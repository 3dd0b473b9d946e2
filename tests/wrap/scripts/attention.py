"""A small transformer for sequences, fed by a generator, with a loss over what is not padding."""

import json

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

keras.utils.set_random_seed(31)


def batches():
    rng = np.random.default_rng(31)
    while True:
        tokens = rng.integers(1, 20, (24, 9))
        for row, length in enumerate(rng.integers(3, 10, 24)):
            tokens[row, length:] = 0
        yield tokens, np.roll(tokens, 1, axis=1)


def masked_loss(y_true, y_pred):
    loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    mask = ops.cast(ops.not_equal(y_true, 0), loss.dtype)
    return ops.sum(loss * mask) / ops.sum(mask)


class Positions(layers.Layer):
    """Adds an embedding of each place to the embedding of the token."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = layers.Embedding(20, 16, mask_zero=True), layers.Embedding(9, 16)

    def call(self, x):
        return self.tokens(x) + self.places(ops.arange(ops.shape(x)[-1]))

    def compute_mask(self, x, mask=None):
        return self.tokens.compute_mask(x)


inputs = keras.Input((9,), dtype="int64")
x = Positions()(inputs)
attended = layers.MultiHeadAttention(2, 8, dropout=0.0)(x, x)
x = layers.LayerNormalization()(x + attended)
model = keras.Model(inputs, layers.Dense(20)(x))
model.compile(
    keras.optimizers.Adam(0.01),
    masked_loss,
    metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
)
history = model.fit(batches(), steps_per_epoch=4, epochs=3, verbose=0)
scores = model.evaluate(batches(), steps=3, verbose=0)
predicted = model.predict(next(batches())[0], verbose=0)
print(
    "RESULT", json.dumps({**history.history, "scores": scores, "predicted": float(tf.reduce_sum(predicted))})
)
