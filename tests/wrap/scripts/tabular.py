"""Structured data: feature dictionaries, preprocessing layers, class weights, callbacks that decide."""

import json

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(42)
rng = np.random.default_rng(42)
samples = 330
table = {
    "age": rng.integers(20, 80, samples).astype("float32"),
    "pressure": rng.normal(120, 15, samples).astype("float32"),
    "kind": rng.choice(["a", "b", "c"], samples),
}
target = ((table["age"] > 60) | (table["kind"] == "c")).astype("int32")

inputs = {
    "age": keras.Input((1,), name="age"),
    "pressure": keras.Input((1,), name="pressure"),
    "kind": keras.Input((1,), name="kind", dtype="int32"),
}
lookup = layers.StringLookup(vocabulary=["a", "b", "c"])
table["kind"] = np.asarray(lookup(table["kind"]))
normalized = []
for name in ("age", "pressure"):
    normalize = layers.Normalization(axis=None)
    normalize.adapt(table[name])
    normalized.append(normalize(inputs[name]))
kinds = layers.Flatten()(layers.Embedding(4, 3)(inputs["kind"]))
hidden = layers.Dense(16, activation="relu")(layers.concatenate([*normalized, kinds]))
hidden = layers.Dropout(0.2)(hidden)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(hidden))
model.compile("adam", "binary_crossentropy", metrics=["accuracy"], weighted_metrics=["auc"])
history = model.fit(
    table,
    target,
    epochs=12,
    batch_size=32,
    class_weight={0: 1.0, 1: 3.0},
    validation_data=({name: column[:75] for name, column in table.items()}, target[:75]),
    validation_freq=2,
    callbacks=[
        keras.callbacks.EarlyStopping("loss", min_delta=0.02, patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5, min_delta=0.05),
        keras.callbacks.TerminateOnNaN(),
    ],
    verbose=0,
)
print(
    "RESULT", json.dumps({name: [float(each) for each in values] for name, values in history.history.items()})
)
