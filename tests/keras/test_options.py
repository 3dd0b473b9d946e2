"""What each argument of DistributedOptimizer does, against the same training on one process or NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, FEATURES, assert_identical, assert_same, data, dense_model, fit, mine, twins

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks


@pytest.fixture(autouse=True)
def float64():
    keras.backend.set_floatx("float64")
    yield
    keras.backend.set_floatx("float32")


def distributed_twins(steps=6, make_model=dense_model, **options):
    """The usual twins, with arguments for the distributed one."""
    sgd = keras.optimizers.SGD
    return twins(
        make_model, lambda: sgd(0.05, momentum=0.9), steps, wrap=lambda each: wrapped(each, **options)
    )


def wrapped(optimizer, **options):
    return hvd.DistributedOptimizer(optimizer, **options)


class OneStep:
    """Applies one gradient to one variable with a learning rate of 1: what is applied can be read off."""

    def __init__(self, dtype="float32", shape=(3,), **options):
        self.variable = keras.Variable(np.zeros(shape), dtype=dtype, name="w")
        self.optimizer = wrapped(keras.optimizers.SGD(1.0), **options)
        self.optimizer.build([self.variable])

    def apply(self, gradient):
        self.optimizer.apply([gradient])
        return -np.asarray(self.variable)


@pytest.mark.parametrize("kind, close", [("none", 1e-10), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_compression(kind, close):
    assert_same(*distributed_twins(compression=getattr(hvd.Compression, kind)), rtol=close)


@pytest.mark.parametrize("kind, close", [("fp16", 1e-3), ("bf16", 8e-3)])
def test_large_gradients_travel_in_sixteen_bits(kind, close):
    every = [
        np.random.default_rng(rank).standard_normal((400, 500)).astype("float32")
        for rank in range(hvd.size())
    ]
    step = OneStep(shape=(400, 500), compression=getattr(hvd.Compression, kind))
    applied = step.apply(tf.constant(every[hvd.rank()]))
    np.testing.assert_allclose(applied, np.mean(every, axis=0), atol=4 * close)
    assert len(set(hvd.allgather_object(applied.tobytes()))) == 1


def test_a_compressor_of_ones_own():
    class Halves:
        @staticmethod
        def compress(tensor):
            return tensor / 2, "halved"

        @staticmethod
        def decompress(tensor, ctx):
            assert ctx == "halved"
            return tensor * 2

    assert_same(*distributed_twins(compression=Halves))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 4.0, 1000.0])
def test_predivision_leaves_the_mean_as_it_is(factor):
    assert_same(*distributed_twins(gradient_predivide_factor=factor))


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(num_groups=2), dict(groups=3), dict(groups=99), dict(groups=0)])
def test_a_number_of_groups(options):
    assert_same(*distributed_twins(**options))


def test_groups_of_variables():
    model = dense_model()
    first, second, *_ = model.trainable_variables
    model.compile(wrapped(keras.optimizers.SGD(0.1), groups=[[first, second]]), "mse")
    x, y = data(3)
    fit(model, mine(x), mine(y), BATCH)
    assert_identical(model)
    assert_same(*distributed_twins(groups=[[]]))


def test_groups_of_two_dtypes():
    variables = [keras.Variable(np.zeros(2), dtype=each) for each in ("float32", "float64", "float32")]
    optimizer = wrapped(keras.optimizers.SGD(1.0), groups=[variables])
    optimizer.build(variables)
    optimizer.apply([tf.cast(tf.fill([2], float(hvd.rank())), each.dtype) for each in variables])
    for each in variables:
        np.testing.assert_allclose(-np.asarray(each), np.mean(range(hvd.size())))


@pytest.mark.parametrize("op", [hvd.Sum, "sum", 1])
def test_sum(op):
    applied = OneStep(op=op).apply(tf.fill([3], float(hvd.rank() + 1)))
    np.testing.assert_allclose(applied, sum(range(1, hvd.size() + 1)))


@pytest.mark.parametrize("compiled", [False, True])
def test_adasum(compiled):
    gradient = np.zeros(hvd.size())
    gradient[hvd.rank()] = 3.0
    step = OneStep(shape=(hvd.size(),), op=hvd.Adasum)
    apply = tf.function(step.optimizer.apply) if compiled else step.optimizer.apply
    apply([tf.constant(gradient, tf.float32)])
    np.testing.assert_allclose(-np.asarray(step.variable), 3.0, rtol=1e-6)  # orthogonal: added


def test_adasum_trains():
    model = dense_model()
    model.compile(wrapped(keras.optimizers.Adam(0.01), op=hvd.Adasum), "mse")
    x, y = data(5)
    fit(model, mine(x), mine(y), BATCH)
    assert_identical(model)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_reduction_a_window(average, compiled, engine, monkeypatch):
    step = OneStep(
        backward_passes_per_step=3, average_aggregated_gradients=average, name=f"window{average}{compiled}"
    )
    apply = tf.function(step.optimizer.apply) if compiled else step.optimizer.apply
    total = 0.0
    for number in range(6):
        apply([tf.fill([3], float(hvd.rank() + number))])
        total += np.mean([rank + number for rank in range(hvd.size())])
        applied = -np.asarray(step.variable)
        if number == 1:
            np.testing.assert_array_equal(applied, 0.0)
        if number in (2, 5):
            np.testing.assert_allclose(applied, total / (3 if average else 1), rtol=1e-6)


def test_a_window_costs_one_reduction(engine, monkeypatch):
    if engine.size == 1:
        pytest.skip("a world of one reduces nothing")
    calls, agree = [], type(engine).agree
    monkeypatch.setattr(
        type(engine), "agree", lambda self, call, *sizes: calls.append(call) or agree(self, call, *sizes)
    )
    step = OneStep(backward_passes_per_step=4, name="counted")
    for _ in range(8):
        step.apply(tf.ones([3]))
    assert len([call for call in calls if call.kind.startswith("counted")]) == 2


def test_a_window_equals_its_whole_batch():
    steps = 6
    x, y = data(steps)
    model = dense_model()
    options = dict(backward_passes_per_step=3, average_aggregated_gradients=True)
    model.compile(wrapped(keras.optimizers.SGD(0.05, momentum=0.9), **options), "mse")
    fit(model, mine(x), mine(y), BATCH)
    twin = dense_model()
    twin.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", run_eagerly=True)
    for start in range(0, steps, 3):
        twin.train_on_batch(
            x[start : start + 3].reshape(-1, FEATURES), y[start : start + 3].reshape(-1, y.shape[-1])
        )
    assert_same(model, [each.numpy() for each in twin.weights])


def test_a_window_with_sparse_gradients():
    table = keras.Variable(np.zeros((5, 2)), dtype="float32", name="table")
    optimizer = wrapped(keras.optimizers.SGD(1.0), backward_passes_per_step=2)
    optimizer.build([table])
    for row in (1, 3):
        values = tf.fill([1, 2], float(hvd.rank() + 1))
        optimizer.apply([tf.IndexedSlices(values, tf.constant([row]), tf.constant([5, 2]))])
    expected = np.zeros((5, 2))
    expected[[1, 3]] = np.mean(range(1, hvd.size() + 1))
    np.testing.assert_allclose(-np.asarray(table), expected)


def test_local_variables_stay_local():
    shared = keras.Variable(np.zeros(2), dtype="float32", name="shared")
    own = keras.Variable(np.zeros(2), dtype="float32", name="own")
    for scaled in (True, False):
        optimizer = wrapped(keras.optimizers.SGD(1.0), scale_local_gradients=scaled)
        optimizer.register_local_var(own)
        optimizer.build([shared, own])
        for each in (shared, own):
            each.assign(np.zeros(2))
        gradient = tf.fill([2], float(hvd.rank() + 1))
        optimizer.apply([gradient, gradient])
        np.testing.assert_allclose(-np.asarray(shared), np.mean(range(1, hvd.size() + 1)))
        np.testing.assert_allclose(-np.asarray(own), (hvd.rank() + 1) / (hvd.size() if scaled else 1))


def test_local_layers_of_a_model():
    model = dense_model()
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.Adam(0.05), local_layers=[model.layers[0]])
    model.compile(optimizer, "mse")
    x, y = data(4)
    fit(model, mine(x), mine(y), BATCH)
    ours = [np.asarray(each).tobytes() for each in model.weights]
    for index, values in enumerate(zip(*hvd.allgather_object(ours), strict=True)):
        assert len(set(values)) == (hvd.size() if index < 2 else 1)


def test_a_local_layer_must_be_built_and_a_layer():
    with pytest.raises(ValueError, match="has no weights yet"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=keras.layers.Dense(2))
    with pytest.raises(TypeError, match="takes Keras layers"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=[3])


@pytest.fixture
def halves():
    if hvd.size() < 2:
        pytest.skip("needs two ranks")
    middle = hvd.size() // 2
    sets = [hvd.add_process_set(range(middle)), hvd.add_process_set(range(middle, hvd.size()))]
    yield sets
    for each in sets:
        hvd.remove_process_set(each)


def test_two_models_train_at_once_on_two_halves_of_the_world(halves):
    mine_is = next(index for index, each in enumerate(halves) if each.included())
    half = halves[mine_is]
    model = dense_model(seed=mine_is)
    if mine_is:
        model.add(keras.layers.Dense(3, dtype="float64"))
    model.compile(wrapped(keras.optimizers.Adam(0.01), process_set=half), "mse")
    for each in model.weights:
        each.assign(np.random.default_rng(each.shape[0]).standard_normal(each.shape))
    x, y = data(3 + 2 * mine_is)  # one half takes more steps than the other
    fit(model, mine(x), mine(y), BATCH)
    told = hvd.allgather_object([np.asarray(each).tobytes() for each in model.weights])
    assert all(told[rank] == told[hvd.rank()] for rank in half.ranks)
    assert told[0] != told[-1]


def test_outside_its_process_set_an_optimizer_trains_by_itself(halves):
    step = OneStep(process_set=halves[0])
    applied = step.apply(tf.fill([3], float(hvd.rank())))
    expected = np.mean(halves[0].ranks) if halves[0].included() else hvd.rank()
    np.testing.assert_allclose(applied, expected)


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(op=hvd.Min), ValueError, "hvd.Average, hvd.Sum or hvd.Adasum"),
        (dict(gradient_predivide_factor=2.0, op=hvd.Sum), ValueError, "needs op=hvd.Average"),
        (dict(backward_passes_per_step=0), ValueError, "at least 1"),
        (dict(backward_passes_per_step=1.5), ValueError, "at least 1"),
        (dict(groups=-1), ValueError, "groups is a number"),
        (dict(groups="all"), ValueError, "groups is a number"),
        (dict(groups=[1, 2]), ValueError, "groups is a number"),
        (dict(compression="fp16"), TypeError, "hvd.Compression.none"),
    ],
)
def test_arguments_that_make_no_sense(options, error, match):
    with pytest.raises(error, match=match):
        wrapped(keras.optimizers.SGD(), **options)


def test_two_ways_of_accumulating_are_one_too_many():
    with pytest.raises(ValueError, match="not both"):
        wrapped(keras.optimizers.SGD(gradient_accumulation_steps=2), backward_passes_per_step=2)


def test_adasum_of_sparse_gradients_names_the_way_out():
    if hvd.size() == 1:
        pytest.skip("a world of one reduces nothing")
    table = keras.Variable(np.zeros((5, 2)), dtype="float32", name="table")
    optimizer = wrapped(keras.optimizers.SGD(1.0), op=hvd.Adasum)
    optimizer.build([table])
    with pytest.raises(NotImplementedError, match="sparse_as_dense=True"):
        optimizer.apply([tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([5, 2]))])


def test_every_positional_argument_of_horovod():
    hvd.DistributedOptimizer(
        keras.optimizers.SGD(), None, "", "", hvd.Compression.none, False, 1.0, hvd.Average, 1, False, 0, None,
        hvd.global_process_set, True,
    )  # fmt: skip


def test_inside_a_loss_scale_optimizer():
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1.0)
    optimizer = wrapped(scaler, backward_passes_per_step=2)
    own, shared = (keras.Variable(np.zeros(2), dtype="float32") for _ in range(2))
    optimizer.register_local_var(own)
    optimizer.build([own, shared])
    for _ in range(2):
        optimizer.apply([tf.fill([2], float(hvd.rank()))] * 2)
    np.testing.assert_allclose(-np.asarray(own), 2 * hvd.rank() / hvd.size())
    np.testing.assert_allclose(-np.asarray(shared), 2 * np.mean(range(hvd.size())))
