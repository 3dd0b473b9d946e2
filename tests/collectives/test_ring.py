"""The ring in segments against NumPy: any lengths, dtypes and segment sizes, where the arrays lie and elsewhere."""

import functools
import itertools

import numpy as np
import pytest

from hvdtrain.collectives.engine import Op
from hvdtrain.collectives.mpi.hierarchical import LEAST_IN_MEMORY, LEAST_PART_BYTES, Rings, choose_rings
from hvdtrain.collectives.mpi.ring import Pipelining, Ring, in_mpi

pytestmark = pytest.mark.ranks

# Inside MPI, between looks, and now this way, now that.
WAYS_TO_WAIT = (in_mpi, lambda: 0.0, functools.partial(next, itertools.cycle([0.0, None, 0.0])))


@pytest.fixture
def ring_of():
    """Makes rings with segments of so many bytes."""
    made = []

    def ring(segment_bytes, ahead=2, comm=None):
        from mpi4py import MPI  # it starts MPI, which a process by itself has no need of

        made.append(Ring(MPI, (comm or MPI.COMM_WORLD).Dup(), Pipelining(segment_bytes, ahead)))
        return made[-1]

    yield ring
    for each in made:
        each.free()


def held_by(rank, length, dtype):
    return np.random.default_rng([rank, length]).integers(0, 50, length).astype(dtype)


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("segment_bytes", [8, 24, 1 << 20])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 1001])
@pytest.mark.parametrize("dtype", ["float64", "int16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_sums_of_every_length(engine, ring_of, ahead, segment_bytes, length, dtype, in_place):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    source = held_by(engine.rank, length, dtype)
    target = source if in_place else np.full_like(source, -1)
    finished = []

    def halve(total):
        finished.append(total.size)
        total //= 2

    for pause in WAYS_TO_WAIT:
        if in_place:
            source[...] = held_by(engine.rank, length, dtype)
        finished.clear()
        ring_of(segment_bytes, ahead).reduce([(source, target)], np.add, halve, pause)
        expected = sum(held_by(rank, length, dtype) for rank in range(engine.size)) // 2
        np.testing.assert_array_equal(target, expected)
        if not in_place:
            np.testing.assert_array_equal(source, held_by(engine.rank, length, dtype))
    assert sum(engine.allgather_object(sum(finished))) == length  # each number once, by its owner alone


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("segment_bytes", [8, 24, 1 << 20])
@pytest.mark.parametrize("lengths", [(1, 1), (0, 5, 0, 3), (1, 2, 3, 4, 5), (1000, 1, 7), (2, 1001, 2)])
def test_many_arrays_as_one(engine, ring_of, ahead, segment_bytes, lengths):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    finished = []

    def halve(total):
        finished.append(total.size)
        total /= 2

    sources = [held_by(engine.rank, length, "float64") for length in lengths]
    # Some results lie where the arrays lie, others elsewhere.
    pairs = [(each, each if number % 2 else np.full_like(each, -1)) for number, each in enumerate(sources)]
    ring_of(segment_bytes, ahead).reduce(pairs, np.add, halve)
    for (_, target), length in zip(pairs, lengths, strict=True):
        expected = sum(held_by(rank, length, "float64") for rank in range(engine.size)) / 2
        np.testing.assert_array_equal(target, expected)
    assert sum(engine.allgather_object(sum(finished))) == sum(lengths)


def test_after_a_sum_that_was_broken_off_there_is_no_other(engine, ring_of):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")

    def interrupt(*arrays, out):
        raise KeyboardInterrupt

    ring, array = ring_of(24), held_by(engine.rank, 100, "float64")
    with pytest.raises(KeyboardInterrupt):
        ring.reduce([(array, array)], interrupt, lambda segment: None)
    with pytest.raises(RuntimeError, match="was interrupted by Ctrl-C or by an error"):
        ring.reduce([(array, array)], np.add, lambda segment: None)


@pytest.mark.parametrize("length", [1, 3, 1001])
def test_around_each_host_and_between_hosts(engine, ring_of, length):
    """Two ranks a host, as the ring sees it, whatever this machine is."""
    if engine.size != 4:
        pytest.skip("two hosts of two ranks")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    host, cross = world.Split(engine.rank // 2), world.Split(engine.rank % 2)
    way = Rings(ring_of(24, 2, host), ring_of(8, 3, cross), engine.size)
    lengths, finished = (length, 2, length + 4), []

    def halve(total):
        finished.append(total.size)
        total /= 2

    for pause in WAYS_TO_WAIT:
        arrays = [held_by(engine.rank, each, "float64") for each in lengths]
        finished.clear()
        way.reduce([(array, array) for array in arrays], np.add, halve, pause)
        for array, each in zip(arrays, lengths, strict=True):
            expected = sum(held_by(rank, each, "float64") for rank in range(4)) / 2
            np.testing.assert_array_equal(array, expected)
        assert sum(engine.allgather_object(sum(finished))) == sum(lengths)
    host.Free()
    cross.Free()


class Cluster:
    """A communicator whose ranks believe to be on several hosts."""

    def __init__(self, comm, host_of):
        self._comm, self._host_of = comm, host_of

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def Split_type(self, kind, key):
        return self._comm.Split(self._host_of(self._comm.rank), key)


HOSTS = {
    "one rank each": lambda rank: rank,
    "two each": lambda rank: rank // 2,
    "uneven": lambda rank: min(rank, 1),
}


@pytest.mark.parametrize("hosts", HOSTS)
def test_ways_between_hosts_are_tried_and_sum_right(engine, hosts):
    if engine.size == 1:
        pytest.skip("one rank has nothing to send")
    from mpi4py import MPI

    ways = choose_rings(MPI, Cluster(MPI.COMM_WORLD, HOSTS[hosts]))
    count = len({HOSTS[hosts](rank) for rank in range(engine.size)})
    assert (0 < ways.link < np.inf) == (count > 1)
    assert (
        len(set(engine.allgather_object(ways.link))) == 1
    )  # what is decided by it, all ranks must decide alike
    assert count == 1 or (ways.serves(LEAST_PART_BYTES * engine.size) and not ways.serves(LEAST_PART_BYTES))
    for length in (1, 1001, 200_003):
        array, finished = held_by(engine.rank, length, "float64"), []
        ways.reduce(
            [(array, array)], np.add, lambda segment, finished=finished: finished.append(segment.size)
        )
        expected = sum(held_by(rank, length, "float64") for rank in range(engine.size))
        np.testing.assert_array_equal(array, expected)
        assert sum(engine.allgather_object(sum(finished))) == length
    ways.free()


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT])
@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
def test_large_arrays_with_each_operation(engine, op, dtype):
    if dtype == "bool" and op in (Op.SUM, Op.AVERAGE):
        pytest.skip("no sum of truths")
    length = LEAST_IN_MEMORY // np.dtype(dtype).itemsize + 5
    every = [
        np.random.default_rng([rank, 1]).integers(-3, 4, length).astype(dtype) for rank in range(engine.size)
    ]
    total = {
        Op.AVERAGE: lambda: (
            np.trunc(np.sum(every, 0) / engine.size) if dtype == "int32" else np.sum(every, 0) / engine.size
        ),
        Op.SUM: lambda: np.sum(every, 0),
        Op.MIN: lambda: np.min(every, 0),
        Op.MAX: lambda: np.max(every, 0),
        Op.PRODUCT: lambda: np.prod(every, 0),
    }[op]()
    np.testing.assert_allclose(engine.allreduce(every[engine.rank], op), total.astype(dtype), rtol=1e-6)


def test_what_is_not_a_number_reaches_every_rank(engine):
    mine = np.ones(LEAST_IN_MEMORY // 4, np.float32)
    if engine.rank == engine.size - 1:
        mine[[0, -1]] = np.nan, np.inf
    result = engine.allreduce(mine, Op.AVERAGE)
    assert np.isnan(result[0]) and np.isinf(result[-1]) and (result[1:-1] == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_many_gradients_of_a_model_travel_as_one(engine, dtype):
    """Together more than the ring's least, each below it; small ones are packed, and two dtypes do not mix."""
    sizes = [LEAST_IN_MEMORY // 8 // np.dtype(dtype).itemsize] * 9 + [3, 70_000, 1]
    every = [
        [held_by(rank, size, dtype) - place for place, size in enumerate(sizes)]
        for rank in range(engine.size)
    ]
    expected = [np.sum(each, 0, dtype) for each in zip(*every, strict=True)]
    mine = [*every[engine.rank], np.full(LEAST_IN_MEMORY // 2, engine.rank, np.uint8)]
    stays = [place % 3 == 0 for place in range(len(mine))]
    results = engine.grouped_allreduce(mine, Op.SUM, None, stays)
    for place, result in enumerate(results[:-1]):
        np.testing.assert_array_equal(result, expected[place])
        assert (result is mine[place]) == stays[place]
    assert (results[-1] == sum(range(engine.size))).all()


def test_a_result_lies_where_its_array_lay_if_that_is_asked(engine):
    large, small, kept = (np.full(size, engine.rank, np.float64) for size in (200_000, 5, 200_000))
    results = engine.grouped_allreduce([large, small, kept], Op.SUM, None, [True, True, False])
    expected = sum(range(engine.size))
    assert results[0] is large and results[1] is small
    assert (large == expected).all() and (small == expected).all() and (results[2] == expected).all()
    assert (kept == engine.rank).all()
