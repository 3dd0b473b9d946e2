"""Forecasting with timeseries_dataset_from_array, steps_per_epoch, and weights for single samples."""

import json

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(5)
time = np.arange(500)
series = (np.sin(time / 9.0) + 0.1 * np.random.normal(size=500)).astype("float32")
dataset = keras.utils.timeseries_dataset_from_array(
    series[:-12, None], series[12:], sequence_length=12, batch_size=40, shuffle=True, seed=3
)
model = keras.Sequential([keras.Input((12, 1)), layers.GRU(8), layers.Dense(1)])
model.compile(
    keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.02, 10, 0.9)),
    "huber",
    metrics=["mae"],
)
history = model.fit(dataset.repeat(), steps_per_epoch=5, epochs=3, initial_epoch=1, verbose=0)

windows = np.lib.stride_tricks.sliding_window_view(series, 12)[:-1, :, None]
targets, weights = series[12:], np.linspace(0.1, 2.0, len(series) - 12)
second = model.fit(
    windows,
    targets,
    sample_weight=weights,
    batch_size=70,
    epochs=4,
    initial_epoch=3,
    verbose=0,
    shuffle=False,
)
print(
    "RESULT",
    json.dumps(
        {
            "first": history.history,
            "second": second.history,
            "steps": history.params["steps"],
            "epochs": second.epoch,
            "evaluated": model.evaluate(dataset, return_dict=True, verbose=0),
        }
    ),
)
