"""Arrays that are larger than what one call of MPI or Horovod can count, with limits of a few hundred bytes."""

import numpy as np
import pytest
import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.collectives.engine import Call, Op
from hvdtrain.collectives.horovod import engine as horovod
from hvdtrain.collectives.mpi import engine as mpi
from hvdtrain.gradients.exchange import Exchange

pytestmark = pytest.mark.ranks

MOST = 200  # bytes of a message of MPI, and elements that Horovod counts


@pytest.fixture(autouse=True)
def messages(engine, monkeypatch):
    """Lengths of the messages into which the mpi engine cuts what it sends."""
    if engine.size == 1:
        pytest.skip("one rank sends nothing")
    lengths = []
    cut = mpi._messages

    def noted(part):
        lengths.extend(len(message) for message in cut(part))
        return cut(part)

    monkeypatch.setattr(mpi, "MESSAGE_BYTES", MOST)
    monkeypatch.setattr(horovod, "MOST_ELEMENTS", MOST)
    monkeypatch.setattr(mpi, "_messages", noted)
    yield lengths
    assert max(lengths, default=0) <= MOST


def held_by(rank, rows, width=3, dtype="float32"):
    return np.random.default_rng([rank, rows]).integers(0, 9, (rows, width)).astype(dtype)


def of_all(engine, rows, **how):
    return [held_by(rank, rows, **how) for rank in range(engine.size)]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64"])
@pytest.mark.parametrize("op, function", [(Op.SUM, np.sum), (Op.AVERAGE, np.mean), (Op.MAX, np.max)])
def test_reductions(engine, dtype, op, function):
    every = of_all(engine, 301, dtype=dtype)
    expected = function(every, axis=0, dtype="float64") if op is not Op.MAX else function(every, axis=0)
    expected = expected.astype(dtype)  # cut off toward zero
    mine = every[engine.rank]
    rtol = 1e-3 if dtype == "float16" else 1e-6
    np.testing.assert_allclose(engine.allreduce(mine, op), expected, rtol=rtol)
    for result in engine.grouped_allreduce([mine, mine], op):
        np.testing.assert_allclose(result, expected, rtol=rtol)
    rows = np.array_split(expected, engine.size)[engine.rank]
    np.testing.assert_allclose(engine.reducescatter(mine, op), rows, rtol=rtol)


def test_half_precision_that_travels_as_such_and_adasum(engine, monkeypatch):
    monkeypatch.setattr("hvdtrain.collectives.fusion.HALVED_BYTES", 100)
    every = of_all(engine, 301, dtype="float16")
    np.testing.assert_array_equal(engine.allreduce(every[engine.rank], Op.SUM), np.sum(every, axis=0))
    same = engine.allreduce(every[0], Op.ADASUM)  # of equal gradients it is the gradient
    np.testing.assert_allclose(same, every[0], rtol=1e-3)


@pytest.mark.parametrize("width", [3, MOST + 1])
def test_allgather(engine, messages, width):
    every = [held_by(rank, 7 * rank + 31, width) for rank in range(engine.size)]
    np.testing.assert_array_equal(engine.allgather(every[engine.rank]), np.concatenate(every))
    assert len(messages) > 2 * (engine.size - 1)


def test_allgather_of_small_parts_that_are_large_together(engine, messages):
    every = of_all(engine, MOST // engine.size // 12 + 1)
    assert every[0].nbytes < MOST < every[0].nbytes * engine.size
    np.testing.assert_array_equal(engine.allgather(every[engine.rank]), np.concatenate(every))


def test_allgather_of_what_one_rank_alone_has(engine):
    every = [held_by(rank, 300 if rank == 1 else 0) for rank in range(engine.size)]
    np.testing.assert_array_equal(engine.allgather(every[engine.rank]), every[1])


def test_broadcast(engine, messages):
    root = engine.size - 1
    np.testing.assert_array_equal(engine.broadcast(held_by(engine.rank, 301), root), held_by(root, 301))
    assert len(messages) == -(-301 * 12 // MOST)


@pytest.mark.parametrize("width", [3, MOST + 1])
def test_alltoall(engine, messages, width):
    def parcel(source, target):
        return np.full((5 * source + 20 * target, width), source * 10 + target, np.float32)

    mine = np.concatenate([parcel(engine.rank, target) for target in range(engine.size)])
    received, counts = engine.alltoall(
        mine, [len(parcel(engine.rank, target)) for target in range(engine.size)]
    )
    np.testing.assert_array_equal(
        received, np.concatenate([parcel(source, engine.rank) for source in range(engine.size)])
    )
    assert counts.tolist() == [len(parcel(source, engine.rank)) for source in range(engine.size)]
    assert len(messages) > 2 * (engine.size - 1)


def test_alltoall_of_little_from_each_to_one(engine):
    """Only the rank that receives has much; the others cannot know."""
    rows = MOST // 12 - 1
    splits = [rows if rank == 0 else 0 for rank in range(engine.size)]
    received, _ = engine.alltoall(held_by(engine.rank, rows), splits)
    expected = np.concatenate(of_all(engine, rows)) if engine.rank == 0 else np.zeros((0, 3))
    np.testing.assert_array_equal(received, expected)


def test_objects(engine, messages):
    def thing(rank):
        return {"array": held_by(rank, 301), "text": "é" * (500 + rank)}

    def same(one, other):
        return one["text"] == other["text"] and (one["array"] == other["array"]).all()

    assert all(map(same, engine.allgather_object(thing(engine.rank)), map(thing, range(engine.size))))
    assert same(engine.broadcast_object(thing(engine.rank), 1), thing(1))
    assert len(messages) > engine.size
    engine.broadcast_object(thing(0))["array"][0] = 1  # what comes is writable, as what was sent


def test_tensors(engine):
    mine = tf.constant(held_by(engine.rank, 301))
    total = np.sum(of_all(engine, 301), axis=0)
    reduced = tf.function(lambda: differentiable.allreduce(engine, mine, differentiable.Reduction(Op.SUM)))()
    np.testing.assert_array_equal(reduced, total)
    (joined,) = tf.function(lambda: differentiable.allgather(engine, [mine]))()
    np.testing.assert_array_equal(joined, np.concatenate(of_all(engine, 301)))


def gradients(engine, dense, rows, groups=()):
    exchange = Exchange(engine, Op.SUM, Call("gradients"))

    @tf.function
    def exchanged():
        result = TensorFlowBridge().exchange(exchange, dense, rows, groups)
        return result.dense, result.rows

    return exchanged()


def test_gradients_work_or_are_refused_on_all_ranks(engine):
    """Horovod's core takes a step's gradients itself; what it cannot count is refused before it is asked."""
    large = tf.constant(held_by(engine.rank, 301))
    ids = tf.constant([engine.rank] * 40, tf.int64)
    rows = [tf.ones([40, 3]), ids]
    if engine.name != "horovod":
        ((total,), (values, indices)) = gradients(engine, [large], rows)
        np.testing.assert_array_equal(total, np.sum(of_all(engine, 301), axis=0))
        assert values.shape == (40 * engine.size, 3)
        np.testing.assert_array_equal(indices, np.repeat(range(engine.size), 40))
        return
    with pytest.raises(ValueError, match=r"reduction of gradients has 903 elements.*HVDTRAIN_ENGINE=mpi"):
        gradients(engine, [large], [])
    half = tf.zeros([150])
    assert len(gradients(engine, [half, half], [])[0]) == 2
    with pytest.raises(ValueError, match="has 300 elements"):
        gradients(engine, [half, half], [], groups=[[0, 1]])
    with pytest.raises(tf.errors.OpError, match=rf"allgather of gradients has {120 * engine.size} elements"):
        gradients(engine, [], rows)
    one = [tf.ones([40 if engine.rank == 0 else 1, 3]), ids[: 40 if engine.rank == 0 else 1]]
    values, _ = gradients(engine, [], one)[1]  # together less than the limit
    assert len(values) == 40 + engine.size - 1
    assert engine.allgather_object(1) == [1] * engine.size
