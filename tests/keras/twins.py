"""The same training twice: distributed over the ranks, and on one process with the whole batch.

Every rank computes the single-process twin for itself, without communication.
"""

import keras
import numpy as np
import tensorflow as tf

import hvdtrain.keras as hvd

BATCH = 4  # samples a rank and step
FEATURES, CLASSES = 6, 3


class StoppedError(Exception):
    pass


class StopAt(keras.callbacks.Callback):
    """Ends the training as an error would, before the end of a step counted over all epochs."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise StoppedError


def dense_model(dtype="float64", seed=1, **options):
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, "tanh", kernel_initializer=init, dtype=dtype, **options),
            keras.layers.Dense(CLASSES, kernel_initializer=init, dtype=dtype),
        ]
    )


def data(steps, dtype="float64", seed=0):
    """The global batches of all steps: arrays of shape (steps, size * BATCH, ...)."""
    random = np.random.default_rng(seed)
    rows = (steps, hvd.size() * BATCH)
    return random.standard_normal((*rows, FEATURES)).astype(dtype), random.standard_normal(
        (*rows, CLASSES)
    ).astype(dtype)


def mine(batches, rank=None):
    """This rank's part of each global batch."""
    first = (hvd.rank() if rank is None else rank) * BATCH
    return batches[:, first : first + BATCH]


def flat(batches):
    return batches.reshape(-1, *batches.shape[2:])


def fit(model, x, y, batch_size, epochs=1, callbacks=()):
    model.fit(
        flat(x),
        flat(y),
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def alone(train):
    """Runs a single process's training on rank 0 only; returns its weights, on every rank."""
    return hvd.broadcast_object([weight.numpy() for weight in train().weights] if hvd.rank() == 0 else None)


def twins(
    make_model, make_optimizer, steps=20, dtype="float64", wrap=hvd.DistributedOptimizer, **compile_options
):
    """Trains both with `fit`; returns the distributed model and the weights of the single one."""
    x, y = data(steps, dtype)
    distributed = make_model()
    distributed.compile(wrap(make_optimizer()), "mse", **compile_options)
    fit(distributed, mine(x), mine(y), BATCH)
    return distributed, alone(lambda: single(make_model(), make_optimizer(), x, y))


def single(model, optimizer, x, y, batch=None):
    """Trains one process on the global batches; eagerly, which is quicker than compiling a few steps."""
    model.compile(optimizer, "mse", run_eagerly=True)
    return fit(model, x, y, batch or BATCH * hvd.size())


def assert_same(distributed, weights, rtol=1e-10):
    """The twins' weights are equal to within rounding, and to the bit between the ranks."""
    for ours, theirs in zip(distributed.weights, weights, strict=True):
        scale = np.abs(theirs).max() if theirs.size else 1
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=rtol, atol=rtol * scale)
    assert_identical(distributed)


def assert_identical(model):
    """Weights and the optimizer's state are the same to the bit on all ranks."""
    accumulators = {id(each) for each in getattr(model.optimizer, "_accumulated_gradients", ())}
    variables = [
        *model.weights,
        *(each for each in model.optimizer.variables if id(each) not in accumulators),
    ]
    digests = hvd.allgather_object([np.asarray(each).tobytes() for each in variables])
    assert all(digest == digests[0] for digest in digests)


def gradients(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
    return tape.gradient(loss, model.trainable_variables)
