"""Contrastive learning: the loss compares every sample of a batch with every other, after normalization."""

import json

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(41)
rng = np.random.default_rng(41)
left = rng.normal(size=(128, 6)).astype("float32")
right = left @ rng.normal(size=(6, 5)).astype("float32")


class TwoTowers(keras.Model):
    """Learns that rows of the same number belong together."""

    def __init__(self):
        super().__init__()
        self.left = keras.Sequential(
            [layers.Dense(8, activation="relu"), layers.BatchNormalization(), layers.Dense(4)]
        )
        self.right = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(4)])

    def call(self, inputs):
        return self.left(inputs[0]), self.right(inputs[1])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        first, second = (ops.normalize(each) for each in y_pred)
        logits = ops.matmul(first, ops.transpose(second)) * 5.0
        labels = ops.arange(ops.shape(logits)[0])
        return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))


model = TwoTowers()
model.compile(keras.optimizers.Adam(0.02))
history = model.fit((left, right), epochs=3, batch_size=32, verbose=0)
print("RESULT", json.dumps(history.history))
