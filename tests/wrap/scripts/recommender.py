"""Collaborative filtering as in the Keras documentation: its tensordot adds up the whole batch; tf.keras."""

import json

import numpy as np
import tensorflow as tf
from tensorflow.keras import layers

tf.keras.utils.set_random_seed(10)
pairs = np.stack([np.random.randint(0, 30, 200), np.random.randint(0, 40, 200)], axis=1)
ratings = np.random.rand(200)


class RecommenderNet(tf.keras.Model):
    """Embeddings and biases of users and films."""

    def __init__(self, users, films, size, **kwargs):
        super().__init__(**kwargs)
        regularize = tf.keras.regularizers.l2(1e-6)
        self.users = layers.Embedding(users, size, "he_normal", embeddings_regularizer=regularize)
        self.films = layers.Embedding(films, size, "he_normal", embeddings_regularizer=regularize)
        self.user_bias, self.film_bias = layers.Embedding(users, 1), layers.Embedding(films, 1)

    def call(self, inputs):
        user, film = self.users(inputs[:, 0]), self.films(inputs[:, 1])
        biases = self.user_bias(inputs[:, 0]) + self.film_bias(inputs[:, 1])
        return tf.nn.sigmoid(tf.tensordot(user, film, 2) + biases)


model = RecommenderNet(30, 40, 8)
model.compile(tf.keras.optimizers.Adam(0.001), tf.keras.losses.BinaryCrossentropy())
history = model.fit(
    pairs, ratings, batch_size=64, epochs=2, validation_data=(pairs[:70], ratings[:70]), verbose=0
)
print("RESULT", json.dumps({**history.history, "predicted": model.predict(pairs[:5], verbose=0).tolist()}))
