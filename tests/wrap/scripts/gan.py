"""GAN with two optimizers, noise drawn in train_step, a gradient penalty, and a callback that makes images."""

import json

import keras
import numpy as np
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(3)
real = np.random.default_rng(3).normal(0.5, 0.2, (192, 12)).astype("float32")

discriminator = keras.Sequential(
    [keras.Input((12,)), layers.Dense(16), layers.LeakyReLU(0.2), layers.Dense(1)]
)
generator = keras.Sequential([keras.Input((4,)), layers.Dense(16, activation="relu"), layers.Dense(12)])


class GAN(keras.Model):
    """Trains both, as the guide to custom training steps does."""

    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_loss, self.g_loss = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    @property
    def metrics(self):
        return [self.d_loss, self.g_loss]

    def penalty(self, real, fake):
        mixed = real + keras.random.uniform((tf.shape(real)[0], 1), seed=self.seed_generator) * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            judged = self.discriminator(mixed, training=True)
        norm = tf.sqrt(tf.reduce_sum(tape.gradient(judged, [mixed])[0] ** 2, axis=1) + 1e-6)
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real):
        batch = tf.shape(real)[0]
        fake = self.generator(keras.random.normal((batch, 4), seed=self.seed_generator))
        labels = tf.concat([tf.ones((batch, 1)), tf.zeros((batch, 1))], axis=0)
        with tf.GradientTape() as tape:
            judged = self.discriminator(tf.concat([fake, real], axis=0))
            d_loss = self.loss_fn(labels, judged) + self.penalty(real, fake)
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(grads, self.discriminator.trainable_weights)
        noise = keras.random.normal((batch, 4), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(tf.zeros((batch, 1)), self.discriminator(self.generator(noise)))
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights))
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


class Monitor(keras.callbacks.Callback):
    """Keeps what the generator makes of the same noise after each epoch."""

    made: list = []

    def on_epoch_end(self, epoch, logs=None):
        self.made.append(float(np.mean(self.model.generator.predict(np.ones((3, 4), "float32"), verbose=0))))


gan = GAN(discriminator, generator)
gan.compile(
    keras.optimizers.Adam(3e-3),
    keras.optimizers.Adam(3e-3),
    keras.losses.BinaryCrossentropy(from_logits=True),
)
monitor = Monitor()
history = gan.fit(real, epochs=2, batch_size=48, callbacks=[monitor], verbose=0)
print("RESULT", json.dumps({**history.history, "made": monitor.made}))
