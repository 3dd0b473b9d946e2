"""Convolutional network with batch normalization and dropout, a validation split, and a saved model."""

import json
import os
import tempfile

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(812)
x, y = load_digits(return_X_y=True)
x = x.reshape(-1, 8, 8, 1).astype("float32")[:500] / 16.0
y = y[:500]

model = keras.Sequential(
    [
        keras.Input(shape=(8, 8, 1)),
        layers.Conv2D(8, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.Activation("relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dropout(0.3),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
history = model.fit(x, y, batch_size=48, epochs=3, validation_split=0.2, verbose=2)

folder = tempfile.mkdtemp()
path = os.path.join(folder, "digits.keras")
model.save(path)
loaded = keras.models.load_model(path)
probabilities = loaded.predict(x[:50], verbose=0)
np.testing.assert_allclose(probabilities, model.predict(x[:50], verbose=0), rtol=1e-5)
print(
    "RESULT",
    json.dumps(
        {**history.history, "evaluated": model.evaluate(x, y, verbose=0), "first": probabilities[0].tolist()}
    ),
)
