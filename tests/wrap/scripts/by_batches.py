"""A script that calls train_on_batch itself, with batches that do not divide, without any seed for its weights."""

import json

import keras
import numpy as np
from keras import layers

x = np.random.default_rng(37).normal(size=(100, 5)).astype("float32")
y = x @ np.arange(1.0, 6.0, dtype="float32")
model = keras.Sequential([keras.Input((5,)), layers.Dense(1, kernel_initializer="zeros")])
model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", metrics=["mae"])
seen = []
for epoch in range(3):
    order = np.random.permutation(100) if epoch == 2 else np.arange(100)
    for start in range(0, 100, 23):
        rows = order[start : start + 23]
        logs = model.train_on_batch(x[rows], y[rows], return_dict=True)
    if epoch < 2:
        seen.append([float(each) for each in logs.values()])
seen.append([float(each) for each in model.test_on_batch(x[:33], y[:33])][:0])
print("RESULT", json.dumps({"seen": seen, "rows": len(model.predict_on_batch(x[:7]))}))
