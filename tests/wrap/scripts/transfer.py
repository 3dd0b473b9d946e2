"""Transfer learning: train a head on a frozen base with augmentation, then unfreeze, recompile, and train again."""

import json

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

keras.utils.set_random_seed(23)
images = load_digits().images[:240, :, :, None].astype("float32") / 16.0
labels = load_digits().target[:240] % 2

base = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(6, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.GlobalMaxPooling2D(),
    ],
    name="base",
)
augment = keras.Sequential(
    [layers.RandomFlip("horizontal"), layers.RandomTranslation(0.1, 0.1)], name="augment"
)
base.trainable = False
inputs = keras.Input((8, 8, 1))
features = base(augment(inputs), training=False)
model = keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.2)(features)))
loss = keras.losses.BinaryCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.02), loss, metrics=[keras.metrics.BinaryAccuracy()])
first = model.fit(
    images, labels, batch_size=60, epochs=2, validation_data=(images[:50], labels[:50]), verbose=0
)

frozen = [weight.copy() for weight in base.get_weights()]
base.trainable = True
model.compile(keras.optimizers.Adam(0.005), loss, metrics=[keras.metrics.BinaryAccuracy()])
second = model.fit(images, labels, batch_size=60, epochs=2, verbose=0)
moved = max(float(np.abs(new - old).max()) for new, old in zip(base.get_weights(), frozen))
print("RESULT", json.dumps({"first": first.history, "second": second.history, "moved": moved}))
