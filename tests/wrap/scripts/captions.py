"""Image captioning: train_step and test_step that call layers themselves, and several updates a step."""

import json

import keras
import numpy as np
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(8)


class Decoder(layers.Layer):
    """Words that attend to an image."""

    def __init__(self):
        super().__init__()
        self.words, self.attention = layers.Embedding(20, 8), layers.MultiHeadAttention(2, 4)
        self.drop, self.out = layers.Dropout(0.3), layers.Dense(20, activation="softmax")

    def call(self, words, image, training=False):
        attended = self.attention(query=self.words(words), value=image, key=image, training=training)
        return self.out(self.drop(attended, training=training))


class Captioner(keras.Model):
    """Learns three captions of an image, one after the other."""

    def __init__(self):
        super().__init__()
        self.eye = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(6, 3), layers.Reshape((-1, 6))])
        self.eye.trainable = False
        self.encoder, self.decoder = layers.Dense(8, activation="relu"), Decoder()
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.decoder(inputs[1], self.encoder(self.eye(inputs[0])))

    def one_loss(self, image, words, training):
        predicted = self.decoder(words[:, :-1], self.encoder(image), training=training)
        mask = tf.cast(words[:, 1:] != 0, tf.float32)
        return tf.reduce_sum(self.loss(words[:, 1:], predicted) * mask) / tf.reduce_sum(mask)

    def train_step(self, batch):
        image, captions = self.eye(batch[0]), batch[1]
        for number in range(3):
            with tf.GradientTape() as tape:
                loss = self.one_loss(image, captions[:, number], True)
            variables = self.encoder.trainable_variables + self.decoder.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
            self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, batch):
        self.tracker.update_state(self.one_loss(self.eye(batch[0]), batch[1][:, 0], False))
        return {"loss": self.tracker.result()}

    @property
    def metrics(self):
        return [self.tracker]


class Rising(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises for four steps."""

    def __call__(self, step):
        return 1e-3 * tf.minimum(tf.cast(step, tf.float32) / 4.0, 1.0)


model = Captioner()
model.compile(
    keras.optimizers.Adam(Rising(), global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(reduction=None),
)
images, captions = np.random.rand(44, 8, 8, 3).astype("float32"), np.random.randint(0, 20, (44, 3, 7))
dataset = tf.data.Dataset.from_tensor_slices((images, captions)).cache().shuffle(44).batch(12).prefetch(2)
stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
history = model.fit(dataset, epochs=2, validation_data=dataset, callbacks=[stop], verbose=0)
print("RESULT", json.dumps(history.history))
