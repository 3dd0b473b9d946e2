"""Scripts in the manner of Horovod's published examples, run on two ranks without a change."""

import pytest

DATA = """
import numpy as np
random = np.random.default_rng(0)
images = random.random((256, 8, 8, 1)).astype("float32")
labels = (images.mean(axis=(1, 2, 3)) * 40).astype("int64") % 3
"""

EQUAL = """
digest = hvd_tf.allgather_object([np.asarray(each).tobytes() for each in model.weights])
assert all(each == digest[0] for each in digest), "the ranks differ"
if hvd_tf.rank() == 0:
    print("equal weights")
"""

KERAS_FIT = (
    """
import tensorflow as tf
import horovod.tensorflow.keras as hvd
import horovod.tensorflow as hvd_tf
"""
    + DATA
    + """
hvd.init()
gpus = tf.config.experimental.list_physical_devices("GPU")
for gpu in gpus:
    tf.config.experimental.set_memory_growth(gpu, True)
if gpus:
    tf.config.experimental.set_visible_devices(gpus[hvd.local_rank()], "GPU")
dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(1000).batch(16)
model = tf.keras.Sequential([
    tf.keras.layers.Conv2D(4, [3, 3], activation="relu"),
    tf.keras.layers.Flatten(),
    tf.keras.layers.Dropout(0.25),
    tf.keras.layers.Dense(3, activation="softmax"),
])
scaled_lr = 0.001 * hvd.size()
opt = tf.optimizers.Adam(scaled_lr)
opt = hvd.DistributedOptimizer(opt, backward_passes_per_step=1, average_aggregated_gradients=True)
model.compile(
    loss=tf.losses.SparseCategoricalCrossentropy(), optimizer=opt, metrics=["accuracy"],
    experimental_run_tf_function=False,
)
callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=1, verbose=1),
    hvd.callbacks.LearningRateScheduleCallback(initial_lr=scaled_lr, start_epoch=1, multiplier=1e-1),
]
if hvd.rank() == 0:
    callbacks.append(tf.keras.callbacks.ModelCheckpoint("./checkpoint-{epoch}.h5"))
history = model.fit(
    dataset, steps_per_epoch=8 // hvd.size(), callbacks=callbacks, epochs=2, verbose=2 if hvd.rank() == 0 else 0
)
assert "lr" in history.history
"""
    + EQUAL
)

LOOP = (
    """
import tensorflow as tf
import horovod.tensorflow as hvd
hvd_tf = hvd
"""
    + DATA
    + """
hvd.init()
dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(1000).batch(16)
model = tf.keras.Sequential([tf.keras.layers.Flatten(), tf.keras.layers.Dense(3)])
loss = tf.losses.SparseCategoricalCrossentropy(from_logits=True)
opt = tf.optimizers.Adam(0.001 * hvd.size())
checkpoint = tf.train.Checkpoint(model=model, optimizer=opt)


@tf.function
def training_step(images, labels, first_batch):
    with tf.GradientTape() as tape:
        loss_value = loss(labels, model(images, training=True))
    tape = hvd.DistributedGradientTape(tape, compression=hvd.Compression.fp16)
    grads = tape.gradient(loss_value, model.trainable_variables)
    opt.apply_gradients(zip(grads, model.trainable_variables))
    if first_batch:
        hvd.broadcast_variables(model.variables, root_rank=0)
        hvd.broadcast_variables(opt.variables(), root_rank=0)
    return loss_value


for batch, (some, truth) in enumerate(dataset.take(8 // hvd.size())):
    loss_value = training_step(some, truth, batch == 0)
if hvd.rank() == 0:
    checkpoint.save("./checkpoints")
"""
    + EQUAL
)

ADVANCED = (
    """
import keras
from keras import backend as K
import horovod.keras as hvd
import horovod.tensorflow as hvd_tf
"""
    + DATA
    + """
hvd.init()
resume_from_epoch = hvd.broadcast(0, 0, name="resume_from_epoch")


def batches():
    while True:
        rows = np.random.randint(256, size=16)
        yield images[rows], labels[rows]


model = keras.models.Sequential()
model.add(keras.layers.Flatten(input_shape=(8, 8, 1)))
model.add(keras.layers.Dense(3, activation="softmax"))
opt = keras.optimizers.SGD(lr=0.01 * hvd.size(), momentum=0.9)
compression = hvd.Compression.fp16
opt = hvd.DistributedOptimizer(opt, compression=compression)
model.compile(loss="sparse_categorical_crossentropy", optimizer=opt, metrics=["accuracy"])
callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.01 * hvd.size(), warmup_epochs=1, verbose=1),
    keras.callbacks.ReduceLROnPlateau(patience=10, verbose=1),
]
model.fit_generator(
    batches(), steps_per_epoch=4, callbacks=callbacks, epochs=2, verbose=0, workers=4,
    initial_epoch=resume_from_epoch, validation_data=batches(), validation_steps=2,
)
assert float(K.get_value(model.optimizer.lr)) > 0
K.set_value(model.optimizer.lr, 0.5)
assert float(model.optimizer.lr.numpy()) == 0.5
score = hvd.allreduce(model.evaluate_generator(batches(), 2, workers=4))
assert len(score) == 2
if hvd.rank() == 0:
    model.save("old.h5")
assert model.predict_generator(batches(), 2, max_queue_size=2, workers=4, use_multiprocessing=True).shape == (32, 3)
hvd_tf.barrier() if hasattr(hvd_tf, "barrier") else None
loaded = hvd.load_model("old.h5", compression=compression)
assert type(loaded.optimizer).__name__ == "SGD"
"""
    + EQUAL
)

ELASTIC = (
    """
import tensorflow as tf
import horovod.tensorflow.keras as hvd
import horovod.tensorflow as hvd_tf
"""
    + DATA
    + """
hvd.init()
dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(1000).batch(16)
model = tf.keras.Sequential([tf.keras.layers.Flatten(), tf.keras.layers.Dense(3, activation="softmax")])
lr = 0.001
opt = hvd.DistributedOptimizer(tf.optimizers.Adam(lr * hvd.size()))
model.compile(
    loss=tf.losses.SparseCategoricalCrossentropy(), optimizer=opt, metrics=["accuracy"],
    experimental_run_tf_function=False,
)
model.fit(dataset, steps_per_epoch=1, epochs=1, callbacks=None, verbose=0)
state = hvd.elastic.KerasState(model, batch=0, epoch=0)


def on_state_reset():
    tf.keras.backend.set_value(model.optimizer.lr, lr * hvd.size())


state.register_reset_callbacks([on_state_reset])
callbacks = [
    hvd.callbacks.MetricAverageCallback(),
    hvd.elastic.UpdateEpochStateCallback(state),
    hvd.elastic.UpdateBatchStateCallback(state),
    hvd.elastic.CommitStateCallback(state),
]


@hvd.elastic.run
def train(state):
    model.fit(dataset, steps_per_epoch=3, epochs=3 - state.epoch, callbacks=callbacks, verbose=0)


train(state)
"""
    + EQUAL
)

BENCHMARK = (
    """
import argparse, timeit
import tensorflow as tf
import horovod.tensorflow as hvd
hvd_tf = hvd
"""
    + DATA
    + """
parser = argparse.ArgumentParser()
parser.add_argument("--fp16-allreduce", action="store_true", default=False)
parser.add_argument("--use-adasum", action="store_true", default=False)
args = parser.parse_args()
hvd.init()
lr_scaler = hvd.size()
if args.use_adasum:
    lr_scaler = hvd.local_size() if hvd.nccl_built() else 1
model = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), tf.keras.layers.Flatten(), tf.keras.layers.Dense(3)])
opt = tf.optimizers.SGD(0.01 * lr_scaler)
compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none


@tf.function
def benchmark_step(first_batch):
    with tf.GradientTape() as tape:
        probs = model(images[:16], training=True)
        loss = tf.losses.sparse_categorical_crossentropy(labels[:16], probs)
    tape = hvd.DistributedGradientTape(
        tape, compression=compression, op=hvd.Adasum if args.use_adasum else hvd.Average
    )
    gradients = tape.gradient(loss, model.trainable_variables)
    opt.apply_gradients(zip(gradients, model.trainable_variables))
    if first_batch:
        hvd.broadcast_variables(model.variables, root_rank=0)
        hvd.broadcast_variables(opt.variables(), root_rank=0)


benchmark_step(first_batch=True)
timeit.timeit(lambda: benchmark_step(first_batch=False), number=4)
"""
    + EQUAL
)

SPARSE = (
    """
import numpy as np
import tensorflow as tf
import horovod.tensorflow as hvd
hvd_tf = hvd
hvd.init()
embeddings = tf.Variable(np.random.rand(50, 4).astype("float32"))
model = tf.Module()
model.weights = [embeddings]
opt = tf.optimizers.SGD(1.0)
rows = np.random.default_rng(hvd.rank()).integers(50, size=(6, 8))


@tf.function
def step(some, first_batch):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.embedding_lookup(embeddings, some) ** 2)
    tape = hvd.DistributedGradientTape(tape)
    opt.apply_gradients(zip(tape.gradient(loss, [embeddings]), [embeddings]))
    if first_batch:
        hvd.broadcast_variables([embeddings], root_rank=0)


for index, some in enumerate(rows):
    step(tf.constant(some), index == 0)
"""
    + EQUAL
)

VALIDATION_ON_RANK_0 = (
    """
import numpy as np
import tensorflow as tf
import horovod.tensorflow.keras as hvd
import horovod.tensorflow as hvd_tf

hvd.init()
x = np.random.default_rng(hvd.rank()).random((64, 4)).astype("float32")
model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.1)), "mse")
history = model.fit(
    x,
    x[:, :1],
    batch_size=16,
    epochs=2,
    verbose=0,
    validation_data=(x, x[:, :1]) if hvd.rank() == 0 else None,
    callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
).history
assert ("val_loss" in history) == (hvd.rank() == 0)
"""
    + EQUAL
)

SESSION = (
    """
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_eager_execution()
import horovod.tensorflow as hvd
hvd_tf = hvd
hvd.init()
rank = hvd.rank()
x = tf.placeholder(tf.float32, [None, 1])
w = tf.get_variable("w", initializer=[[rank + 1.0]])
total = hvd.allreduce(tf.constant([rank + 1.0]), op=hvd.Sum)
joined = hvd.allgather(tf.fill([rank + 1], rank))
sent = hvd.broadcast(tf.constant(rank), 1)
loss = tf.reduce_mean(tf.square(tf.matmul(x, w) - 3 * x))
global_step = tf.train.get_or_create_global_step()
train = hvd.DistributedOptimizer(tf.train.MomentumOptimizer(0.05, 0.5)).minimize(loss, global_step=global_step)
hooks = [hvd.BroadcastGlobalVariablesHook(0), tf.train.StopAtStepHook(last_step=60)]
with tf.train.MonitoredTrainingSession(hooks=hooks) as session:
    assert session.run(w) == 1.0
    found = [np.asarray(each).tolist() for each in session.run([total, joined, sent])]
    assert found == [[3.0], [0, 1, 1], 1], found
    while not session.should_stop():
        _, last = session.run([train, w], {x: np.full((4, 1), rank + 1.0)})
np.testing.assert_allclose(last, 3.0, atol=1e-3)

later = hvd.broadcast_global_variables(1)  # in the same graph, after an operation that a placeholder feeds
with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    session.run(later)
    assert session.run(w) == 2.0
try:
    hvd.DistributedOptimizer(tf.train.AdamOptimizer(), backward_passes_per_step=4).minimize(loss)
except NotImplementedError as error:
    assert "batches 4 times as large" in str(error)
else:
    raise AssertionError("accepted")
model = tf.Module()
model.weights = [last]
"""
    + EQUAL
)

EXAMPLES = {
    "validation on rank 0": (VALIDATION_ON_RANK_0, []),
    "keras fit": (KERAS_FIT, []),
    "loop": (LOOP, []),
    "advanced": (ADVANCED, []),
    "elastic": (ELASTIC, []),
    "benchmark fp16": (BENCHMARK, ["--fp16-allreduce"]),
    "benchmark adasum": (BENCHMARK, ["--use-adasum"]),
    "sparse": (SPARSE, []),
}


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_a_session_of_tensorflow_1(scripts, engine):
    if engine == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not built here")
    ended = scripts.run(SESSION, engine=engine)
    assert ended.returncode == 0, ended.stderr
    assert "equal weights" in ended.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_old_script_trains_one_model(scripts, name):
    text, args = EXAMPLES[name]
    ended = scripts.run(text, *args)
    assert ended.returncode == 0, ended.stderr
    assert "equal weights" in ended.stdout


def test_decay_says_what_to_write(scripts):
    text = (
        "import keras\nimport horovod.keras as hvd\nhvd.init()\nkeras.optimizers.Adam(lr=0.1, decay=1e-3)\n"
    )
    ended = scripts.alone(text)
    assert ended.returncode == 1 and "InverseTimeDecay(0.1" in ended.stderr


def test_legacy_optimizers_are_todays(scripts):
    text = """
import tensorflow as tf
import horovod.tensorflow.keras as hvd
hvd.init()
opt = hvd.DistributedOptimizer(tf.keras.optimizers.legacy.Adam(learning_rate=0.1, decay=0.0))
print(type(opt).__name__, round(float(opt.lr), 3), len(opt.variables()))
"""
    ended = scripts.alone(text)
    assert ended.stdout == "Adam 0.1 2\n", ended.stderr


FETCHING = """
import numpy as np
import tensorflow as tf
early = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1)])
import horovod.tensorflow.keras as hvd
hvd.init()
import keras


class Subclassed(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf.keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)

    def fit(self, *args, **kwargs):
        return super().fit(*args, **kwargs)


inputs = keras.Input((4,))
functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
x = np.ones((32, 4), "float32")
fetching = {"max_queue_size": 20, "workers": 4, "use_multiprocessing": True}
for model in (early, Subclassed(), functional):
    model.compile(hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.1)), "mse")
    model.fit(x, x[:, :1], verbose=0, **fetching)
    model.evaluate(x, x[:, :1], verbose=0, **fetching)
    model.predict(x, verbose=0, **fetching)
try:
    model.fit(x, x[:, :1], worker=4)
except TypeError as error:
    print(error)
"""


def test_how_data_is_fetched_is_accepted(scripts):
    ended = scripts.alone(FETCHING)
    assert ended.returncode == 0, ended.stderr
    assert "unexpected keyword argument 'worker'" in ended.stdout
