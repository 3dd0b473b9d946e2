"""allgather, broadcast, alltoall: whatever a tensor holds, it arrives unchanged."""

import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks

DTYPES = [
    *("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("bool", "uint32", "complex64"),
]
INNER = [(), (3,), (2, 2)]


def of_rank(rank, shape, dtype):
    return tf.cast(np.random.default_rng(rank).integers(0, 2 if dtype == "bool" else 90, shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_allgather_joins_rows_that_differ_in_number(dtype):
    for inner in INNER:
        for rows in (lambda _: 2, lambda rank: rank + 1, lambda rank: rank):  # the last: none on rank 0
            expected = np.concatenate(
                [of_rank(rank, (rows(rank), *inner), dtype) for rank in range(hvd.size())]
            )
            gathered = hvd.allgather(of_rank(hvd.rank(), (rows(hvd.rank()), *inner), dtype))
            assert gathered.dtype.name == dtype
            np.testing.assert_array_equal(gathered, expected)


def test_gathers_in_every_mode(run):
    mine = np.full((hvd.rank() + 1, 2), hvd.rank(), np.float32)

    def gather(tensor):
        alone = hvd.allgather(tensor)
        assert alone.shape.as_list()[1:] == [2]
        return [alone, *hvd.grouped_allgather([tensor, tf.cast(tensor[:1, 0], tf.int64)])]

    alone, grouped, others = run(gather, mine)
    expected = np.repeat(np.arange(hvd.size()), np.arange(hvd.size()) + 1)
    np.testing.assert_array_equal(alone, np.stack([expected, expected], 1))
    np.testing.assert_array_equal(grouped, alone)
    np.testing.assert_array_equal(others, np.arange(hvd.size()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_from_every_root(dtype):
    for root_rank in range(hvd.size()):
        for shape in [(), (0, 2), (4,), (2, 3), (2, 2, 2)]:
            received = hvd.broadcast(of_rank(hvd.rank(), shape, dtype), root_rank)
            assert received.dtype.name == dtype
            np.testing.assert_array_equal(received.numpy(), of_rank(root_rank, shape, dtype).numpy())


def test_broadcast_in_every_mode(run):
    def send(tensor):
        received = hvd.broadcast(tensor, hvd.size() - 1)
        assert received.shape == tensor.shape
        return received

    np.testing.assert_array_equal(run(send, np.full(3, hvd.rank())), np.full(3, hvd.size() - 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alltoall_of_equal_parts(dtype):
    for inner in INNER:
        received = hvd.alltoall(of_rank(hvd.rank(), (2 * hvd.size(), *inner), dtype))
        assert received.dtype.name == dtype
        start = 2 * hvd.rank()
        expected = [
            of_rank(rank, (2 * hvd.size(), *inner), dtype)[start : start + 2] for rank in range(hvd.size())
        ]
        np.testing.assert_array_equal(received, np.concatenate(expected))


@pytest.mark.parametrize(
    "make", [list, lambda each: np.array(each), lambda each: tf.constant(each, tf.int32)]
)
def test_alltoall_of_given_parts(make):
    """Rank r sends r + 1 rows, all r, to each rank."""
    splits = make([hvd.rank() + 1] * hvd.size())
    rows = hvd.size() * (hvd.rank() + 1)
    received, counts = hvd.alltoall(tf.fill([rows, 2], hvd.rank()), splits)
    assert counts.dtype == tf.int32
    np.testing.assert_array_equal(counts, np.arange(hvd.size()) + 1)
    np.testing.assert_array_equal(received[:, 0], np.repeat(np.arange(hvd.size()), np.arange(hvd.size()) + 1))


def test_alltoall_of_nothing_and_of_rows_that_stay():
    received, counts = hvd.alltoall(tf.zeros([0, 3]), splits=[0] * hvd.size())
    assert received.shape == (0, 3) and list(counts.numpy()) == [0] * hvd.size()
    to_first = [1] + [0] * (hvd.size() - 1)  # the second row goes to nobody
    received, counts = hvd.alltoall(tf.constant([hvd.rank(), 99]), splits=to_first)
    first = hvd.rank() == 0
    np.testing.assert_array_equal(received, np.arange(hvd.size()) if first else [])
    np.testing.assert_array_equal(counts, np.full(hvd.size(), int(first)))


def test_alltoall_in_every_mode(run):
    def exchange(tensor):
        received, counts = hvd.alltoall(tensor, tf.ones([hvd.size()], tf.int32))
        assert received.shape.as_list()[1:] == [2] and counts.shape == (hvd.size(),)
        return [received, counts, hvd.alltoall(tensor)]

    mine = np.stack([np.arange(hvd.size()), np.full(hvd.size(), hvd.rank())], 1).astype(np.float32)
    received, counts, again = run(exchange, mine)
    np.testing.assert_array_equal(
        received, np.stack([np.full(hvd.size(), hvd.rank()), np.arange(hvd.size())], 1)
    )
    np.testing.assert_array_equal(counts, np.ones(hvd.size()))
    np.testing.assert_array_equal(again, received)


def test_many_operations_of_one_graph_run_in_the_order_of_the_script(run):
    """None depends on another, and what they move differs: out of order they would not fit together."""

    def several(tensor):
        return [
            function(tensor + offset)
            for offset in range(4)
            for function in (hvd.allgather, hvd.allreduce, lambda each: hvd.broadcast(each, 0))
        ]

    results = run(several, np.float32([hvd.rank()]))
    for offset in range(4):
        gathered, mean, first = results[3 * offset : 3 * offset + 3]
        np.testing.assert_allclose(gathered, np.arange(hvd.size()) + offset)
        np.testing.assert_allclose(mean, [np.mean(range(hvd.size())) + offset], rtol=1e-6)
        np.testing.assert_allclose(first, [offset])
