"""Every operation of every engine against NumPy, on as many ranks as the tests were launched with.

Each rank can compute what every other rank holds, so the expected result needs no communication.
"""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdtrain.collectives.engine import Call, MismatchError, Op
from hvdtrain.collectives.mpi.engine import PIECE_BYTES

pytestmark = pytest.mark.ranks

# All ranks must draw the same examples, in the same number: a deadline or a database would part them.
together = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

OPS = [op for op in Op if op is not Op.ADASUM]
FLOATS = ["float32", "float64"]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint32"]
shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def held_by(rank, shape, dtype, seed=0):
    """What a rank holds; small integers, so that sums and products are exact in every dtype."""
    values = np.random.default_rng([seed, rank]).integers(0, 4, size=shape)
    return values.astype(_dtype(dtype))


def _dtype(name):
    if name == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def reduced(engine, op, shape, dtype, seed=0):
    every = np.stack([held_by(rank, shape, dtype, seed) for rank in range(engine.size)])
    if op is Op.AVERAGE:
        mean = every.astype(np.float64).sum(0) / engine.size
        return (np.trunc(mean) if np.dtype(every.dtype).kind in "iu" else mean).astype(every.dtype)
    function = {Op.SUM: np.sum, Op.MIN: np.min, Op.MAX: np.max, Op.PRODUCT: np.prod}[op]
    return function(every, axis=0).astype(every.dtype)


@together
@given(
    shape=shapes,
    dtype=st.sampled_from([*FLOATS, *INTEGERS]),
    op=st.sampled_from(OPS),
    seed=st.integers(0, 99),
)
def test_allreduce_is_numpys_reduction_over_the_ranks(engine, shape, dtype, op, seed):
    mine = held_by(engine.rank, shape, dtype, seed)
    before = mine.copy()
    result = engine.allreduce(mine, op)
    expected = reduced(engine, op, shape, dtype, seed)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    np.testing.assert_array_equal(mine, before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_floats_are_summed_in_float32_and_rounded_once(engine, dtype):
    # In the 16-bit type itself, 256 + 0.5 + 0.5 would lose both halves.
    mine = np.array([256.0 if engine.rank == 0 else 0.5]).astype(_dtype(dtype))
    exact = np.float32(256 + 0.5 * (engine.size - 1))
    assert engine.allreduce(mine, "sum")[0] == exact.astype(_dtype(dtype))
    assert engine.allreduce(mine, "average")[0] == (exact / engine.size).astype(_dtype(dtype))


@pytest.mark.parametrize("op, function", [("min", np.min), ("max", np.max), ("product", np.min)])
def test_bool_reduces_as_all_and_any(engine, op, function):
    every = np.stack([np.arange(4) % (rank + 2) == 0 for rank in range(engine.size)])
    np.testing.assert_array_equal(engine.allreduce(every[engine.rank], op), function(every, axis=0))


def test_average_of_integers_rounds_toward_zero(engine):
    mine = np.array([7 * (engine.rank + 1), -7 * (engine.rank + 1)], np.int64)
    total = 7 * sum(range(1, engine.size + 1))
    np.testing.assert_array_equal(
        engine.allreduce(mine), [int(total / engine.size), -int(total / engine.size)]
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_averages_of_small_integers_do_not_overflow(engine, dtype):
    most = np.array([np.iinfo(dtype).max], dtype)
    assert engine.allreduce(most) == most
    assert engine.grouped_allreduce([most, most])[1] == most
    assert engine.reducescatter(np.repeat(most, engine.size)) == most


def test_the_other_byte_order_is_understood(engine):
    np.testing.assert_array_equal(engine.allreduce(np.arange(3, dtype=">f4")), np.arange(3))
    np.testing.assert_array_equal(engine.broadcast(np.arange(3, dtype=">i8")), np.arange(3))


def test_an_output_that_overlaps_its_input_by_half(engine):
    buffer = np.arange(6.0)
    np.testing.assert_array_equal(
        engine.allreduce(buffer[0:4], "sum", out=buffer[2:6]), np.arange(4) * engine.size
    )


def test_allreduce_in_place_gives_the_array_itself(engine):
    mine = np.full((3, 2), engine.rank, np.float32)
    assert engine.allreduce(mine, "sum", out=mine) is mine
    np.testing.assert_array_equal(mine, np.full((3, 2), sum(range(engine.size))))


def test_allreduce_takes_what_is_not_contiguous_and_what_is_no_array(engine):
    mine = np.arange(12.0).reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(engine.allreduce(mine), mine)
    assert engine.allreduce(engine.rank, "max") == engine.size - 1


def test_allreduce_of_more_than_one_piece(engine):
    count = 2 * PIECE_BYTES // 4 + 3
    mine = np.arange(count, dtype=np.float32) % 97 + engine.rank
    result = engine.allreduce(mine, "sum")
    expected = np.arange(count, dtype=np.float32) % 97 * engine.size + sum(range(engine.size))
    np.testing.assert_array_equal(result, expected)


def test_results_are_the_same_to_the_bit_on_all_ranks(engine):
    mine = np.random.default_rng(engine.rank).standard_normal(100_003).astype(np.float32)
    digests = engine.allgather_object(engine.allreduce(mine).tobytes())
    assert all(digest == digests[0] for digest in digests)


@together
@given(
    members=st.lists(
        st.tuples(shapes, st.sampled_from(["float16", "float32", "float64", "int32"])), max_size=8
    ),
    op=st.sampled_from([Op.AVERAGE, Op.SUM, Op.MAX]),
)
def test_grouped_allreduce_is_allreduce_of_each(engine, members, op):
    mine = [held_by(engine.rank, shape, dtype, seed) for seed, (shape, dtype) in enumerate(members)]
    results = engine.grouped_allreduce(mine, op)
    assert len(results) == len(members)
    for seed, ((shape, dtype), result) in enumerate(zip(members, results, strict=True)):
        expected = reduced(engine, op, shape, dtype, seed)
        assert result.dtype == expected.dtype and result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-3 if dtype == "float16" else 1e-6)


def test_results_of_one_grouped_allreduce_outlive_the_next(engine):
    first = engine.grouped_allreduce([np.full(5, 1.0), np.full(100_000, 2.0)], "sum")
    engine.grouped_allreduce([np.full(5, 10.0), np.full(100_000, 20.0)], "sum")
    np.testing.assert_array_equal(first[0], np.full(5, 1.0 * engine.size))
    np.testing.assert_array_equal(first[1], np.full(100_000, 2.0 * engine.size))


@together
@given(
    inner=shapes,
    dtype=st.sampled_from(["float16", "float32", "int64", "bool", "complex64"]),
    seed=st.integers(0, 9),
)
def test_allgather_joins_uneven_first_dimensions(engine, inner, dtype, seed):
    every = [held_by(rank, ((rank * 2 + seed) % 4, *inner), dtype, seed) for rank in range(engine.size)]
    result = engine.allgather(every[engine.rank])
    assert result.dtype == every[0].dtype
    np.testing.assert_array_equal(result, np.concatenate(every))


def test_allgather_of_numbers_gives_one_entry_a_rank(engine):
    np.testing.assert_array_equal(engine.allgather(engine.rank), np.arange(engine.size))


@together
@given(shape=shapes, dtype=st.sampled_from(["float16", "float64", "uint64", "bool"]), data=st.data())
def test_broadcast_gives_the_roots_values(engine, shape, dtype, data):
    root = data.draw(st.integers(0, engine.size - 1))
    result = engine.broadcast(held_by(engine.rank, shape, dtype), root)
    np.testing.assert_array_equal(result, held_by(root, shape, dtype))


@together
@given(
    rows=st.integers(0, 9),
    inner=shapes,
    dtype=st.sampled_from(["float16", *FLOATS, "int32"]),
    op=st.sampled_from(OPS),
)
def test_reducescatter_gives_each_rank_its_rows(engine, rows, inner, dtype, op):
    result = engine.reducescatter(held_by(engine.rank, (rows, *inner), dtype), op)
    expected = np.array_split(reduced(engine, op, (rows, *inner), dtype), engine.size)[engine.rank]
    np.testing.assert_allclose(result, expected, rtol=1e-3 if dtype == "float16" else 1e-6)


def test_alltoall_sends_the_rows_that_splits_name(engine):
    # Rank s sends d + s rows to rank d, each holding (s, d).
    def parcel(source, target):
        return np.tile(np.array([[source, target]], np.float32), (source + target, 1))

    mine = np.concatenate([parcel(engine.rank, target) for target in range(engine.size)])
    splits = [engine.rank + target for target in range(engine.size)]
    received, counts = engine.alltoall(mine, splits)
    np.testing.assert_array_equal(counts, [source + engine.rank for source in range(engine.size)])
    np.testing.assert_array_equal(
        received, np.concatenate([parcel(source, engine.rank) for source in range(engine.size)])
    )


def test_alltoall_without_splits_sends_equal_parts(engine):
    received, counts = engine.alltoall(np.full(2 * engine.size, engine.rank))
    np.testing.assert_array_equal(received, np.repeat(np.arange(engine.size), 2))
    np.testing.assert_array_equal(counts, np.full(engine.size, 2))


def test_objects_travel(engine):
    mine = {"rank": engine.rank, "text": "é" * engine.rank}
    assert engine.allgather_object(mine) == [{"rank": r, "text": "é" * r} for r in range(engine.size)]
    root = engine.size - 1
    assert engine.broadcast_object(mine, root) == {"rank": root, "text": "é" * root}
    gathered = engine.gather_object(engine.rank, root)
    assert gathered == (list(range(engine.size)) if engine.rank == root else None)
    engine.barrier()


def test_the_world_adds_up(engine):
    world = engine.world
    places = engine.allgather_object((world.rank, world.local_rank, world.local_size, world.cross_rank))
    assert [place[0] for place in places] == list(range(engine.size))
    assert 0 <= world.local_rank < world.local_size and 0 <= world.cross_rank < world.cross_size
    assert len({(local, cross) for _, local, _, cross in places}) == engine.size


# Ranks that ask for different things. Each must end at once, on all ranks, with the same explanation.


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        (lambda e: e.allreduce(np.zeros(3)), lambda e: e.allreduce(np.zeros(4)), ["(3,)", "(4,)"]),
        (
            lambda e: e.allreduce(np.zeros(3)),
            lambda e: e.allreduce(np.zeros(3, np.float32)),
            ["float64", "float32"],
        ),
        (lambda e: e.allreduce(np.zeros(3)), lambda e: e.allreduce(np.zeros(3), "sum"), ["average", "sum"]),
        (lambda e: e.allreduce(np.zeros(3)), lambda e: e.broadcast(np.zeros(3)), ["allreduce", "broadcast"]),
        (
            lambda e: e.allgather(np.zeros((1, 2))),
            lambda e: e.allgather(np.zeros((1, 3))),
            ["(any, 2)", "(any, 3)"],
        ),
        (
            lambda e: e.broadcast_object(1, 0),
            lambda e: e.broadcast_object(1, 1),
            ["root_rank=0", "root_rank=1"],
        ),
        (
            lambda e: e.agree(Call("step", ("a", "b"))),
            lambda e: e.agree(Call("step", ("a",))),
            ["b", "nothing more"],
        ),
    ],
)
def test_ranks_that_disagree_are_named_on_every_rank(engine, ours, theirs, words):
    if engine.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(MismatchError) as caught:
        (theirs if engine.rank == 1 else ours)(engine)
    message = str(caught.value)
    assert "rank 1" in message and all(word in message for word in words)
    assert len(set(engine.allgather_object(message))) == 1


@pytest.mark.parametrize("function", ["allgather_object", "gather_object", "broadcast_object"])
@pytest.mark.parametrize("everywhere", [True, False], ids=["all ranks", "one rank"])
def test_an_object_that_cannot_be_pickled_is_an_error_of_all_ranks(engine, function, everywhere):
    root = engine.size - 1
    value = threading.Lock() if everywhere or engine.rank == root else "fine"
    call = getattr(engine, function)
    with pytest.raises((TypeError, MismatchError)) as caught:
        call(value) if function == "allgather_object" else call(value, root)
    received = "expected an object that can be pickled. Received: an object of type lock"
    assert received in str(caught.value)
    broken = engine.rank == root or (everywhere and function != "broadcast_object")
    assert isinstance(caught.value, TypeError if broken else MismatchError)
    if engine.size > 1 and not broken:
        assert f"rank {root}" in str(caught.value)
    assert engine.allgather_object(engine.rank) == list(range(engine.size))


# Wrong arguments, the same on all ranks.


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda e: e.allreduce(np.zeros(2, complex)), TypeError, "complex128"),
        (lambda e: e.allreduce(np.zeros(2, bool), "sum"), TypeError, "cast to int32"),
        (lambda e: e.allreduce(np.array(["a", None], object)), TypeError, "allgather_object"),
        (lambda e: e.allreduce(np.zeros(2), "median"), ValueError, "average"),
        (lambda e: e.allgather(np.ma.masked_array([1, 2], [0, 1])), TypeError, "lose its mask"),
        (lambda e: e.allreduce(np.zeros(2), out=np.zeros(3)), ValueError, "(3,)"),
        (lambda e: e.broadcast(np.zeros(2), 99), ValueError, "root_rank=99"),
        (lambda e: e.broadcast(np.zeros(2), -1), ValueError, "root_rank=-1"),
        (lambda e: e.reducescatter(np.float32(1)), ValueError, "scalar"),
        (lambda e: e.alltoall(np.zeros(3), [99] * e.size), ValueError, "splits"),
        (lambda e: e.alltoall(np.zeros(3), [3] * (e.size + 1)), ValueError, "splits"),
    ],
)
def test_wrong_arguments_are_answered_with_what_was_expected(engine, call, error, words):
    with pytest.raises(error) as caught:
        call(engine)
    assert words in str(caught.value)


def test_operations_while_tensorflow_traces_a_function(engine):
    tf = pytest.importorskip("tensorflow")
    seen = []

    @tf.function
    def traced():
        seen.append(engine.allreduce(np.array([engine.rank + 1.0]), "sum")[0])
        seen.append(engine.broadcast_object({"of": engine.rank}, 0)["of"])
        seen.append(engine.alltoall(np.full(engine.size, engine.rank), [1] * engine.size)[0].tolist())
        return tf.constant(0)

    traced()
    assert seen == [engine.size * (engine.size + 1) / 2, 0, list(range(engine.size))]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_an_integer_mean_that_becomes_zero_is_told_once(engine, capfd, monkeypatch, dtype):
    monkeypatch.setattr(engine, "warned_of_zeros", False)
    last = engine.rank == engine.size - 1
    engine.allreduce(np.array([engine.size, -engine.size * last], dtype))  # the sums divide by the size
    assert "warning" not in capfd.readouterr().err
    for _ in range(2):
        np.testing.assert_array_equal(
            engine.allreduce(np.array([0, int(last)], dtype)), [0, int(engine.size == 1)]
        )
    told = capfd.readouterr().err
    assert told.count("a mean of integers was rounded to 0: the sum 1 of") == (
        engine.rank == 0 < engine.size - 1
    )
