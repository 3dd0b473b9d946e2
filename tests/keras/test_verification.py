"""What must never pass in silence: ranks that hold different weights, models, or gradients."""

import io
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, assert_identical, data, dense_model, fit, gradients, mine

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.gradients.verification import Policy

pytestmark = pytest.mark.ranks

SGD = keras.optimizers.SGD


@pytest.fixture(autouse=True)
def several(engine):
    if engine.size == 1:
        pytest.skip("a world of one agrees with itself")


def caught_everywhere(function):
    """Runs what must fail on every rank; returns the message, which is the same on all."""
    with pytest.raises((hvd.MismatchError, tf.errors.OpError)) as caught:
        function()
    direct = isinstance(caught.value, hvd.MismatchError)
    text = str(caught.value if direct else runtime.engine().last_error)
    assert direct or text in str(caught.value)  # TensorFlow's own error still holds the sentence
    texts = hvd.allgather_object(text)
    assert len(set(texts)) == 1, texts
    return text


def compiled(model, run_eagerly=True):
    """Eagerly by default: a few steps are quicker than a graph, and what is checked is the same."""
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse", run_eagerly=run_eagerly)
    return model


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
def test_a_forgotten_broadcast_stops_the_run_before_the_first_update(run_eagerly):
    x, y = data(1)
    last = hvd.size() - 1
    model = compiled(dense_model(seed=2 if hvd.rank() == last else 1), run_eagerly=run_eagerly)
    before = [weight.numpy() for weight in model.weights]
    message = caught_everywhere(lambda: fit(model, mine(x), mine(y), BATCH))
    assert (
        "kernel" in message and f"rank {last}" in message and "BroadcastGlobalVariablesCallback(0)" in message
    )
    for ours, theirs in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_optimizers_state_must_agree_too():
    x, y = data(1)
    model = dense_model()
    model.compile(
        hvd.DistributedOptimizer(SGD(0.1 if hvd.rank() else 0.2, momentum=0.9)), "mse", run_eagerly=True
    )
    assert "learning_rate" in caught_everywhere(lambda: fit(model, mine(x), mine(y), BATCH))


@pytest.mark.parametrize(
    "broken", [lambda g, r: [*g[:-1], g[-1] * 1.001], lambda g, r: [*g[:-1], g[-1] * float("nan")]]
)
def test_a_wrong_average_is_found_whoever_made_it(engine, monkeypatch, broken):
    reduce = engine.grouped_allreduce

    def wrong(arrays, *others):
        results = reduce(arrays, *others)
        return broken(results, engine.rank) if engine.rank == 1 else results

    x, y = data(1)
    if engine.native_tensors() is not None:
        native = engine.native_tensors()

        class Wrong:
            def __getattr__(self, name):
                return getattr(native, name)

            def combine(self, name, dense, *others):
                reduced, joined = native.combine(name, dense, *others)
                return broken(reduced, engine.rank) if engine.rank == 1 else reduced, joined

        monkeypatch.setattr(engine, "native_tensors", Wrong)
    monkeypatch.setattr(engine, "grouped_allreduce", wrong)
    message = caught_everywhere(lambda: fit(compiled(dense_model(), False), mine(x), mine(y), BATCH))
    assert "Rank 1" in message and "dense" in message and "Nothing was applied" in message


def model_with(layers):
    inputs = keras.Input((6,))
    hidden = inputs
    for number, units in enumerate(layers):
        hidden = keras.layers.Dense(units, name=f"hidden_{number}")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden))


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        ([8], [9], ["hidden_0/kernel", "[6, 8]", "[6, 9]"]),
        ([8], [8, 8], ["head/kernel", "hidden_1/kernel"]),
    ],
    ids=["shape", "layers"],
)
def test_another_model_on_one_rank_is_named_with_variable_and_rank(ours, theirs, words):
    x, y = data(1)
    model = compiled(model_with(theirs if hvd.rank() == 1 else ours))
    message = caught_everywhere(lambda: fit(model, mine(x), mine(y), BATCH))
    assert "rank 1" in message and all(word in message for word in words), message


def test_a_layer_frozen_on_one_rank_only():
    x, y = data(1)
    model = model_with([8])
    model.layers[1].trainable = hvd.rank() != 1
    message = caught_everywhere(lambda: fit(compiled(model, False), mine(x), mine(y), BATCH))
    assert "hidden_0/kernel" in message and "rank 1" in message


def test_another_dtype_on_one_rank():
    x, y = data(1)
    model = compiled(dense_model("float64" if hvd.rank() == 1 else "float32"))
    message = caught_everywhere(lambda: fit(model, mine(x), mine(y), BATCH))
    assert "float64" in message and "float32" in message


def test_other_order_of_the_variables_on_one_rank():
    x, y = data(1)
    model = dense_model()
    optimizer = hvd.DistributedOptimizer(SGD(0.1))
    grads, variables = gradients(model, mine(x)[0], mine(y)[0]), model.trainable_variables
    if hvd.rank() == 1:
        grads, variables = grads[::-1], variables[::-1]
    message = caught_everywhere(lambda: optimizer.apply(grads, variables))
    assert "kernel" in message and "bias" in message


def test_a_sparse_gradient_on_one_rank_only():
    model = keras.Sequential(
        [keras.Input((2,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.Flatten()]
    )
    optimizer = hvd.DistributedOptimizer(SGD(0.1), sparse_as_dense=hvd.rank() == 1)
    grads = gradients(model, np.zeros((1, 2), "int32"), 1.0)
    assert "sparse" in caught_everywhere(lambda: optimizer.apply(grads, model.trainable_variables))


def test_a_collective_elsewhere_on_one_rank_is_named():
    x, y = data(1)
    model = compiled(dense_model())

    def run():
        if hvd.rank() == 1:
            hvd.allreduce(np.zeros(3))
        fit(model, mine(x), mine(y), BATCH)

    message = caught_everywhere(run)
    assert "allreduce" in message and "DistributedSGD" in message


def test_drift_is_found_at_the_next_verified_step(monkeypatch):
    monkeypatch.setenv("HVDTRAIN_VERIFY", "every:2")
    x, y = data(4)
    model = compiled(dense_model(), False)
    fit(model, mine(x)[:2], mine(y)[:2], BATCH)
    if hvd.rank() == 1:
        model.layers[0].bias.assign_add(np.full(8, 1e-9))
    message = caught_everywhere(lambda: fit(model, mine(x)[2:], mine(y)[2:], BATCH))
    assert "bias" in message and "rank 1" in message


def test_off_does_not_look(monkeypatch):
    monkeypatch.setenv("HVDTRAIN_VERIFY", "off")
    x, y = data(1)
    model = compiled(dense_model(seed=1 + (hvd.rank() == 1)))
    fit(model, mine(x), mine(y), BATCH)
    digests = hvd.allgather_object(model.layers[0].kernel.numpy().tobytes())
    assert digests[0] != digests[1]


@pytest.mark.parametrize("text", ["always", "every:0", "every:", "every:-1", "1"])
def test_a_policy_that_is_none(monkeypatch, text):
    monkeypatch.setenv("HVDTRAIN_VERIFY", text)
    with pytest.raises(ValueError, match="every:N"):
        Policy.from_environment()


def test_rank_0_says_once_that_it_verified(capfd):
    x, y = data(2)
    model = compiled(dense_model(), False)
    fit(model, mine(x), mine(y), BATCH, epochs=2)
    said = capfd.readouterr().err.count("verified at step 1: 4 variables are the same on all")
    assert said == (1 if hvd.rank() == 0 else 0)
    assert_identical(model)


@pytest.mark.parametrize("verify", ["first", "off"])
def test_a_rank_that_touched_no_row_of_an_embedding(monkeypatch, verify):
    monkeypatch.setenv("HVDTRAIN_VERIFY", verify)
    optimizer = hvd.DistributedOptimizer(SGD(1.0))
    table = keras.Variable(np.zeros((4, 3)), dtype="float32", name="table")
    rows = [] if hvd.rank() == 0 else [1, 2]
    values = tf.ones((len(rows), 3))
    optimizer.apply(
        [tf.IndexedSlices(values, tf.constant(rows, tf.int64), tf.constant([4, 3], tf.int64))], [table]
    )
    expected = np.zeros((4, 3))
    expected[1:3] = -(hvd.size() - 1) / hvd.size()
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_variables_of_odd_shapes(shape):
    optimizer = hvd.DistributedOptimizer(SGD(1.0))
    variable = keras.Variable(np.zeros(shape), dtype="float32", name="odd")
    optimizer.apply([tf.fill(shape, float(hvd.rank()))], [variable])
    np.testing.assert_allclose(variable.numpy(), np.full(shape, -(hvd.size() - 1) / 2))


@pytest.mark.parametrize("dtype, value", [("float16", 6e-8), ("float32", 1e-40), ("float32", 7.5e-39)])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_smallest_gradients_are_no_false_alarm(dtype, value, graph):
    optimizer = hvd.DistributedOptimizer(SGD(1.0))
    variable = keras.Variable(np.zeros(1), dtype=dtype, name="tiny")
    optimizer.build([variable])
    gradient = tf.constant([value * (1 + hvd.rank())], dtype)
    step = tf.function(lambda: optimizer.apply([gradient])) if graph else lambda: optimizer.apply([gradient])
    step()


def test_an_error_dealt_with_is_not_repeated_later():
    x, y = data(1)
    model = compiled(dense_model(seed=1 + (hvd.rank() == 1)), False)
    with pytest.raises(tf.errors.OpError) as caught:
        fit(model, mine(x), mine(y), BATCH)
    assert "not hold the same weights" in runtime.last_words(caught.value)
    assert runtime.last_words(KeyError("of another kind")) == ""


def said_of(capfd, optimizer, *steps):
    """Applies gradients of one variable, step by step; returns what rank 0 said of the verification."""
    variable = keras.Variable(np.zeros(64), dtype="float32", name="weight")
    for gradient in steps:
        optimizer.apply([tf.fill([64], gradient)], [variable])
    lines = [line for line in capfd.readouterr().err.splitlines() if "verified at step" in line]
    assert not lines or hvd.rank() == 0
    return hvd.broadcast_object(lines)


def test_zero_gradients_prove_nothing_and_the_next_ones_are_verified(capfd):
    first, second = said_of(capfd, hvd.DistributedOptimizer(SGD(0.1)), 0.0, 0.0, 0.3, 0.3)
    assert (
        "step 1: 1 variables are the same" in first
        and "The gradients are zero, so nothing is proved" in first
    )
    assert (
        "verified at step 3" in second
        and "is the average of all ranks' gradients (relative deviation" in second
    )


@pytest.mark.parametrize(
    "value, words", [(0.1, "sent as float16 (relative deviation"), (1e-9, "are zero as float16")]
)
def test_compressed_gradients_are_said_to_be_compressed(capfd, value, words):
    optimizer = hvd.DistributedOptimizer(SGD(0.1), compression=hvd.Compression.fp16)
    (said,) = said_of(capfd, optimizer, value)
    assert words in said and "deviation 1" not in said, said


def test_what_is_said_never_stands_behind_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = keras.utils.Progbar(3, interval=0)
    runtime.engine().say("before")
    for step in range(1, 4):
        bar.update(step)
        runtime.engine().say(f"after step {step}")
        runtime.engine().say("again")
    lines = terminal.getvalue().splitlines()
    said = [line for line in lines if "hvdtrain" in line]
    assert len(said) == (7 if hvd.rank() == 0 else 0)
    assert all(line.startswith("hvdtrain: ") for line in said), lines
    assert hvd.rank() or terminal.getvalue().count("\n\n") == 0
