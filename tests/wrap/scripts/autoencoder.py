"""Denoising autoencoder, and a variational one: a sampling layer, add_loss, two trackers, a custom train_step."""

import json

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(11)
x = load_digits().data.astype("float32")[:210] / 16.0
noisy = np.clip(x + 0.2 * np.random.normal(size=x.shape), 0, 1)

inputs = keras.Input((64,))
code = layers.Dense(16, activation="relu", activity_regularizer=keras.regularizers.L1(1e-3))(inputs)
autoencoder = keras.Model(inputs, layers.Dense(64, activation="sigmoid")(code))
autoencoder.compile("adam", "mse")
denoised = autoencoder.fit(noisy, x, epochs=2, batch_size=64, verbose=0)


class Sampling(layers.Layer):
    """Draws from the distribution that mean and logarithm of the variance describe."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_var = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        self.add_loss(-0.001 * ops.mean(ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), axis=1)))
        return mean + ops.exp(0.5 * log_var) * noise


class VAE(keras.Model):
    """Encoder and decoder with a train_step of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = keras.Sequential([layers.Dense(24, activation="relu"), layers.Dense(8)])
        self.decoder = keras.Sequential(
            [layers.Dense(24, activation="relu"), layers.Dense(64, activation="sigmoid")]
        )
        self.sampling = Sampling()
        self.total = keras.metrics.Mean(name="total")
        self.kl = keras.metrics.Mean(name="kl")

    @property
    def metrics(self):
        return [self.total, self.kl]

    def call(self, x):
        mean, log_var = ops.split(self.encoder(x), 2, axis=-1)
        return self.decoder(self.sampling([mean, log_var]))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            reconstruction = self(data, training=True)
            loss = ops.mean(ops.sum(ops.square(data - reconstruction), axis=-1))
            kl = sum(self.losses)
            total = loss + kl
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights))
        self.total.update_state(total)
        self.kl.update_state(kl)
        return {metric.name: metric.result() for metric in self.metrics}


vae = VAE()
vae.compile(optimizer=keras.optimizers.Adam(0.01))
history = vae.fit(x, epochs=3, batch_size=50, verbose=0)
print("RESULT", json.dumps({"denoising": denoised.history, "vae": history.history}))
