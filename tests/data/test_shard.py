"""Every sample exactly once an epoch over all ranks, whatever the data is; identities are counted, not numbers."""

import contextlib
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.data import shard

pytestmark = pytest.mark.ranks

BATCH = 8


def arrays(length):
    return np.arange(length, dtype="float32")[:, None], np.arange(length)


def seen(data):
    """Goes through one epoch; returns the numbers of the real samples of all ranks and all ranks' steps."""
    mine, steps = [], 0
    for batch in data:
        x = np.asarray(batch[0])
        weight = np.asarray(batch[2]) if len(batch) == 3 else np.ones(len(x))
        # A rank has its samples and nothing else; where there is none for it, one row of weight 0.
        assert len(x) <= BATCH // hvd.size() and ((weight > 0).all() or len(x) == 1)
        np.testing.assert_array_equal(x[:, 0].astype(int), np.asarray(batch[1]))
        mine += [int(each) for each in x[weight > 0].reshape(-1)]
        steps += 1
    return [each for numbers in hvd.allgather_object(mine) for each in numbers], hvd.allgather_object(steps)


def assert_whole(data, length, drop=False):
    steps = length // BATCH if drop else -(-length // BATCH)
    for _ in range(2):
        numbers, taken = seen(data)
        assert len(set(numbers)) == len(numbers) == (steps * BATCH if drop else length)
        assert set(numbers) <= set(range(length))
        assert taken == [steps] * hvd.size()


def test_a_data_set_that_was_read_can_be_pickled():
    data = hvd.shard(arrays(20), batch_size=BATCH)
    first = [np.asarray(part) for part in data[0]]
    again = pickle.loads(pickle.dumps(data))
    for part, other in zip(first, again[0], strict=True):
        np.testing.assert_array_equal(part, other)


def slices(length):
    return tf.data.Dataset.from_tensor_slices(arrays(length))


class Users(keras.utils.PyDataset):
    def __init__(self, length, rows):
        super().__init__()
        self.order, self.rows = np.arange(length), rows

    def __len__(self):
        return -(-len(self.order) // self.rows)

    def __getitem__(self, index):
        rows = self.order[index * self.rows : (index + 1) * self.rows]
        return rows[:, None].astype("float32"), rows


class Shuffling(Users):
    def on_epoch_end(self):
        np.random.shuffle(self.order)


@pytest.mark.parametrize("remainder", ["keep", "drop"])
@pytest.mark.parametrize("length", [1, 3, 8, 16, 23])
@pytest.mark.parametrize("shuffle", [True, False])
def test_arrays(length, shuffle, remainder):
    if remainder == "drop" and length < BATCH:
        with pytest.raises(ValueError, match="would drop everything"):
            shard(arrays(length), BATCH, remainder=remainder)
        return
    assert_whole(shard(arrays(length), BATCH, shuffle, remainder=remainder), length, remainder == "drop")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 23])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: shard(slices(n), BATCH),
        lambda n: shard(slices(n), BATCH, shuffle=True),
        lambda n: shard(slices(n), BATCH, shuffle=4),
        lambda n: shard(slices(n).batch(3), BATCH),
        lambda n: shard(
            slices(n).batch(BATCH).map(lambda x, y: (x, y)).prefetch(1), shuffle=n > BATCH, batch_size=BATCH
        ),
        lambda n: shard(slices(n).filter(lambda x, y: True), BATCH),
        lambda n: shard(slices(n).shuffle(5, seed=3), BATCH),
    ],
    ids=[
        "samples",
        "shuffled",
        "shuffled among 4",
        "batches of 3",
        "batches",
        "unknown length",
        "users' shuffle",
    ],
)
def test_datasets(make, length):
    keras.utils.set_random_seed(1)
    assert_whole(make(length), length)


def test_datasets_that_drop():
    assert_whole(shard(slices(23), BATCH, remainder="drop"), 23, drop=True)
    assert_whole(shard(slices(23).batch(BATCH), remainder="drop"), 23, drop=True)


@pytest.mark.parametrize("kind", [Users, Shuffling])
def test_pydatasets_by_rows(kind):
    assert_whole(shard(kind(23, BATCH)), 23)
    assert_whole(shard(kind(23, BATCH), remainder="drop"), 23, drop=True)


def test_pydatasets_by_whole_batches():
    rows = BATCH // hvd.size()
    assert_whole(shard(Users(23, rows), BATCH), 23)
    assert_whole(shard(Users(3, BATCH), BATCH), 3)
    assert_whole(shard(Users(21, rows), BATCH, remainder="drop"), 21, drop=True)


@pytest.mark.parametrize("length", [3, 19, 23])
def test_one_rank_joins_batches_without_filler(length):
    if hvd.size() > 1:
        pytest.skip("for one rank")
    data = shard(Users(length, BATCH // 2), BATCH)
    assert sum(len(batch[0]) for batch in data) == length


def test_a_rank_that_takes_whole_batches_makes_no_others():
    made = []

    class Counting(Users):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    data = shard(Counting(32, BATCH // hvd.size()), BATCH, shuffle=False)
    made.clear()
    list(data)
    assert made == list(range(hvd.rank(), 4 * hvd.size(), hvd.size()))


def test_generators():
    batches = (Users(23, BATCH)[index] for index in range(3))
    with (
        pytest.warns(UserWarning, match="neither length nor order")
        if hvd.rank() == 0
        else contextlib.nullcontext()
    ):
        data = shard(batches, BATCH)
    numbers, steps = seen(data)
    assert sorted(numbers) == list(range(23)) and steps == [3] * hvd.size()


def test_epochs_differ_and_repeat_from_the_seed():
    for make in (lambda **o: shard(arrays(64), BATCH, **o), lambda **o: shard(slices(64), BATCH, True, **o)):
        first = make(seed=4)
        one, two = seen(first)[0], seen(first)[0]
        assert one != two and sorted(one) == sorted(two)
        again = make(seed=4)
        assert (seen(again)[0], seen(again)[0]) == (one, two)
        assert seen(make(seed=4, epoch=1))[0] == two
        assert seen(make(seed=5))[0] != one


def test_the_process_own_seeds_change_nothing():
    """Ranks usually seed themselves differently, for dropout; the order must not follow."""
    keras.utils.set_random_seed(100 + hvd.rank())
    assert_whole(shard(slices(64), BATCH, shuffle=True), 64)
    assert_whole(shard(arrays(64), BATCH), 64)
    assert_whole(shard(Shuffling(64, BATCH)), 64)


def test_looking_inside_on_one_rank_changes_nothing():
    for data in (shard(arrays(64), BATCH), shard(slices(64), BATCH, shuffle=True), shard(Users(64, BATCH))):
        if hvd.rank() == hvd.size() - 1:
            next(iter(data))
            with contextlib.suppress(AttributeError, TypeError):
                data[0]
        assert hvd.allgather_object(data.state()["epoch"]) == [0] * hvd.size()
        assert_whole(data, 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: shard(arrays(23), BATCH, **o),
        lambda **o: shard(slices(23), BATCH, True, **o),
        lambda **o: shard(slices(23).batch(BATCH), **o),
        lambda **o: shard(Shuffling(23, BATCH), **o),
    ],
    ids=["arrays", "dataset", "batched dataset", "PyDataset"],
)
def test_a_shard_goes_on_inside_an_epoch(make):
    whole = make()
    seen(whole)
    rest = [[int(each) for each in np.asarray(batch[1])] for batch in whole][1:]
    resumed = make(epoch=1, step=1)
    assert resumed.state() == {"epoch": 1, "step": 1}
    assert [[int(each) for each in np.asarray(batch[1])] for batch in resumed] == rest
    assert resumed.state() == {"epoch": 2, "step": 0}
    assert len(seen(resumed)[0]) == 23


def test_state_in_a_loop_names_the_next_step():
    data = shard(arrays(23), BATCH)
    assert [data.state() for _ in data] == [
        {"epoch": 0, "step": 1},
        {"epoch": 0, "step": 2},
        {"epoch": 1, "step": 0},
    ]
    assert len(data) == 3 and data.state() == {"epoch": 1, "step": 0}


def test_what_is_made_of_a_sharded_dataset_has_epochs_too():
    data = shard(slices(64), BATCH, shuffle=True).map(lambda x, y, weight: (x, y, weight)).prefetch(1)
    one, two = seen(data)[0], seen(data)[0]
    assert one != two and sorted(one) == sorted(two) == list(range(64))


def test_nests_keep_their_structure():
    x, y = arrays(12)
    weight = np.linspace(1, 2, 12)
    data = shard(({"a": x, "b": (x, x)}, {"out": y}, {"out": weight}), BATCH, shuffle=False)
    inputs, targets, weights = data[0]
    assert (
        set(inputs) == {"a", "b"}
        and isinstance(inputs["b"], tuple)
        and set(targets) == set(weights) == {"out"}
    )
    np.testing.assert_array_equal(weights["out"], weight[targets["out"]].astype("float32"))
    inputs, targets, weights = data[1]
    # The last batch holds 4 samples of 8, as many on each of 1, 2 or 4 ranks.
    assert len(weights["out"]) == 4 // hvd.size()
    np.testing.assert_allclose(weights["out"], weight[targets["out"]], rtol=1e-6)


def test_inputs_without_targets():
    x, _ = arrays(16)
    assert isinstance(shard(x, BATCH)[0], np.ndarray)
    assert set(shard({"a": x}, BATCH)[0]) == {"a"}
    counts = hvd.allgather_object([len(rows) for rows in shard(x[:15], BATCH)])
    assert sum(sum(rank) for rank in counts) == 15


def test_other_things_that_are_arrays():
    x, y = arrays(16)
    for data in ((tf.constant(x), tf.constant(y)), (x, y.tolist()), [x, y]):
        assert_whole(shard(data, BATCH), 16)


@pytest.mark.slow
def test_records_in_files(tmp_path_factory):
    folder = hvd.broadcast_object(str(tmp_path_factory.mktemp("records")))
    names = [f"{folder}/{number}.txt" for number in range(4)]
    if hvd.rank() == 0:
        for number, name in enumerate(names):
            with open(name, "w") as file:  # noqa: PTH123
                file.write("".join(f"{number * 5 + line}\n" for line in range(5)))
    hvd.barrier()

    def read(files):
        return files.map(
            lambda line: (tf.reshape(tf.strings.to_number(line), [1]), tf.strings.to_number(line, tf.int64))
        )

    listed = tf.data.Dataset.list_files(f"{folder}/*.txt", shuffle=False)
    four = [
        read(tf.data.TextLineDataset(names)),
        read(listed.interleave(tf.data.TextLineDataset, cycle_length=2, num_parallel_calls=2)),
        read(listed.interleave(tf.data.TextLineDataset)).batch(3),
        # Which rank has which file is decided before a shuffling without a seed.
        read(tf.data.Dataset.list_files(f"{folder}/*.txt").interleave(tf.data.TextLineDataset)).shuffle(9),
    ]
    for dataset in four:
        data = shard(dataset, BATCH, shuffle=hvd.size() > 1)
        assert type(data.pipeline).__name__ == ("ByFiles" if hvd.size() > 1 else "ByRows")
        assert_whole(data, 20)
    three = shard(read(tf.data.TextLineDataset(names[:3])), BATCH)
    assert type(three.pipeline).__name__ == "ByRows"  # 10 and 5, or fewer files than ranks: not balanced
    assert_whole(three, 15)
