"""What compression sends, applies and keeps for later, against NumPy and against training without compression."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.compression import ErrorFeedback, PowerSGD, Quantized, RandomK, Selective, TopK
from hvdtrain.gradients.compression.sparsification import largest
from hvdtrain.gradients.schemes import Group, Plain, Scheme, State

pytestmark = pytest.mark.ranks

SCHEMES = [
    Quantized(8, 64),
    Quantized(4, 32),
    Quantized(1, 96),
    TopK(0.1),
    RandomK(0.1),
    PowerSGD(2),
    PowerSGD(1, warm_start=False),
]
SHAPES = [(40, 30), (7, 3, 5, 11), (131,), (1,)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


def gradients(step=0, dtype="float64", shapes=SHAPES, rank=None):
    random = np.random.default_rng([step, hvd.rank() if rank is None else rank])
    return [(random.standard_normal(shape) * 10.0**place).astype(dtype) for place, shape in enumerate(shapes)]


def reduced(scheme, arrays, state=None, op=Op.AVERAGE, in_place=False):
    keys = [f"{place}/w" for place in range(len(arrays))]
    group = Group([*arrays], op, keys, [in_place] * len(arrays))
    return scheme.reduce(group, runtime.engine(), State() if state is None else state).arrays


def of_all_ranks(array):
    """The arrays of all ranks, stacked, in float64."""
    return np.stack(hvd.allgather_object(np.asarray(array, "float64")))


def assert_same_everywhere(arrays):
    assert len(set(hvd.allgather_object(b"".join(array.tobytes() for array in arrays)))) == 1


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM], ids=str)
@each_scheme
def test_nothing_is_lost_and_all_ranks_apply_the_same(engine, scheme, op):
    state, whole = State(), ErrorFeedback(scheme)
    combine = np.mean if op is Op.AVERAGE else np.sum
    for step in range(4):
        arrays = gradients(step)
        before = [
            state.errors.get(f"{place}/w", np.zeros(shape)).copy() for place, shape in enumerate(SHAPES)
        ]
        results = reduced(whole, [array.copy() for array in arrays], state, op, in_place=step % 2 == 1)
        assert_same_everywhere(results)
        for place, result in enumerate(results):
            left = state.errors.get(f"{place}/w", np.zeros_like(result))
            sent = arrays[place] + before[place] - left
            assert result.shape == arrays[place].shape and result.dtype == arrays[place].dtype
            scale = np.abs(of_all_ranks(arrays[place])).sum()
            np.testing.assert_allclose(
                result, combine(of_all_ranks(sent), axis=0), rtol=0, atol=1e-12 * scale
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@each_scheme
def test_narrow_dtypes(engine, scheme, dtype):
    dtype, state = tf.as_dtype(dtype).as_numpy_dtype, State()
    arrays = gradients(0, dtype, [(40, 30)])
    (result,) = reduced(ErrorFeedback(scheme), arrays, state)
    assert_same_everywhere([result.view(np.uint8)])
    assert result.dtype == dtype and state.errors["0/w"].dtype == np.float32
    sent = of_all_ranks(arrays[0].astype("float64") - state.errors["0/w"]).mean(axis=0)
    np.testing.assert_allclose(result.astype("float64"), sent, rtol=0.01, atol=1e-5)


@each_scheme
def test_what_may_not_be_overwritten_is_not(engine, scheme):
    arrays = gradients()
    for one in (scheme, ErrorFeedback(scheme), Selective(scheme)):
        reduced(one, arrays)
    for array, before in zip(arrays, gradients(), strict=True):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7), (1, 1)])
def test_what_the_codes_can_tell_is_exact(engine, bits, most):
    random = np.random.default_rng(3)
    values = (
        random.integers(-most, most + 1, (9, 64)).astype("float32") if bits > 1 else np.ones((9, 64), "f")
    )
    values[:, ::7] = most
    values *= np.where(random.random((9, 64)) < 0.5, -1, 1) * 2.0 ** random.integers(-3, 9, (9, 1))
    values = values.astype("float32")
    (result,) = reduced(Quantized(bits, 64), [values])
    np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_at_most_half_a_step_twice(engine, bits):
    most, (array,) = {8: 127, 4: 7}[bits], gradients(shapes=[(50, 33)])
    (result,) = reduced(Quantized(bits, 32), [array])
    stacked = of_all_ranks(array).reshape(hvd.size(), -1)
    steps = [
        np.abs(row).max() / most for row in np.array_split(stacked, range(32, stacked.shape[1], 32), axis=1)
    ]
    # Of each rank, and of the sum, which is at most as large as its parts together.
    allowed = np.repeat(steps, 32)[: result.size] * (0.5 + 0.5) * 1.01
    assert (np.abs(result.reshape(-1) - stacked.mean(axis=0)) <= allowed).all()


def test_signs_are_a_vote(engine):
    votes = np.where(np.random.default_rng(7).random((hvd.size(), 640)) < 0.4, -1.0, 1.0)
    (result,) = reduced(Quantized(1, 64), [votes[hvd.rank()]])
    total = votes.sum(axis=0)
    decided = total != 0
    assert decided.any()
    np.testing.assert_array_equal(np.sign(result[decided]), np.sign(total[decided]))


def test_signs_of_a_block_that_is_not_full(engine):
    rows = np.array([*np.ones(64), 1.0 if hvd.rank() % 2 else -0.9])
    (result,) = reduced(Quantized(1, 64), [rows])
    np.testing.assert_allclose(result[:64], 1)
    np.testing.assert_allclose(result[64], of_all_ranks(rows).mean(axis=0)[64], atol=1e-6)


def test_power_sgd_of_another_rank_starts_anew(engine):
    array, state = gradients(shapes=[(40, 30)])[0], State()
    reduced(PowerSGD(1), [array], state)
    (result,) = reduced(PowerSGD(3), [array], state)
    assert np.linalg.matrix_rank(result) == 3


def test_rescaled_elements_need_no_error_feedback(engine):
    with pytest.raises(ValueError, match="sent must not be rescaled"):
        reduced(ErrorFeedback(RandomK(0.1, rescale=True)), gradients(shapes=[(40, 30)]))


def test_ranks_at_different_draws_are_told(engine):
    if engine.size == 1:
        pytest.skip("one rank agrees with itself")
    state = State()
    state.shared["count/draws/0/w"] = np.array(hvd.rank())
    with pytest.raises(hvd.MismatchError, match="random elements"):
        reduced(RandomK(0.1), gradients(shapes=[(40, 30)]), state)


@pytest.mark.parametrize("scheme", [*SCHEMES, Selective(TopK(0.1), min_size=0)], ids=repr)
def test_empty_gradients(engine, scheme):
    results = reduced(scheme, [np.zeros((0, 3)), np.zeros((3, 0)), *gradients(shapes=[(5, 4)])])
    assert [result.shape for result in results] == [(0, 3), (3, 0), (5, 4)]


def test_errors_stay_with_their_variables(engine):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    variables = [keras.Variable(np.zeros((8, 8)), dtype="float64", name="kernel") for _ in range(2)]
    scheme = ErrorFeedback(TopK(0.05))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=scheme)
    optimizer.build(variables)
    optimizer.apply([tf.constant(array) for array in gradients(shapes=[(8, 8)] * 2)], variables)
    before = variables[1].numpy()
    optimizer.apply([tf.zeros((8, 8), tf.float64)], variables[1:])  # the other one is frozen now
    moved = before - variables[1].numpy()
    own = gradients(shapes=[(8, 8)] * 2)[1].reshape(-1)
    own[largest(own, 3)] = 0
    expected = np.zeros(64)
    for left in of_all_ranks(own):
        chosen = largest(left, 3)
        expected[chosen] += left[chosen] / hvd.size()
    np.testing.assert_allclose(moved.reshape(-1), expected, atol=1e-12)


def test_only_sparse_gradients(engine):
    table = keras.Variable(np.ones((10, 4)), dtype="float64", name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=CHOICES["powersgd"])
    optimizer.build([table])
    rows = tf.IndexedSlices(tf.ones((1, 4), tf.float64), tf.constant([3]), tf.constant([10, 4]))
    apply = lambda: optimizer.apply([rows], [table])  # noqa: E731
    apply()
    tf.function(apply)()
    np.testing.assert_allclose(table.numpy()[3], -1)


def test_top_k_is_the_largest_of_each_rank(engine):
    arrays = gradients()
    for array, result in zip(arrays, reduced(TopK(0.1), arrays), strict=True):
        expected = np.zeros(array.size)
        for other in of_all_ranks(array).reshape(hvd.size(), -1):
            chosen = np.argsort(-np.abs(other))[: max(1, round(0.1 * array.size))]
            expected[chosen] += other[chosen] / hvd.size()
        np.testing.assert_allclose(result.reshape(-1), expected, rtol=1e-12)


def test_random_k_reaches_all_elements_and_is_right_on_average(engine):
    array, state, seen = gradients(shapes=[(20, 10)])[0], State(), []
    mean = of_all_ranks(array).mean(axis=0)
    for _ in range(300):
        (result,) = reduced(RandomK(0.1, rescale=True), [array], state)
        chosen = result != 0
        assert chosen.sum() == 20
        np.testing.assert_allclose(result[chosen], 10 * mean[chosen], rtol=1e-12)
        seen.append(result)
    assert (np.array(seen) != 0).any(axis=0).all()
    draws = (np.array(seen) != 0).sum(axis=0)
    np.testing.assert_allclose(np.mean(seen, axis=0), mean * draws / 30, rtol=1e-9)


def test_power_sgd_finds_a_matrix_of_its_rank(engine):
    random = np.random.default_rng(11)
    left, right = random.standard_normal((40, 2)), random.standard_normal((2, 30))
    matrix = (1 + hvd.rank()) * left @ right
    results = reduced(PowerSGD(2), [matrix.reshape(5, 8, 30), matrix[0], matrix[:3, :3]])
    for result, whole in zip(results, (matrix.reshape(5, 8, 30), matrix[0], matrix[:3, :3]), strict=True):
        np.testing.assert_allclose(result, of_all_ranks(whole).mean(axis=0), atol=1e-9)


def test_power_sgd_comes_closer_with_a_warm_start(engine):
    random = np.random.default_rng(5)
    matrix = random.standard_normal((60, 50)) @ np.diag(0.7 ** np.arange(50))
    best = np.linalg.svd(matrix)[1][3:]
    distances = {}
    for warm in (True, False):
        state = State()
        for _ in range(20):
            (result,) = reduced(PowerSGD(3, warm_start=warm), [matrix], state)
        distances[warm] = np.linalg.norm(result - matrix)
    assert distances[True] < 1.001 * np.linalg.norm(best) < distances[False]


@each_scheme
def test_what_is_not_finite_stays_so(engine, scheme):
    for bad in (np.nan, np.inf, -np.inf):
        array = gradients(shapes=[(40, 30)])[0]
        if hvd.rank() == hvd.size() - 1:
            array[3, 4] = bad
        # Random elements of a gradient are finite unless the bad one is among them.
        scheme = RandomK(1.0) if isinstance(scheme, RandomK) else scheme
        state = State()
        (result,) = reduced(ErrorFeedback(scheme), [array], state)
        assert not np.isfinite(result).all()
        # A loop may drop that step, and the next ones are not spoiled by it.
        (result,) = reduced(ErrorFeedback(scheme), gradients(1, shapes=[(40, 30)]), state)
        assert np.isfinite(result).all() and np.isfinite(state.errors["0/w"]).all()


def test_small_gradients_and_the_first_steps_are_sent_as_they_are(engine):
    state = State()
    scheme = Selective(ErrorFeedback(TopK(0.01)), min_size=1000, start_after=2)
    for step in range(4):
        arrays = [*gradients(step, shapes=[(40, 30), (30, 20)]), np.arange(2000)]
        large, small, integers = reduced(scheme, arrays, state)
        np.testing.assert_allclose(small, of_all_ranks(arrays[1]).mean(axis=0), rtol=1e-12)
        np.testing.assert_array_equal(integers, arrays[2])
        if step < 2:
            np.testing.assert_allclose(large, of_all_ranks(arrays[0]).mean(axis=0), rtol=1e-12)
        else:
            assert np.count_nonzero(large) <= 12 * hvd.size()
    assert set(state.errors) == {"0/w"}


@pytest.mark.parametrize("count", [1, 100, 3000])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "ties", "zeros", "sorted", "nan"])
def test_the_largest_elements(kind, count):
    random = np.random.default_rng(2)
    values = {
        "normal": lambda: random.standard_normal(400_000),
        "heavy tails": lambda: random.standard_cauchy(400_000),
        "ties": lambda: random.integers(-3, 4, 400_000).astype("float64"),
        "zeros": lambda: np.where(random.random(400_000) < 1e-4, 1.0, 0.0),
        "sorted": lambda: np.linspace(-1, 2, 400_000),
        "nan": lambda: np.where(random.random(400_000) < 1e-3, np.nan, random.standard_normal(400_000)),
    }[kind]()
    chosen = largest(values, count)
    assert len(set(chosen.tolist())) == count == len(chosen)
    np.testing.assert_array_equal(np.sort(np.abs(values[chosen])), np.sort(np.abs(values))[-count:])


def least_squares(compression, steps=250, way="graph", variables=None):
    """Fits a matrix and a bias to data that differ between the ranks; returns the squared distance to the best."""
    random = np.random.default_rng(1)
    x, best = random.standard_normal((4 * 24, 20)), random.standard_normal((20, 30))
    mine = slice(hvd.rank(), None, hvd.size())
    kernel = keras.Variable(np.zeros((20, 30)), dtype="float64", name="kernel")
    bias = keras.Variable(np.zeros(30), dtype="float64", name="bias")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), compression=compression)
    optimizer.build([kernel, bias])
    rows, targets = tf.constant(x[mine]), tf.constant((x @ best + 1)[mine])

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((rows @ kernel.value + bias.value - targets) ** 2) * 15
        optimizer.apply(tape.gradient(loss, [kernel.value, bias.value]))

    run = step if way == "eager" else tf.function(step)
    for _ in range(steps):
        run()
    assert_same_everywhere([kernel.numpy(), bias.numpy()])
    return float(((kernel.numpy() - best) ** 2).sum())


CHOICES = {
    "int8": hvd.Compression.int8(block=32, min_size=32),
    "int4": hvd.Compression.int4(block=32, min_size=32),
    "signsgd": hvd.Compression.signsgd(block=32, min_size=32),
    "topk": hvd.Compression.topk(0.05, min_size=32),
    "randomk": hvd.Compression.randomk(0.2, min_size=32),
    "powersgd": hvd.Compression.powersgd(2, min_size=32),
}


@pytest.mark.parametrize("name", CHOICES)
def test_with_error_feedback_the_optimum_is_found(engine, name):
    assert least_squares(CHOICES[name]) < 1e-3 * least_squares(hvd.Compression.none, 0)


def test_without_error_feedback_little_of_a_small_part_arrives(engine):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    options = {"min_size": 32, "error_feedback": False}
    with_feedback = least_squares(hvd.Compression.topk(0.02, min_size=32), 200)
    assert least_squares(hvd.Compression.topk(0.02, **options), 200) > with_feedback
    assert hvd.Compression.randomk(0.1, error_feedback=False).scheme.rescale


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        (
            CHOICES["topk"],
            "applied, with what is left to later steps, is the average of all ranks' gradients",
        ),
        (CHOICES["powersgd"], "with what is left to later steps, is the average"),
        (CHOICES["int8"], "(relative deviation "),
        (
            hvd.Compression.topk(0.1, min_size=32, error_feedback=False),
            "and so are the applied gradients. Selective(scheme=TopK(ratio=0.1), min_size=32, ",
        ),
    ],
)
def test_the_verification_says_what_is_proved(engine, capfd, compression, said):
    if engine.size == 1:
        pytest.skip("one rank agrees with itself")
    least_squares(compression, 2)
    text = capfd.readouterr().err
    assert (said in text) is (hvd.rank() == 0)


class Loses(Scheme):
    """Says that it loses nothing, and loses half."""

    is_exact = True

    def __init__(self, part=lambda: 0.5):
        self.part = part

    def __repr__(self):
        return "Loses()"

    def reduce(self, group, engine, state):
        results = Plain().reduce(group, engine, state).arrays
        return group.with_arrays([result * self.part() for result in results])


@pytest.mark.parametrize(
    ("scheme", "error", "words"),
    [
        (Loses(), hvd.MismatchError, "Loses() must return, as the errors of its result, all that is not"),
        (
            Loses(lambda: hvd.rank()),
            hvd.MismatchError,
            "apply different gradients: that of kernel differs",
        ),
        (ErrorFeedback(Loses()), TypeError, "Loses() does not return what it leaves out"),
        (
            hvd.Compression.powersgd(4, min_size=601),
            ValueError,
            "PowerSGD(rank=4, warm_start=True) compresses matrices of which",
        ),
        (hvd.Compression.powersgd(400), ValueError, "Received: small gradients only"),
    ],
    ids=["half is lost", "different results", "no errors", "too small", "too many columns"],
)
@pytest.mark.parametrize("way", ["eager", "graph"], indirect=True)
def test_what_a_scheme_may_not_do_is_said_on_every_rank(engine, way, scheme, error, words):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    with pytest.raises((error, tf.errors.OpError)) as raised:
        least_squares(scheme, 1, way)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: hvd.Compression.topk(0),
            "ratio is the part of the elements that is sent.* Received: ratio=0",
        ),
        (lambda: hvd.Compression.topk(1.5), "Received: ratio=1.5"),
        (lambda: hvd.Compression.randomk("1"), "Received: ratio='1'"),
        (lambda: hvd.Compression.powersgd(0), "rank must be an integer of at least 1. Received: rank=0"),
        (lambda: hvd.Compression.int8(block=33), "block must be a multiple of 32. Received: block=33"),
        (lambda: Quantized(3), "bits must be 8, 4 or 1. Received: bits=3"),
        (lambda: hvd.Compression.topk(0.1, start_after=-1), "start_after must be an integer of at least 0"),
        (lambda: hvd.Compression.topk(0.1, min_size=1.5), "min_size must be an integer of at least 0"),
    ],
)
def test_arguments_that_mean_nothing(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_choice_that_was_not_called():
    with pytest.raises(TypeError, match=r"what a function such as hvd\.Compression\.topk\(0\.01\) returns"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=hvd.Compression.topk)


def test_other_collectives_take_no_scheme(engine):
    import hvdtrain.tensorflow as hvd_tf

    for module in (hvd, hvd_tf):
        with pytest.raises(
            TypeError, match="schemes such as topk are for the gradients of optimizers and tapes"
        ):
            module.allreduce(tf.ones(3), compression=hvd.Compression.int8())
    with pytest.raises(TypeError, match="schemes such as topk"):
        hvd_tf.grouped_allreduce([tf.ones(3)], compression=hvd.Compression.int8())


def test_a_tape_of_each_step_continues_with_the_errors_of_the_last_one(engine):
    import hvdtrain.tensorflow as hvd_tf

    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    weights = tf.Variable(np.zeros(100))
    scheme, total, applied = ErrorFeedback(TopK(0.05)), 0, 0
    for step in range(5):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weights * gradients(step, shapes=[(100,)])[0])
        applied += (
            hvd_tf.DistributedGradientTape(tape, compression=scheme).gradient(loss, [weights])[0].numpy()
        )
        total += gradients(step, shapes=[(100,)])[0]
    (state,) = (kept for kept in weights.__dict__["_hvdtrain_kept"].values() if isinstance(kept, State))
    (error,) = state.errors.values()
    np.testing.assert_allclose(applied, of_all_ranks(total - error).mean(axis=0), atol=1e-12)
    assert np.count_nonzero(applied) > 5 * engine.size
