"""allreduce, grouped_allreduce, reducescatter: what they compute, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks

INTEGERS = ["uint8", "int8", "uint16", "int16", "int32", "int64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
COMBINED = {
    hvd.Sum: lambda each: each.sum(0),
    hvd.Average: lambda each: each.sum(0) / len(each),
    hvd.Min: lambda each: each.min(0),
    hvd.Max: lambda each: each.max(0),
    hvd.Product: lambda each: each.prod(0),
}


def of_rank(rank, shape, dtype):
    """Small whole numbers, so that every dtype holds every result."""
    values = np.random.default_rng(rank).integers(0, 3, shape)
    return tf.cast(values, dtype)


def of_all(shape, dtype, ranks=None):
    ranks = range(hvd.size()) if ranks is None else ranks
    return np.stack([of_rank(rank, shape, dtype).numpy().astype(np.float64) for rank in ranks])


def assert_is(result, expected, dtype, shape=None):
    assert result.dtype == tf.as_dtype(dtype) and result.shape == np.shape(expected)
    if tf.as_dtype(dtype).is_integer:
        expected = np.trunc(expected)
    rtol = 1e-2 if dtype in ("float16", "bfloat16") else 1e-6
    np.testing.assert_allclose(tf.cast(result, tf.float64), expected, rtol=rtol)


@pytest.mark.parametrize("op", COMBINED, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_every_operation_of_every_dtype_and_shape(op, dtype):
    for shape in [(), (5,), (3, 4), (2, 3, 2), (0, 3)]:
        result = hvd.allreduce(of_rank(hvd.rank(), shape, dtype), op=op)
        assert_is(result, COMBINED[op](of_all(shape, dtype)), dtype)


def test_bools_are_combined_by_all_and_any(run):
    mine = np.array([hvd.rank() == 0, True, False])
    both = run(lambda each: [hvd.allreduce(each, op=hvd.Max), hvd.allreduce(each, op=hvd.Min)], mine)
    np.testing.assert_array_equal(both[0], [True, True, False])
    np.testing.assert_array_equal(both[1], [hvd.size() == 1, True, False])


def test_in_every_mode(run):
    def reduce(tensor):
        assert tensor.shape == hvd.allreduce(tensor).shape
        return [hvd.allreduce(tensor, op=op) for op in COMBINED]

    mine = of_rank(hvd.rank(), (3, 2), "float32").numpy()
    for result, combined in zip(run(reduce, mine), COMBINED.values(), strict=True):
        np.testing.assert_allclose(result, combined(of_all((3, 2), "float32")), rtol=1e-6)


def test_shapes_that_show_only_as_the_graph_runs():
    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def reduce(tensor):
        return hvd.allreduce(tensor, op=hvd.Sum), hvd.allgather(tensor), hvd.reducescatter(tensor, op=hvd.Sum)

    reduced, gathered, scattered = reduce(tf.ones([hvd.size(), 2]))
    np.testing.assert_array_equal(reduced, np.full((hvd.size(), 2), hvd.size()))
    assert gathered.shape == (hvd.size() ** 2, 2) and scattered.shape == (1, 2)


@pytest.mark.parametrize(
    "make",
    [
        np.float32,
        float,
        lambda value: np.array([value], np.float64),
        lambda value: [float(value)],
        lambda value: tf.Variable([float(value)]),
        lambda value: keras.Variable([float(value)]),
    ],
    ids=["scalar", "number", "array", "list", "variable", "keras variable"],
)
def test_values_of_any_kind(make):
    result = hvd.allreduce(make(hvd.rank()), op=hvd.Sum)
    assert tf.is_tensor(result) and np.ravel(result)[0] == sum(range(hvd.size()))


@pytest.mark.parametrize(("average", "factor"), [(True, 1), (False, None)])
def test_the_older_argument_average(average, factor):
    with pytest.warns(DeprecationWarning, match="op="):
        result = hvd.allreduce(tf.ones([2]), average)
    np.testing.assert_allclose(result, np.full(2, factor or hvd.size()), rtol=1e-6)
    with pytest.warns(DeprecationWarning, match="op="):
        (result,) = hvd.grouped_allreduce([tf.ones([2])], average=average)
    np.testing.assert_allclose(result, np.full(2, factor or hvd.size()), rtol=1e-6)


@pytest.mark.parametrize(
    "reduce", [hvd.allreduce, lambda each, **options: hvd.grouped_allreduce([each], **options)]
)
def test_average_and_op_exclude_each_other(reduce):
    with pytest.raises(ValueError, match="one of them"):
        reduce(tf.ones([2]), average=True, op=hvd.Sum)


def test_a_mean_of_integers_is_cut_off_toward_zero():
    mine = tf.constant([-1, 1, 7], tf.int32) * (hvd.rank() + 1)
    total = np.array([-1, 1, 7]) * sum(range(1, hvd.size() + 1))
    np.testing.assert_array_equal(hvd.allreduce(mine), np.trunc(total / hvd.size()))


def test_a_mean_of_small_integers_does_not_overflow():
    np.testing.assert_array_equal(hvd.allreduce(tf.constant([200, 255], tf.uint8)), [200, 255])
    scaled = hvd.allreduce(tf.constant([200], tf.uint8), postscale_factor=0.5)
    np.testing.assert_array_equal(scaled, [100])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("before", "after"), [(0.37, 1.0), (1.0, 2.3), (0.37, 2.3)])
def test_factors_before_and_after(dtype, before, after):
    mine = tf.cast(tf.reshape(tf.range(12), [3, 4]), dtype)
    wide = {"int32": "float64", "int64": "float64", "uint8": "float64", "float64": "float64"}.get(
        dtype, "float32"
    )
    small = tf.cast(tf.cast(mine, wide) * tf.constant(before, wide), dtype)
    total = tf.cast(small, wide) * hvd.size()
    result = hvd.allreduce(mine, op=hvd.Sum, prescale_factor=before, postscale_factor=after)
    expected = tf.cast(tf.cast(tf.cast(total, dtype), wide) * tf.constant(after, wide), dtype)
    np.testing.assert_allclose(
        tf.cast(result, tf.float64), tf.cast(expected, tf.float64), rtol=1e-2 if "16" in dtype else 1e-6
    )
    mean = hvd.allreduce(mine, prescale_factor=before, postscale_factor=after)
    expected = tf.cast(tf.cast(small, wide) * tf.constant(after, wide), dtype)
    atol = (
        1 if tf.as_dtype(dtype).is_integer else 0
    )  # sum * (after / size) may fall just below a whole number
    np.testing.assert_allclose(
        tf.cast(mean, tf.float64),
        tf.cast(expected, tf.float64),
        rtol=1e-2 if "16" in dtype else 1e-6,
        atol=atol,
    )


def test_groups_of_mixed_dtypes_and_shapes(run):
    kinds = [("float32", (3,)), ("float64", (2, 2)), ("int32", ()), ("float32", (0,)), ("float16", (5,))]
    mine = [of_rank(hvd.rank(), shape, dtype).numpy() for dtype, shape in kinds]
    results = run(lambda *each: hvd.grouped_allreduce(list(each), op=hvd.Sum), *mine)
    for result, (dtype, shape) in zip(results, kinds, strict=True):
        assert_is(tf.constant(result), of_all(shape, dtype).sum(0), dtype)


def test_groups_of_nothing():
    assert list(hvd.grouped_allreduce([])) == list(hvd.grouped_allgather([])) == []
    assert list(hvd.grouped_reducescatter([])) == []


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average])
def test_rows_of_sparse_tensors_are_gathered(op):
    mine = tf.IndexedSlices(
        tf.fill([2, 3], hvd.rank() + 1.0), tf.constant([0, hvd.rank()]), tf.constant([8, 3])
    )
    other = tf.ones([2]) * hvd.rank()
    alone = hvd.allreduce(mine, op=op)
    dense, grouped = hvd.grouped_allreduce([other, mine], op=op)
    expected = np.zeros((8, 3))
    for rank in range(hvd.size()):
        expected[0] += rank + 1
        expected[rank] += rank + 1
    share = 1 if op == hvd.Sum else hvd.size()
    for result in (alone, grouped):
        assert isinstance(result, tf.IndexedSlices) and result.values.shape == (2 * hvd.size(), 3)
        np.testing.assert_allclose(tf.convert_to_tensor(result), expected / share, rtol=1e-6)
    np.testing.assert_allclose(dense, np.full(2, sum(range(hvd.size())) / share), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"op": hvd.Adasum}, {"op": hvd.Min}, {"op": hvd.Product}, {"prescale_factor": 2.0}]
)
def test_what_cannot_be_done_with_sparse_tensors(options):
    if options.get("op") == hvd.Adasum and hvd.size() & (hvd.size() - 1):
        pytest.skip("needs a power of two")
    sparse = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), tf.constant([4, 2]))
    for reduce in (hvd.allreduce, lambda each, **chosen: hvd.grouped_allreduce([each], **chosen)):
        with pytest.raises(NotImplementedError, match="sparse"):
            reduce(sparse, **options)


def test_adasum_of_equal_tensors_is_their_mean_and_of_orthogonal_ones_their_sum():
    if hvd.size() & (hvd.size() - 1):
        with pytest.raises(NotImplementedError, match="combines 2, 4, 8"):
            hvd.allreduce(tf.ones([2]), op=hvd.Adasum)
        return
    equal = tf.constant([1.0, 2.0])
    np.testing.assert_allclose(hvd.allreduce(equal, op=hvd.Adasum), equal, rtol=1e-6)
    alone = tf.one_hot(hvd.rank(), hvd.size())
    np.testing.assert_allclose(hvd.allreduce(alone, op=hvd.Adasum), np.ones(hvd.size()), rtol=1e-6)
    first, second = hvd.grouped_allreduce([equal, alone], op=hvd.Adasum)
    np.testing.assert_allclose(first, equal, rtol=1e-6)
    np.testing.assert_allclose(second, np.ones(hvd.size()), rtol=1e-6)


@pytest.mark.parametrize(("compression", "rtol"), [("none", 1e-7), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_compression_comes_back_in_the_same_dtype(compression, rtol):
    chosen = getattr(hvd.Compression, compression)
    for dtype in ("float32", "float64"):
        mine = tf.cast(tf.linspace(0.1, 0.9, 8), dtype)
        assert chosen.compress(mine)[0].dtype.size <= mine.dtype.size
        for result in (
            hvd.allreduce(mine, compression=chosen),
            hvd.grouped_allreduce([mine], compression=chosen)[0],
        ):
            assert result.dtype == mine.dtype
            np.testing.assert_allclose(result, mine, rtol=rtol)
        exact = hvd.allreduce(mine, compression=hvd.Compression.none)
        assert np.any(hvd.allreduce(mine, compression=chosen) != exact) == (compression != "none")
    np.testing.assert_array_equal(
        hvd.allreduce(tf.range(3), compression=chosen, op=hvd.Sum), np.arange(3) * hvd.size()
    )


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", "bfloat16", "float32", "float64"])
def test_reducescatter_gives_each_rank_its_rows(op, dtype):
    for rows in (2 * hvd.size(), 2 * hvd.size() + 1, 1):
        for inner in ((), (3,), (2, 2)):
            whole = COMBINED[op](of_all((rows, *inner), dtype))
            mine = hvd.reducescatter(of_rank(hvd.rank(), (rows, *inner), dtype), op=op)
            assert_is(mine, np.array_split(whole, hvd.size())[hvd.rank()], dtype)


def test_reducescatter_in_every_mode_averages_by_default(run):
    mine = of_rank(hvd.rank(), (2 * hvd.size() + 1, 2), "float32").numpy()
    whole = of_all(mine.shape, "float32")

    def scatter(tensor):
        result = hvd.reducescatter(tensor)
        assert result.shape == (2 + (hvd.rank() == 0), 2)
        return [result, *hvd.grouped_reducescatter([tensor, tensor[:, 0]], op=hvd.Sum, prescale_factor=2.0)]

    mean, *sums = run(scatter, mine)
    np.testing.assert_allclose(mean, np.array_split(whole.mean(0), hvd.size())[hvd.rank()], rtol=1e-6)
    doubled = np.array_split(2 * whole.sum(0), hvd.size())[hvd.rank()]
    np.testing.assert_allclose(sums[0], doubled, rtol=1e-6)
    np.testing.assert_allclose(sums[1], doubled[:, 0], rtol=1e-6)


def test_reducescatter_scales_and_compresses():
    mine = tf.ones([hvd.size(), 2])
    options = {"prescale_factor": 0.5, "postscale_factor": 6.0, "compression": hvd.Compression.fp16}
    np.testing.assert_allclose(hvd.reducescatter(mine, **options), np.full((1, 2), 3.0))
    np.testing.assert_allclose(
        hvd.reducescatter(mine, op=hvd.Sum, **options), np.full((1, 2), 3.0 * hvd.size())
    )


def test_the_result_is_placed_on_the_device_that_is_asked_for():
    assert hvd.allreduce(tf.ones([1]), device_dense="/cpu:0").device.endswith("CPU:0")
    assert hvd.grouped_allreduce([tf.ones([1])], device_dense="/cpu:0", device_sparse="/cpu:0")
    assert hvd.reducescatter(tf.ones([hvd.size()]), device_dense="/cpu:0").device.endswith("CPU:0")


def test_names_and_positions_of_arguments_are_horovods():
    one = tf.ones([hvd.size()])
    world = hvd.global_process_set
    for result in (
        hvd.allreduce(one, None, "", "", hvd.Compression.none, hvd.Average, 1.0, 1.0, "name", world, True),
        hvd.grouped_allreduce(
            [one], None, "", "", hvd.Compression.none, hvd.Average, 1.0, 1.0, world, True, "name"
        )[0],
        hvd.broadcast(one, 0, "name", True, world),
        hvd.alltoall(one, None, "name", True, world),
    ):
        np.testing.assert_allclose(result, one)
    for result in (
        hvd.reducescatter(one, "", hvd.Compression.none, hvd.Average, "name", world, True, 1.0, 1.0),
        hvd.grouped_reducescatter([one], "", hvd.Compression.none, hvd.Average, world, 1.0, 1.0)[0],
    ):
        np.testing.assert_allclose(result, [1.0])
    gathered = [hvd.allgather(one, "name", True, world), hvd.grouped_allgather([one], "name", True, world)[0]]
    assert [len(each) for each in gathered] == [hvd.size() ** 2] * 2
    assert len(hvd.alltoall(one, [1] * hvd.size(), "name", True, world)) == 2
