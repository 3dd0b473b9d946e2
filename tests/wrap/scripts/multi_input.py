"""Two inputs, two outputs with losses and metrics of their own, a custom metric, fed by a PyDataset."""

import json
import math

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(17)


class Batches(keras.utils.PyDataset):
    """Batches of a picture and a word each, for a class and a number."""

    def __init__(self, count, size, **kwargs):
        super().__init__(**kwargs)
        rng = np.random.default_rng(count)
        self.pictures = rng.random((count, 6, 6, 1)).astype("float32")
        self.words = rng.integers(0, 9, (count, 3))
        self.size = size

    def __len__(self):
        return math.ceil(len(self.words) / self.size)

    def __getitem__(self, index):
        rows = slice(index * self.size, (index + 1) * self.size)
        pictures, words = self.pictures[rows], self.words[rows]
        targets = {"kind": words.sum(1) % 3, "bright": pictures.mean((1, 2, 3))}
        return {"picture": pictures, "words": words}, targets


class Spread(keras.metrics.Metric):
    """Largest less smallest prediction of an epoch, whose state is not a sum."""

    def __init__(self, name="spread", **kwargs):
        super().__init__(name=name, **kwargs)
        self.low = self.add_variable((), lambda shape, dtype: ops.full(shape, 1e9, dtype), name="low")
        self.high = self.add_variable((), lambda shape, dtype: ops.full(shape, -1e9, dtype), name="high")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.low.assign(ops.minimum(self.low, ops.min(y_pred)))
        self.high.assign(ops.maximum(self.high, ops.max(y_pred)))

    def result(self):
        return self.high - self.low


picture, words = keras.Input((6, 6, 1), name="picture"), keras.Input((3,), dtype="int32", name="words")
joined = layers.concatenate(
    [
        layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(picture)),
        layers.Flatten()(layers.Embedding(9, 4)(words)),
    ]
)
hidden = layers.Dense(16, activation="relu", kernel_regularizer="l2")(joined)
model = keras.Model(
    [picture, words],
    {
        "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
        "bright": layers.Dense(1, name="bright")(hidden),
    },
)
model.compile(
    "adam",
    loss={"kind": "sparse_categorical_crossentropy", "bright": "mse"},
    loss_weights={"kind": 1.0, "bright": 5.0},
    metrics={"kind": ["accuracy"], "bright": ["mae", Spread()]},
)
history = model.fit(Batches(110, 30), epochs=3, validation_data=Batches(47, 20), shuffle=False, verbose=0)
predicted = model.predict(Batches(47, 20), verbose=0)
print(
    "RESULT",
    json.dumps(
        {**history.history, "kind": predicted["kind"].sum(0).tolist(), "rows": len(predicted["bright"])}
    ),
)
