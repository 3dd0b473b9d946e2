"""Calls and names of Keras 2 in old scripts mean on Keras 3 what they meant."""

CALLS = """
import numpy as np
import tensorflow as tf
import horovod.tensorflow.keras as hvd
from tensorflow.keras.losses import mean_squared_error
from keras.utils import np_utils
from keras.layers.core import Dense
from keras.preprocessing.text import Tokenizer
import keras

hvd.init()
y_true, y_pred = np.array([[1.0, 3.0]]), np.array([[2.0, 5.0]])
for api in (keras, tf.keras):
    for module in (api.losses, api.metrics):
        for name in ("mean_squared_error", "mse", "MSE"):
            assert float(getattr(module, name)(y_true, y_pred)[0]) == 2.5
        assert float(module.mean_absolute_error(y_true, y_pred)[0]) == 1.5
assert float(mean_squared_error(y_true, y_pred)[0]) == 2.5
assert np_utils.to_categorical([1], 2).tolist() == [[0, 1]] and Dense is keras.layers.Dense

K = keras.backend
variable = keras.Variable([1.0, 2.0])
K.update_add(variable, np.ones(2, "float32"))
assert K.get_value(variable).tolist() == [2, 3] and float(K.mean(variable)) == 2.5
assert variable.ref() == variable.ref() and {variable.ref(): 1}[variable.ref()] == 1
assert variable.ref().deref() is variable

optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(lr=0.5))
optimizer.minimize(lambda: tf.reduce_sum(variable.value), [variable])
assert K.get_value(variable).tolist() == [1.5, 2.5]
pairs = optimizer._compute_gradients(lambda: tf.reduce_sum(variable.value), [variable])
optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
assert K.get_value(variable).tolist() == [1.0, 2.0]
pairs = optimizer._compute_gradients(lambda: tf.reduce_sum(variable.value), [variable])


class Own(keras.optimizers.Optimizer):
    def __init__(self, name):
        super().__init__(name)


def told(call):
    try:
        call()
    except Exception as error:
        return str(error)


assert "were changed" in told(lambda: optimizer.apply_gradients([(2 * g, v) for g, v in pairs]))
assert "update_step(self" in told(lambda: Own("own"))
assert "DistributedGradientTape" in told(lambda: optimizer.get_gradients(0, []))
assert keras.optimizers.adam(lr=0.1, epsilon=None).epsilon == 1e-7

x = np.random.default_rng(0).random((36, 4)).astype("float32")
y = np.arange(36) % 3
model = keras.Sequential([keras.Input((4,)), Dense(3, activation="softmax")])
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5))
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
saved = []
checkpoint = keras.callbacks.ModelCheckpoint("{epoch}-{val_acc:.1f}.h5", "val_acc", period=2)
def save(epoch, batch, logs):
    saved.append(checkpoint._get_file_path(epoch, batch, logs))


checkpoint._save_model = save
stopping = keras.callbacks.EarlyStopping(monitor="val_acc", patience=9)
schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.25)
history = model.fit(
    x, y, batch_size=8, epochs=4, steps_per_epoch=1.5, validation_data=(x, y), validation_steps=1.5, verbose=0,
    callbacks=[schedule, checkpoint, stopping], shuffle=True,
).history
assert checkpoint.monitor == stopping.monitor == "val_accuracy"
assert len(saved) == 2 and saved[1].startswith("4-"), saved
assert history["lr"] == history["learning_rate"] == [0.25] * 4 and history["acc"] == history["accuracy"]
assert "lr" in history and history.get("val_acc") == history["val_accuracy"] and "lr" not in list(history)
assert model.metrics_names == ["loss", "accuracy"]
assert (model.predict_classes(x) == model.predict(x).argmax(-1)).all()
one = model.test_on_batch(x[:6], y[:6])
model.test_on_batch(x[6:], y[6:])
assert model.test_on_batch(x[:6], y[:6]) == one != model.test_on_batch(x[6:], y[6:], reset_metrics=False)
assert model.layers[0].output_shape == (None, 3) and model.input_shape == (None, 4)
keras.layers.BatchNormalization(fused=True)
memory = keras.Sequential([keras.Input((2, 1), batch_size=1), keras.layers.LSTM(1, stateful=True)])
first = memory.predict(np.ones((1, 2, 1)), verbose=0)
assert memory.predict(np.ones((1, 2, 1)), verbose=0) != first
memory.reset_states()
assert memory.predict(np.ones((1, 2, 1)), verbose=0) == first
scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
scaled.build([variable])
assert float(scaled.get_scaled_loss(2.0)) == 16 and scaled.get_unscaled_gradients([3.0]) == [3.0]
print("as before")
"""


def test_calls_and_names(scripts):
    ended = scripts.alone(CALLS)
    assert ended.returncode == 0, ended.stderr
    assert "as before" in ended.stdout
