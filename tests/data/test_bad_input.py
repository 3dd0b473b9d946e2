"""What cannot be sharded is refused with a sentence on every rank, in seconds, and the ranks can go on."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.data import shard

pytestmark = pytest.mark.ranks

X, Y = np.arange(16.0)[:, None], np.arange(16)
D = tf.data.Dataset


@pytest.fixture(autouse=True)
def ranks_can_go_on():
    yield
    assert hvd.allgather_object(1) == [1] * hvd.size()


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return X, Y


class Empty(keras.utils.PyDataset):
    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        ((X, Y), {}, ValueError, "batch_size is missing"),
        ((X, Y), {"batch_size": 2.5}, TypeError, "must be an integer"),
        (
            (X, Y),
            {"batch_size": 8, "remainder": "fill"},
            ValueError,
            "'keep'.*'drop'.*Received: remainder='fill'",
        ),
        ((X, Y), {"batch_size": 8, "seed": -1}, ValueError, "seed must be 0 or more"),
        ((X, Y), {"batch_size": 8, "seed": "a"}, TypeError, "seed must be an integer"),
        ((X, Y), {"batch_size": 8, "step": 2}, ValueError, "one of the 2 steps of an epoch, 0 to 1"),
        ((X, Y[:9]), {"batch_size": 8}, ValueError, "x: 16, y: 9"),
        (({"a": X, "b": X[:3]}, Y), {"batch_size": 8}, ValueError, r"x\['a'\]: 16, x\['b'\]: 3, y: 16"),
        ((X, Y, Y[:2]), {"batch_size": 8}, ValueError, "sample_weight: 2"),
        ((X[:0], Y[:0]), {"batch_size": 8}, ValueError, "no samples"),
        ((X, Y, Y, Y), {"batch_size": 8}, ValueError, r"\(\(x1, x2\), y\)"),
        ((np.float32(1), Y), {"batch_size": 8}, (TypeError, ValueError), "x"),
        (object(), {"batch_size": 8}, TypeError, "x must be a NumPy array"),
        (None, {"batch_size": 8}, ValueError, "no arrays"),
        (ranks_can_go_on, {"batch_size": 8}, TypeError, r"hvd.shard\(ranks_can_go_on\(\), …\)"),
        (
            lambda: D.from_tensor_slices(tf.sparse.from_dense(np.eye(4))),
            {"batch_size": 8},
            ValueError,
            "tf.sparse.to_dense",
        ),
        (
            lambda: D.from_tensor_slices(X).shuffle(16, seed=3),
            {"batch_size": 8, "step": 1},
            ValueError,
            r"a run cannot be resumed.*hvd.shard\(…, shuffle=True\)",
        ),
        ((X, None, Y), {"batch_size": 8}, ValueError, "without targets"),
        ((X, Y, Y), {"batch_size": 8, "class_weight": {0: 1.0}}, ValueError, "not both"),
        ((X, Y), {"batch_size": 8, "class_weight": [1.0, 2.0]}, TypeError, r"a dict.*Received.*\[1.0, 2.0\]"),
        (
            ([*X[:, None], X], Y),
            {"batch_size": 8},
            ValueError,
            r"x\[0\]: 1, .*, …, .*y: 16.*numpy.array\(list\)",
        ),
        (lambda: D.from_tensor_slices(X).repeat(), {"batch_size": 8}, ValueError, "endless.*dataset.take"),
        (lambda: D.from_tensor_slices(X[:0]), {"batch_size": 8}, ValueError, "no samples"),
        (
            lambda: D.from_tensor_slices(X).filter(lambda x: False),
            {"batch_size": 8},
            ValueError,
            "no samples",
        ),
        (lambda: D.from_tensor_slices(X), {}, ValueError, "batch_size is missing"),
        (
            lambda: D.from_tensor_slices(X[:5]),
            {"batch_size": 8, "remainder": "drop"},
            ValueError,
            "drop everything",
        ),
        (Endless(), {"batch_size": 16}, ValueError, "endless"),
        (Empty(), {"batch_size": 16}, ValueError, "no batches"),
        ((each for each in [(X, Y)]), {}, ValueError, "batch_size is missing"),
        (
            (each for each in [(X, Y)]),
            {"batch_size": 16, "shuffle": True},
            ValueError,
            "neither shuffled nor",
        ),
    ],
)
def test_refused_on_every_rank(data, options, error, says):
    if getattr(data, "__name__", "") == "<lambda>":  # what would start TensorFlow while tests are collected
        data = data()
    with pytest.raises(error, match=f"(?s){says}"):
        shard(data, **options)


@pytest.mark.usefixtures("several")
def test_a_batch_that_does_not_divide_or_is_smaller_than_the_ranks():
    size = hvd.size()
    with pytest.raises(ValueError, match=f"divide by the {size} ranks.*Nearest: {3 * size} or {4 * size}"):
        shard((X, Y), 3 * size + 1)
    with pytest.raises(ValueError, match=f"Nearest: {size}"):
        shard((X, Y), size - 1)


@pytest.mark.usefixtures("several")
def test_ranks_with_other_lengths_are_named():
    mine = 16 - (hvd.rank() == 1)
    with pytest.raises(hvd.MismatchError, match=r"(?s)number of samples differs.*rank 1: 15.*whole"):
        shard((X[:mine], Y[:mine]), 8)


@pytest.mark.usefixtures("several")
def test_ranks_that_hold_their_part_already():
    with pytest.raises(hvd.MismatchError, match=r"(?s)the content of x.*give that to fit as it is"):
        shard((X + 100 * hvd.rank(), Y), 8)
    with pytest.raises(hvd.MismatchError, match="the first sample"):
        shard(D.from_tensor_slices((X + 100 * hvd.rank(), Y + 100 * hvd.rank())), 8)


@pytest.mark.usefixtures("several")
def test_ranks_that_ask_for_other_things():
    with pytest.raises(hvd.MismatchError, match=r"(?s)seed differs.*seed=0.*seed=1"):
        shard((X, Y), 8, seed=min(hvd.rank(), 1))
    with pytest.raises(hvd.MismatchError, match=r"(?s)kind of data.*rank 0: tuple.*Dataset"):
        shard((X, Y) if hvd.rank() == 0 else D.from_tensor_slices((X, Y)), 8)


@pytest.mark.usefixtures("several")
def test_an_error_on_one_rank_reaches_all():
    if hvd.rank() == 1:
        with pytest.raises(TypeError, match="batch_size must be an integer"):
            shard((X, Y), "eight")
    else:
        with pytest.raises(
            RuntimeError, match=r"hvd.shard failed on rank 1: TypeError: .*must be an integer"
        ):
            shard((X, Y), 8)


@pytest.mark.usefixtures("several")
def test_shuffling_that_differs_between_ranks():
    tf.random.set_seed(hvd.rank())
    whole = D.from_tensor_slices((X, Y))
    with pytest.raises(ValueError, match=r"(?s)its own order.*rank 1.*set_random_seed\(0\)"):
        shard(whole.shuffle(16, seed=3).batch(8))
    with pytest.raises(ValueError, match="its own order"):
        shard(whole.map(lambda x, y: (x, y), num_parallel_calls=2, deterministic=False), 8)
    tf.random.set_seed(0)
    shard(whole.shuffle(16).batch(8))


@pytest.mark.usefixtures("several")
def test_a_look_on_one_rank_at_data_that_shuffle_themselves():
    """Their order depends on how often they were read, so that rank would take its part of another order."""
    data = shard(D.from_tensor_slices((X, Y)).shuffle(16, seed=3), 8)
    with pytest.raises(hvd.MismatchError, match=r"rank 0: reading number 1 of data that shuffle themselves"):
        next(iter(data)) if hvd.rank() == 0 else hvd.barrier()
    for _ in range(2):
        numbers = hvd.allgather_object([int(y) for _, ys, _ in data for y in ys])
        assert sorted(each for mine in numbers for each in mine) == list(range(16))


@pytest.mark.usefixtures("several")
def test_a_corrupt_file_on_one_rank(tmp_path_factory):
    folder = hvd.broadcast_object(str(tmp_path_factory.mktemp("corrupt")))
    names = [f"{folder}/{number}" for number in range(hvd.size())]
    if hvd.rank() == 0:
        for name in names:
            with tf.io.TFRecordWriter(name) as writer:
                writer.write(b"1")
        with open(names[1], "wb") as file:  # noqa: PTH123
            file.write(b"this is no record" * 9)
    hvd.barrier()
    error = tf.errors.DataLossError if hvd.rank() == 1 else RuntimeError
    with pytest.raises(error, match="corrupted record" if hvd.rank() == 1 else "rank 1: DataLossError"):
        shard(tf.data.TFRecordDataset(names), hvd.size())


@pytest.mark.usefixtures("several")
def test_a_batch_larger_than_the_global_one():
    with contextlib.suppress(UserWarning):
        data = shard((each for each in [(X, Y)]), 8)
    with pytest.raises(ValueError, match="a batch of 16, more than batch_size=8"):
        next(data)


def test_sharded_data_is_not_sharded_again():
    with pytest.raises(ValueError, match="sharded already"):
        shard(shard((X, Y), 8), 8)


def test_the_advice_for_sparse_tensors_leads_somewhere():
    x = tf.sparse.from_dense(np.eye(16, dtype="float32"))
    with pytest.raises(TypeError, match=r"tf.sparse.to_dense\(x\)"):
        shard((x, Y), batch_size=4)
    batches = D.from_tensor_slices((x, Y)).batch(4)
    with pytest.raises(ValueError, match=r"before hvd\.shard"):
        shard(batches)
    dense = batches.map(lambda x, y: (tf.sparse.to_dense(x), y))
    for data in (shard(dense, shuffle=False), shard((tf.sparse.to_dense(x), Y), batch_size=4, shuffle=False)):
        rows = next(iter(data))[0]
        assert rows.shape == (-(-4 // hvd.size()), 16)
