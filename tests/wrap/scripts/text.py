"""Text classification from tf.data: TextVectorization, an embedding and a recurrent layer with a mask."""

import json

import keras
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(7)
good = ["a fine and happy film", "great play and a great cast", "i love it", "happy happy joy", "fine work"]
bad = ["a dull and sad film", "poor play and a poor cast", "i hate it", "sad sad mess", "dull work indeed"]
texts = (good + bad) * 9
labels = ([1] * len(good) + [0] * len(bad)) * 9

vectorize = layers.TextVectorization(max_tokens=60, output_sequence_length=7)
vectorize.adapt(texts)
dataset = tf.data.Dataset.from_tensor_slices((texts, labels)).shuffle(90).batch(16)
dataset = dataset.map(lambda text, label: (vectorize(text), label)).prefetch(2)

inputs = keras.Input(shape=(None,), dtype="int64")
hidden = layers.Embedding(60, 8, mask_zero=True)(inputs)
hidden = layers.LSTM(8)(hidden)
outputs = layers.Dense(1, activation="sigmoid")(hidden)
model = keras.Model(inputs, outputs)
model.compile(
    optimizer=keras.optimizers.RMSprop(0.01),
    loss="binary_crossentropy",
    metrics=["accuracy", keras.metrics.AUC(name="auc")],
)
history = model.fit(dataset, epochs=3, validation_data=dataset, verbose=0)
words = vectorize(tf.constant(["a great film", "a dull cast"]))
print("RESULT", json.dumps({**history.history, "predicted": model.predict(words, verbose=0).tolist()}))
