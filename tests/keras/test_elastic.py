"""Elastic state: committed, restored, synchronised; and training that goes on as if nothing had happened."""

import functools
import itertools
import pickle
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import BATCH, CLASSES, FEATURES, data, flat, mine

import hvdtrain.keras as hvd
from hvdtrain.keras import elastic
from hvdtrain.keras.elastic import running

pytestmark = pytest.mark.ranks

STEPS, EPOCHS = 4, 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Commits of this test lie in a folder of its own; only that of rank 0 is used."""
    monkeypatch.setenv("HVDTRAIN_ELASTIC_DIR", str(tmp_path / "commits"))
    restarted(monkeypatch)
    return tmp_path / "commits"


def filled(model, value):
    model.set_weights([np.full_like(each, value) for each in model.get_weights()])


def small_model(value=0.0):
    model = keras.Sequential([keras.layers.Dense(2, activation="softmax")])
    model.build((2, 2))
    filled(model, value)
    return model


def assert_filled(model, value):
    for each in model.get_weights():
        np.testing.assert_array_equal(each, np.full_like(each, value))


def test_sync_restore_and_commit_as_documented():
    model = small_model(1.0 + hvd.rank())
    state = elastic.KerasState(
        model, keras.optimizers.Adam(0.001), batch=20 + hvd.rank(), epoch=10 + hvd.rank()
    )
    state.sync()
    assert_filled(state.model, 1.0)
    assert (state.batch, state.epoch) == (20, 10)

    filled(model, 5.0)
    state.batch, state.epoch = 21, 11
    state.restore()
    assert_filled(model, 1.0)
    assert (state.batch, state.epoch) == (20, 10)

    filled(model, 5.0)
    state.batch, state.epoch = 21, 11
    state.commit()
    filled(model, 6.0)
    state.batch = 99
    state.restore()
    assert_filled(model, 5.0)
    assert (state.batch, state.epoch) == (21, 11)


def test_sync_takes_what_rank_0_has_now():
    state = elastic.KerasState(small_model(), keras.optimizers.SGD(0.1), epoch=0)
    state.epoch = 5 + hvd.rank()
    filled(state.model, 2.0 + hvd.rank())
    state.sync()
    assert state.epoch == 5
    assert_filled(state.model, 2.0)
    state.epoch = 9
    state.restore()
    assert state.epoch == 5


@pytest.mark.parametrize("wrap", [hvd.DistributedOptimizer, keras.optimizers.LossScaleOptimizer])
def test_the_optimizers_state_is_part_of_it(wrap):
    model = small_model()
    model.compile(wrap(keras.optimizers.SGD(0.5, momentum=0.9)), "mse")
    state = elastic.TensorFlowKerasState(model, None, keras.backend, epoch=1)
    assert state.optimizer is model.optimizer
    before = [each.numpy() for each in model.optimizer.variables]
    for each in model.optimizer.variables:
        each.assign(each + 1)
    state.restore()
    for ours, theirs in zip(model.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_the_optimizer_that_compile_made_of_the_given_one_counts_too():
    """DistributedOptimizer copies; a script may go on passing the plain one, as Horovod's examples do."""
    plain, model = keras.optimizers.SGD(0.5, momentum=0.9), small_model()
    model.compile(hvd.DistributedOptimizer(plain), "mse")
    state = elastic.KerasState(model, plain)
    model.optimizer.iterations.assign(7)
    state.restore()
    assert int(model.optimizer.iterations.numpy()) == 0


def test_generators_of_random_numbers_stay_each_ranks_own():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dropout(0.5, seed=hvd.rank()), keras.layers.Dense(2)]
    )
    state = elastic.KerasState(model, keras.optimizers.SGD(0.1))
    state.sync()
    first = model.layers[0](np.ones((9, 4)), training=True).numpy()
    state.restore()
    np.testing.assert_array_equal(model.layers[0](np.ones((9, 4)), training=True).numpy(), first)
    assert len({each.tobytes() for each in hvd.allgather_object(first)}) == hvd.size()


def test_a_model_that_has_no_weights_yet():
    with pytest.raises(ValueError, match="must be built first"):
        elastic.KerasState(keras.Sequential([keras.layers.Dense(2)]), keras.optimizers.SGD(0.1))


def test_a_model_that_nobody_trains():
    with pytest.raises(ValueError, match="Compile it first"):
        elastic.KerasState(small_model())


@pytest.mark.parametrize("make", [tf.Variable, keras.Variable])
def test_a_list_of_variables(make):
    one, other = make(np.full(3, float(hvd.rank()))), make(float(hvd.rank()))
    state = elastic.TensorFlowState([one, other], batch=hvd.rank())
    state.sync()
    np.testing.assert_array_equal(one.numpy(), [0, 0, 0])
    one.assign([1, 2, 3])
    state.batch = 4
    state.commit()
    one.assign([4, 5, 6])
    other.assign(7)
    state.restore()
    np.testing.assert_array_equal(one.numpy(), [1, 2, 3])
    assert float(other.numpy()) == 0 and state.batch == 4


def test_attributes_only_and_no_sessions():
    state = elastic.TensorFlowState(epoch=3)
    state.epoch = 4
    state.restore()
    assert state.epoch == 3
    with pytest.raises(ValueError, match="no sessions in TensorFlow 2"):
        elastic.TensorFlowState([], object())


def test_objects_are_committed_as_they_are_at_the_commit():
    state = elastic.ObjectState(hvd.broadcast_object, hvd.rank, seen=[1], best={"loss": 2.0})
    state.seen.append(2)
    state.commit()
    state.seen.append(3)
    state.best["loss"] = 0.0
    state.restore()
    assert state.seen == [1, 2] and state.best == {"loss": 2.0}
    state.seen.append(4)
    state.restore()
    assert state.seen == [1, 2]


def test_an_attribute_may_not_hide_a_method():
    with pytest.raises(ValueError, match="'commit'"):
        elastic.ObjectState(hvd.broadcast_object, hvd.rank, commit=1)


def test_a_state_of_a_users_own_must_say_what_it_does():
    state = elastic.State(hvd.broadcast_object, hvd.rank)
    for method in (state.save, state.restore, state.sync):
        with pytest.raises(NotImplementedError):
            method()
    assert state.reset() is None


@pytest.mark.parametrize("removed", [True, False])
def test_a_change_of_hosts_interrupts_all_ranks(removed):
    state = elastic.ObjectState(hvd.broadcast_object, hvd.rank, epoch=1)
    state.check_host_updates()
    if hvd.rank() == 0:
        state.on_hosts_updated(1, 1)
        state.on_hosts_updated(2, 1 if removed else 2)
    state.epoch = 2
    with pytest.raises(elastic.HostsUpdatedInterrupt) as raised:
        state.commit()
    assert raised.value.skip_sync is removed
    state.commit()
    state.epoch = 3
    state.restore()
    assert state.epoch == 2


def test_a_reset_forgets_messages_and_calls_the_functions_in_order():
    called = []
    state = elastic.ObjectState(hvd.broadcast_object, hvd.rank)
    state.register_reset_callbacks([lambda: called.append(1), lambda: called.append(2)])
    state.register_reset_callbacks([lambda: called.append(3)])
    state.on_hosts_updated(1, 2)
    state.on_reset()
    state.check_host_updates()
    assert called == [1, 2, 3]


# run


def test_run_passes_arguments_and_the_result(folder, capfd):
    @elastic.run
    def train(state, step, times=1):
        """Adds up."""
        state.total += step * times
        state.commit()
        assert (len(list(folder.glob("*.state"))) == 1) == (hvd.rank() == 0)
        return state.total

    assert train.__name__ == "train" and train.__doc__ == "Adds up."
    assert train(elastic.ObjectState(hvd.broadcast_object, hvd.rank, total=1), 2, times=3) == 7
    assert not folder.exists()
    said = capfd.readouterr().err
    assert ("MPI cannot add or remove ranks" in said and str(folder) in said) == (hvd.rank() == 0)


def test_an_internal_error_brings_back_the_commit():
    runs, resets = [], []

    @elastic.run
    def train(state):
        runs.append(state.batch)
        while state.batch < 6:
            state.batch += 1
            filled(state.model, state.batch)
            if state.batch % 2 == 0:
                state.commit()
            if state.batch in (3, 5) and len(runs) < 3:
                raise elastic.HorovodInternalError("the wire broke")
        return state.batch

    model = small_model()
    state = elastic.KerasState(model, keras.optimizers.SGD(0.1), batch=0)
    state.register_reset_callbacks([lambda: resets.append(float(model.get_weights()[0][0, 0]))])
    assert train(state) == 6
    assert runs == [0, 2, 2] and resets == [2.0, 2.0]


def test_a_change_of_hosts_runs_again_without_restoring():
    runs = []

    @elastic.run
    def train(state):
        runs.append(state.batch)
        if len(runs) == 1:
            state.batch = 5
            if hvd.rank() == 0:
                state.on_hosts_updated(1, 1)
            state.commit()
        return state.batch

    assert train(elastic.ObjectState(hvd.broadcast_object, hvd.rank, batch=0)) == 5
    assert runs == [0, 5]


def test_another_error_is_the_users(folder):
    @elastic.run
    def train(state):
        state.commit()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(elastic.ObjectState(hvd.broadcast_object, hvd.rank, batch=0))
    assert folder.exists() == (hvd.rank() == 0)


def test_a_state_of_a_users_own_runs_in_memory(folder):
    state = mock.MagicMock()
    outcomes = [elastic.HorovodInternalError(), elastic.HostsUpdatedInterrupt(True), 3]
    function = mock.MagicMock(side_effect=outcomes, __name__="train", __qualname__="train")
    assert elastic.run(function)(state, 1) == 3
    assert state.sync.call_count == 2 and state.restore.call_count == 1 and state.on_reset.call_count == 2
    assert not folder.exists()


def test_hvd_must_be_initialised(monkeypatch):
    from hvdtrain import runtime

    monkeypatch.setattr(runtime, "_engine", None)
    with pytest.raises(ValueError, match=r"hvd\.init\(\)"):
        elastic.run(lambda state: None)(mock.MagicMock())


def dropout_model():
    """Random numbers, batch statistics, momenta: everything that must go on where it was."""
    seed = 10 * hvd.rank()
    init = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, "tanh", kernel_initializer=init),
            keras.layers.Dropout(0.3, seed=seed),
            keras.layers.Dense(CLASSES, kernel_initializer=init),
        ]
    )


class Fails(keras.callbacks.Callback):
    """Raises once, after a batch of an epoch, on all ranks or on one."""

    def __init__(self, epoch, batch, error, ranks=None):
        super().__init__()
        self.when, self.error, self.epoch = (epoch, batch), error, None
        self.armed = ranks is None or hvd.rank() in ranks

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.armed and (self.epoch, batch) == self.when:
            self.armed = False
            raise self.error


def elastic_fit(model, order=(0, 1, 2), extra=(), every=1, from_zero=False, name="train", **options):
    """Trains EPOCHS epochs under `run`; returns the state and the logs of each epoch."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.125, momentum=0.5))
    model.compile(optimizer, "mse", metrics=["mae"], **{"run_eagerly": True, **options})
    x, y = (flat(mine(each)) for each in data(STEPS, "float32"))
    state = elastic.KerasState(model, epoch=0, batch=0)
    history = {}
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: history.update({epoch: dict(logs)})
    )
    kept = [
        elastic.UpdateBatchStateCallback(state),
        elastic.UpdateEpochStateCallback(state),
        elastic.CommitStateCallback(state, every),
    ]

    def train(state):
        counts = (
            {"epochs": EPOCHS - state.epoch}
            if from_zero
            else {"initial_epoch": state.epoch, "epochs": EPOCHS}
        )
        callbacks = [*(kept[index] for index in order), keep, *extra]
        state.model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks, **counts)
        return state

    train.__qualname__ = name
    return elastic.run(train)(state), history


def everything(model):
    return [each.numpy() for each in (*model.variables, *model.optimizer.variables)]


@functools.cache
def without_interruption(make_extra=tuple, **options):
    model = dropout_model()
    _, history = elastic_fit(model, extra=make_extra(), name="reference", **options)
    return everything(model), history


def assert_as_without_interruption(model, history=None, **options):
    weights, logs = without_interruption(**options)
    for ours, theirs in zip(everything(model), weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert history is None or history == logs


INTERNAL = elastic.HorovodInternalError("caused by the test")
ORDERS = list(itertools.permutations(range(3)))
LAST = STEPS - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "order, epoch, batch", [*((order, 0, LAST) for order in ORDERS), (ORDERS[0], 0, 1), (ORDERS[0], 1, 0)]
)
def test_an_error_amid_an_epoch_leaves_no_trace_whatever_the_order_of_callbacks(order, epoch, batch):
    model = dropout_model()
    state, history = elastic_fit(model, order, [Fails(epoch, batch, INTERNAL)])
    assert (state.epoch, state.batch) == (EPOCHS, 0)
    assert_as_without_interruption(model, history)


@pytest.mark.parametrize("every", [2, 100])
def test_what_was_trained_after_the_commit_is_trained_again(every):
    model = dropout_model()
    _, history = elastic_fit(model, every=every, extra=[Fails(1, 2, INTERNAL)])
    assert_as_without_interruption(model, history)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
def test_an_error_on_one_rank_reaches_all(eager):
    model = dropout_model()
    _, history = elastic_fit(model, extra=[Fails(0, 2, INTERNAL, {hvd.size() - 1})], run_eagerly=eager)
    assert_as_without_interruption(model, history, run_eagerly=eager)


def test_epochs_counted_from_zero_as_in_horovods_examples():
    model = dropout_model()
    state, _ = elastic_fit(model, extra=[Fails(0, 2, INTERNAL)], from_zero=True)
    assert state.epoch == EPOCHS
    assert_as_without_interruption(model)


def test_several_steps_in_one_call():
    model = dropout_model()
    _, history = elastic_fit(model, extra=[Fails(1, 1, INTERNAL)], steps_per_execution=2)
    assert_as_without_interruption(model, history, steps_per_execution=2)


def halving():
    """A rate that changes from batch to batch, with the velocity corrected: in powers of two, without rounding."""

    def factor(epoch):
        return 0.5 ** int(2 * epoch)

    return [hvd.callbacks.LearningRateScheduleCallback(0.125, factor, staircase=False)]


def test_a_schedule_of_the_rate_goes_on_too():
    model = dropout_model()
    elastic_fit(model, extra=[*halving(), Fails(1, 2, INTERNAL)])
    assert_as_without_interruption(model, make_extra=halving)
    assert float(model.optimizer.learning_rate) == 0.125 / 8


class Killed(Exception):
    """The end of a job, as far as one process can play it."""


def restarted(monkeypatch):
    """Counts the calls of functions anew, as the next run of a script does."""
    monkeypatch.setattr(running, "_calls", type(running._calls)(itertools.count))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)], ids=["commit first", "commit last"])
@pytest.mark.parametrize("epoch, batch", [(0, 0), (0, LAST), (1, 2)])
def test_a_restarted_job_goes_on_from_the_disk(monkeypatch, folder, capfd, order, epoch, batch):
    with pytest.raises(Killed):
        elastic_fit(dropout_model(), order, [Fails(epoch, batch, Killed())])
    restarted(monkeypatch)
    capfd.readouterr()
    model = dropout_model()
    filled(model, 3.0)
    _, history = elastic_fit(model, order)
    said = capfd.readouterr().err
    assert (f"resuming from the last commit (epoch {epoch}" in said) == (hvd.rank() == 0), said
    assert_as_without_interruption(model, history if epoch == 0 else None)
    assert sorted(history) == list(range(epoch, EPOCHS))
    assert not folder.exists()


def test_a_finished_job_begins_anew(monkeypatch):
    elastic_fit(dropout_model())
    restarted(monkeypatch)
    model = dropout_model()
    _, history = elastic_fit(model)
    assert sorted(history) == list(range(EPOCHS))


def interrupted(folder, **options):
    with pytest.raises(Killed):
        elastic_fit(dropout_model(), extra=[Fails(1, 2, Killed())], **options)
    return next(iter(folder.glob("*.state"))) if hvd.rank() == 0 else None


def other_model():
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(9), keras.layers.Dense(CLASSES)])


def test_a_commit_of_another_model_is_refused_on_all_ranks(monkeypatch, folder):
    interrupted(folder)
    restarted(monkeypatch)
    with pytest.raises(
        ValueError, match=r"of another training: where it has .*\(6, 8\).*\(6, 9\).*Remove the file"
    ):
        elastic_fit(other_model())


def test_a_commit_of_other_attributes_is_refused_on_all_ranks(monkeypatch):
    def train(state):
        state.commit()
        raise Killed

    with pytest.raises(Killed):
        elastic.run(train)(elastic.ObjectState(hvd.broadcast_object, hvd.rank, epoch=0))
    restarted(monkeypatch)
    with pytest.raises(ValueError, match=r"attributes \['epoch'\], the state has \['step'\]"):
        elastic.run(train)(elastic.ObjectState(hvd.broadcast_object, hvd.rank, step=0))


@pytest.mark.parametrize("damage", [lambda each: each[:-1], lambda each: b"no commit", lambda each: b""])
def test_a_damaged_commit_is_refused_on_all_ranks(monkeypatch, folder, damage):
    path = interrupted(folder)
    if path:
        path.write_bytes(damage(path.read_bytes()))
    restarted(monkeypatch)
    with pytest.raises(ValueError, match=r"checksum is wrong\. Remove the file"):
        elastic_fit(dropout_model())


def test_a_commit_cut_short_by_the_end_leaves_the_one_before(monkeypatch, folder):
    """The write dies in the middle: its part lies beside, and the commit before is whole."""
    path = interrupted(folder)
    if path:
        path.with_name(f".partial-{path.stem}").write_bytes(path.read_bytes()[:100])
    restarted(monkeypatch)
    model = dropout_model()
    elastic_fit(model)
    assert_as_without_interruption(model)


def test_arguments_and_functions_of_a_script_do_not_mix(monkeypatch, folder):
    interrupted(folder)
    for change in ("argument", "function"):
        restarted(monkeypatch)
        monkeypatch.setattr("sys.argv", ["train.py", "--lr=0.1"] if change == "argument" else ["train.py"])
        _, history = elastic_fit(dropout_model(), name="train" if change == "argument" else "another")
        assert sorted(history) == list(range(EPOCHS))


def test_calls_of_one_function_do_not_mix(monkeypatch):
    """As in cross-validation: the first fold is done, the second is interrupted."""
    elastic_fit(dropout_model())
    with pytest.raises(Killed):
        elastic_fit(dropout_model(), extra=[Fails(1, 2, Killed())])
    restarted(monkeypatch)
    _, first = elastic_fit(dropout_model())
    _, second = elastic_fit(dropout_model())
    assert sorted(first) == [0, 1] and sorted(second) == [1]


def test_an_attribute_that_cannot_be_written_is_named():
    if hvd.size() > 1:
        pytest.skip("rank 0 alone writes; its error ends the job")

    def train(state):
        state.anything = Unpicklable()
        state.commit()

    with pytest.raises(TypeError, match="attribute 'anything'"):
        elastic.run(train)(elastic.ObjectState(lambda value: value, hvd.rank, fine=1, anything=0))


class Unpicklable:
    def __reduce__(self):
        raise pickle.PicklingError("not me")

    def __deepcopy__(self, memo):
        return self


# callbacks, hook by hook, as Horovod documents them


def hooked(callback, steps=10):
    callback.set_params({"steps": steps, "epochs": 3, "verbose": 0})
    callback.on_train_begin()
    return callback


def test_commits_every_so_many_batches_and_at_the_end_of_an_epoch():
    state = mock.MagicMock()
    callback = hooked(elastic.CommitStateCallback(state, batches_per_commit=3))
    for batch in range(7):
        callback.on_batch_end(batch)
    assert state.commit.call_count == 2
    callback.on_epoch_end(0)
    assert state.commit.call_count == 3
    callback.on_train_begin()
    callback.on_batch_end(0)
    callback.on_batch_end(1)
    assert state.commit.call_count == 3


def test_each_batch_is_committed_by_default():
    state = mock.MagicMock()
    callback = hooked(elastic.CommitStateCallback(state))
    for batch in range(4):
        callback.on_train_batch_end(batch)
    assert state.commit.call_count == 4


def test_the_batch_is_noted_and_the_first_epoch_is_shorter():
    state = mock.MagicMock(batch=4)
    callback = hooked(elastic.UpdateBatchStateCallback(state))
    callback.on_epoch_begin(0)
    assert callback.params["steps"] == 6
    callback.on_batch_end(7)
    assert state.batch == 7
    callback.on_epoch_end(0)
    assert state.batch == 0
    callback.on_epoch_begin(1)
    assert callback.params["steps"] == 10


def test_the_epoch_is_counted_over_restarts():
    state = mock.MagicMock(epoch=5)
    callback = hooked(elastic.UpdateEpochStateCallback(state))
    assert callback.initial_epoch == 5
    for epoch in range(2):
        callback.on_epoch_end(epoch)
    assert state.epoch == 7
    callback.on_train_begin()
    callback.on_epoch_end(0)
    assert state.epoch == 8


@pytest.mark.parametrize("source", ["arrays", "endless", "skipped by the user"])
def test_a_state_set_by_hand_leaves_out_its_batches(source):
    """Which samples are trained is seen from the sum of a weight that each sample moves by its own number."""
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )
    model.compile(keras.optimizers.SGD(1.0), lambda truth, prediction: -prediction, run_eagerly=True)
    numbers = 2.0 ** np.arange(STEPS)[:, None]
    dataset = tf.data.Dataset.from_tensor_slices((numbers, numbers)).batch(1)
    begin = 2 if source == "skipped by the user" else 0
    state = elastic.KerasState(model, batch=2, epoch=0)
    callback = elastic.UpdateBatchStateCallback(state, skip_data=source != "skipped by the user")
    endless = {"steps_per_epoch": STEPS} if source != "arrays" else {}
    x = dataset if source == "arrays" else dataset.repeat().skip(begin)
    model.fit(x, epochs=1, verbose=0, callbacks=[callback], **endless)
    assert float(model.get_weights()[0][0, 0]) == sum(numbers[2:])
    assert int(model.optimizer.iterations.numpy()) == STEPS - 2 and state.batch == 0
    model.fit(dataset, epochs=1, verbose=0, callbacks=[callback])
    assert int(model.optimizer.iterations.numpy()) == 2 * STEPS - 2
