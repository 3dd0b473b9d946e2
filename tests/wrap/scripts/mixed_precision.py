"""Mixed precision: a subclassed model under mixed_float16, with a loss scale, clipping and weight decay."""

import json

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(29)
keras.mixed_precision.set_global_policy("mixed_float16")


class Network(keras.Model):
    """Two hidden layers with layer normalization between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(32, activation="relu"), layers.Dense(32, activation="relu")
        self.normalize = layers.LayerNormalization()
        self.head = layers.Dense(4, activation="softmax", dtype="float32")

    def call(self, x, training=False):
        return self.head(self.second(self.normalize(self.first(x))))


rng = np.random.default_rng(29)
x = rng.normal(size=(260, 10)).astype("float32")
y = keras.utils.to_categorical(np.abs(x[:, :4]).argmax(1), 4)
model = Network()
model.compile(
    keras.optimizers.AdamW(0.01, weight_decay=0.01, clipnorm=1.0),
    "categorical_crossentropy",
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=64, epochs=3, verbose=0)
print("RESULT", json.dumps(history.history))
keras.mixed_precision.set_global_policy("float32")
