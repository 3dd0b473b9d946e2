"""Gradient tapes: what they return is the mean over all ranks, of whatever they are asked for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


def mean():
    return (hvd.size() + 1) / 2


def taped(variables, persistent=False):
    """A tape and a loss whose gradient by each element of each variable is rank + 1."""
    with tf.GradientTape(persistent=persistent) as tape:
        loss = sum((hvd.rank() + 1.0) * tf.reduce_sum(each) for each in variables)
    return tape, loss


def variables(*shapes, dtype=tf.float32):
    return [tf.Variable(tf.ones(shape, dtype), name=f"variable_{i}") for i, shape in enumerate(shapes)]


def assert_all(gradients, value):
    for gradient in tf.nest.flatten(gradients):
        np.testing.assert_allclose(gradient, np.full(gradient.shape, value), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, lambda: 1),
        ({"op": hvd.Average}, lambda: 1),
        ({"op": hvd.Sum}, hvd.size),
        ({"compression": hvd.Compression.fp16}, lambda: 1),
        ({"gradient_predivide_factor": 2.0}, lambda: 1),
        ({"groups": 2}, lambda: 1),
        ({"process_set": hvd.global_process_set}, lambda: 1),
        ({"device_dense": "/cpu:0", "device_sparse": "/cpu:0", "sparse_as_dense": True}, lambda: 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_mean_or_the_sum_of_all_ranks(wrap, options, factor):
    mine = variables((3,), (2, 2), ())

    def gradients():
        tape, loss = taped(mine)
        return hvd.DistributedGradientTape(tape, **options).gradient(loss, mine)

    result = wrap(gradients)()
    assert [each.shape for each in result] == [(3,), (2, 2), ()]
    assert_all(result, mean() * factor())


def test_groups_of_variables_and_the_older_number_of_groups():
    mine = variables((3,), (2,), (1,))
    for groups in ([[mine[0], mine[2]]], [[mine[1]], [mine[0]]]):
        tape, loss = taped(mine)
        assert_all(hvd.DistributedGradientTape(tape, groups=groups).gradient(loss, mine), mean())
    tape, loss = taped(mine)
    with pytest.warns(DeprecationWarning, match="groups"):
        tape = hvd.DistributedGradientTape(tape, num_groups=2)
    assert_all(tape.gradient(loss, mine), mean())


def test_adasum_of_equal_gradients_is_one_of_them():
    if hvd.size() & (hvd.size() - 1):
        with pytest.raises(NotImplementedError, match="2, 4, 8"):
            hvd.DistributedGradientTape(tf.GradientTape(), op=hvd.Adasum)
        return
    mine = variables((3,))
    with tf.GradientTape() as tape:
        loss = 2 * tf.reduce_sum(mine[0])
    assert_all(hvd.DistributedGradientTape(tape, op=hvd.Adasum).gradient(loss, mine), 2.0)


def test_a_tape_wrapped_before_it_records():
    mine = variables((2,))
    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = (hvd.rank() + 1.0) * tf.reduce_sum(mine[0])
    assert isinstance(tape, tf.GradientTape)
    assert_all(tape.gradient(loss, mine), mean())


def test_a_tape_wrapped_while_it_records():
    mine = variables((2,))
    with tf.GradientTape() as plain:
        tape = hvd.DistributedGradientTape(plain)
        loss = (hvd.rank() + 1.0) * tf.reduce_sum(mine[0])
    assert tape.watched_variables() == plain.watched_variables()
    assert_all(tape.gradient(loss, mine), mean())


def test_a_persistent_tape_is_used_twice_and_wrapped_twice():
    mine = variables((2,))
    plain, loss = taped(mine, persistent=True)
    of_mean, of_sum = hvd.DistributedGradientTape(plain), hvd.DistributedGradientTape(plain, op=hvd.Sum)
    for _ in range(2):
        assert_all(of_mean.gradient(loss, mine), mean())
        assert_all(of_sum.gradient(loss, mine), mean() * hvd.size())
    assert_all(plain.gradient(loss, mine), hvd.rank() + 1)


def test_a_tape_is_used_up_like_any_other():
    mine = variables((2,))
    plain, loss = taped(mine)
    tape = hvd.DistributedGradientTape(plain)
    tape.gradient(loss, mine)
    with pytest.raises(RuntimeError, match="non-persistent"):
        tape.gradient(loss, mine)


def test_sources_in_any_nest():
    mine = variables((2,), (3,), ())
    plain, loss = taped(mine, persistent=True)
    tape = hvd.DistributedGradientTape(plain)
    single = tape.gradient(loss, mine[0])
    nested = tape.gradient(loss, {"a": mine[0], "b": (mine[1], [mine[2]])})
    assert tf.is_tensor(single) and isinstance(nested["b"], tuple)
    assert_all([single, nested["a"], nested["b"]], mean())


def test_tensors_among_the_sources():
    tensor = tf.fill([2], float(hvd.rank()))
    with tf.GradientTape() as plain:
        plain.watch(tensor)
        loss = (hvd.rank() + 1.0) * tf.reduce_sum(tensor)
    assert_all(hvd.DistributedGradientTape(plain).gradient(loss, [tensor]), mean())


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
def test_what_is_not_connected(wrap):
    mine = variables((2,), (3,))

    def gradients(**options):
        tape, loss = taped(mine[:1])
        return hvd.DistributedGradientTape(tape).gradient(loss, mine, **options)

    connected, missing = wrap(gradients)()
    assert missing is None
    assert_all([connected], mean())
    _, zero = gradients(unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert_all([zero], 0)
    tape, loss = taped(mine[:1])
    assert hvd.DistributedGradientTape(tape).gradient(loss, [mine[1]]) == [None]


def test_gradients_of_the_outputs_and_positions_of_arguments():
    (mine,) = variables((2,))
    with tf.GradientTape() as plain:
        target = mine * 2
    tape = hvd.DistributedGradientTape(
        plain, "", "", hvd.Compression.none, False, hvd.Average, 1.0, 0, None, hvd.global_process_set, True
    )
    (result,) = tape.gradient(target, [mine], tf.fill([2], hvd.rank() + 1.0), True)
    assert_all([result], 2 * mean())


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients(wrap, sparse_as_dense):
    table = tf.Variable(tf.ones([4, 2]))

    def gradients():
        with tf.GradientTape() as plain:
            loss = (hvd.rank() + 1.0) * tf.reduce_sum(tf.gather(table, [0, hvd.rank() % 4]))
        tape = hvd.DistributedGradientTape(plain, sparse_as_dense=sparse_as_dense)
        (gradient,) = tape.gradient(loss, [table])
        assert isinstance(gradient, tf.IndexedSlices) != sparse_as_dense
        return tf.convert_to_tensor(gradient)

    expected = np.zeros((4, 2))
    for rank in range(hvd.size()):
        expected[0] += rank + 1
        expected[rank % 4] += rank + 1
    np.testing.assert_allclose(wrap(gradients)(), expected / hvd.size(), rtol=1e-6)


@pytest.mark.parametrize(("scale", "factor"), [(True, hvd.size), (False, lambda: 1)])
def test_local_sources_stay_on_their_rank(scale, factor):
    local, shared = variables((2,), (3,))
    plain, loss = taped([local, shared], persistent=True)
    tape = hvd.DistributedGradientTape(plain, scale_local_gradients=scale)
    tape.register_local_source(local)
    of_local, of_shared = tape.gradient(loss, [local, shared])
    assert_all([of_local], (hvd.rank() + 1) / factor())
    assert_all([of_shared], mean())
    of_local, of_shared = tape.get_local_and_global_gradients(loss, [shared, local])
    assert [pair[0] is local for pair in of_local] == [True] and [
        pair[0] is shared for pair in of_shared
    ] == [True]
    assert_all([of_local[0][1]], (hvd.rank() + 1) / factor())
    assert_all([of_shared[0][1]], mean())


def model_of_two_layers():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])


@pytest.mark.parametrize("several", [True, False])
def test_partial_tape_leaves_layers_alone(several):
    model = model_of_two_layers()
    with tf.GradientTape() as plain:
        loss = (hvd.rank() + 1.0) * tf.reduce_sum(model(tf.ones([1, 2])))
    local = model.layers[:1] if several else model.layers[0]
    tape = hvd.PartialDistributedGradientTape(plain, local_layers=local)
    of_local, of_shared = tape.get_local_and_global_gradients(loss, model.trainable_variables)
    assert [each.path for each, _ in of_local] == [each.path for each in model.layers[0].trainable_variables]
    assert [each.path for each, _ in of_shared] == [each.path for each in model.layers[1].trainable_variables]
    head = model.layers[1].kernel.numpy()[:, 0]  # by which the gradient reaches the local layer
    np.testing.assert_allclose(of_local[1][1], head * (hvd.rank() + 1) / hvd.size(), rtol=1e-6)
    assert_all([of_shared[1][1]], mean())


def test_partial_tape_without_layers_and_with_something_else():
    mine = variables((2,))
    tape, loss = taped(mine)
    assert_all(hvd.PartialDistributedGradientTape(tape).gradient(loss, mine), mean())
    with pytest.raises(ValueError, match="local_layers takes Keras layers"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[mine[0]])


def test_two_models_in_one_function():
    """As in a GAN: two tapes of one graph, which may be under way at the same time."""
    first, second = variables((3,), (3,))

    @tf.function
    def step():
        one, loss_of_one = taped([first])
        two, loss_of_two = taped([first, second])
        of_one = hvd.DistributedGradientTape(one).gradient(loss_of_one, [first])
        of_two = hvd.DistributedGradientTape(two, op=hvd.Sum).gradient(loss_of_two, [first, second])
        return of_one, of_two

    for _ in range(3):
        of_one, of_two = step()
        assert_all(of_one, mean())
        assert_all(of_two, mean() * hvd.size())


def test_a_function_traced_again_on_one_rank_only():
    mine = variables((3,))

    @tf.function
    def step(tensor):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tensor) * tf.reduce_sum(mine[0])
        return hvd.DistributedGradientTape(tape).gradient(loss, mine)

    for rows in (2, 2 + hvd.rank(), 2):  # a last batch that is longer on some ranks
        assert_all(step(tf.fill([rows], hvd.rank() + 1.0)), mean())
    other, loss = taped(mine)
    assert_all(hvd.DistributedGradientTape(other).gradient(loss, mine), mean())


def test_horovods_example_which_broadcasts_after_its_first_step():
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    optimizer = keras.optimizers.Adam(0.01)
    random = np.random.default_rng(hvd.rank())

    @tf.function
    def training_step(x, y, first_batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables, root_rank=0)
        return loss

    for batch in range(4):
        x, y = (
            random.standard_normal((4, 2)).astype("float32"),
            random.standard_normal((4, 1)).astype("float32"),
        )
        training_step(tf.constant(x), tf.constant(y), batch == 0)
    weights = hvd.allgather_object(
        [each.numpy().tobytes() for each in (*model.variables, *optimizer.variables)]
    )
    assert all(each == weights[0] for each in weights)


def test_ranks_with_gradients_of_other_variables_are_told():
    if hvd.size() < 2:
        pytest.skip("needs two ranks")
    mine = variables((2,), (3,))[: 1 + hvd.rank() % 2]
    tape, loss = taped(mine)
    with pytest.raises(hvd.MismatchError, match="variable_1"):
        hvd.DistributedGradientTape(tape).gradient(loss, mine)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"op": hvd.Min}, ValueError, "Average"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, ValueError, "gradient_predivide_factor"),
        ({"groups": -1}, ValueError, "groups"),
        ({"groups": "two"}, ValueError, "groups"),
        ({"compression": 16}, TypeError, "compression"),
    ],
)
def test_arguments_that_make_no_sense(options, error, words):
    with pytest.raises(error, match=words):
        hvd.DistributedGradientTape(tf.GradientTape(), **options)


def test_what_is_no_tape_or_distributed_already():
    with pytest.raises(TypeError, match="the tape itself"):
        hvd.DistributedGradientTape([tf.GradientTape()])
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedGradientTape(hvd.DistributedGradientTape(tf.GradientTape()))


def test_a_function_may_reduce_only_when_it_is_traced_again():
    """As in Horovod's tensorflow2_mnist_elastic.py, whose first step, without reduction, builds the model."""
    variable = tf.Variable([1.0])

    @tf.function
    def step(reducing):
        tape, loss = taped([variable])
        return (hvd.DistributedGradientTape(tape) if reducing else tape).gradient(loss, variable)

    alone, together = float(step(False)[0]), [float(step(True)[0]) for _ in range(2)]
    assert alone == hvd.rank() + 1
    assert together == [mean()] * 2


def test_a_persistent_tape_asked_twice_in_one_graph_proves_both():
    """As of a model with two losses, such as a GAN: each set of variables has its proof, in its own first step."""
    ours, theirs = variables((300, 400), (3,)), variables((2, 2))

    @tf.function
    def step():
        tape, loss = taped([*ours, *theirs], persistent=True)
        tape = hvd.DistributedGradientTape(tape)
        first, second = tape.gradient(loss, ours), tape.gradient(loss, theirs)
        for variable, gradient in zip([*ours, *theirs], [*first, *second], strict=True):
            variable.assign_sub(0.1 * gradient)
        return first, second

    for _ in range(4):
        for gradients in step():
            assert_all(gradients, mean())
    assert_all(ours, 1 - 0.4 * mean())
