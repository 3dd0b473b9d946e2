"""What a rank notes of itself while it trains, for whoever has to say where it is."""

import os

import keras
import numpy as np
import pytest

import hvdtrain.keras as hvd
from hvdtrain import heartbeat

pytestmark = pytest.mark.ranks


class Notes(keras.callbacks.Callback):
    """Reads the page in the places where users' callbacks run."""

    def __init__(self):
        super().__init__()
        self.steps, self.tests = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.steps.append(self._place())

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self._place())

    def on_test_begin(self, logs=None):
        self.tests.append((heartbeat.read().doing, *self._place()))

    def _place(self):
        note = heartbeat.read()
        assert note.since is None  # what is in a callback waits for nobody
        return note.epoch, note.step


def compiled(**options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse", **options)
    return model


def fitted(model, epochs=2, **options):
    x, y = np.ones((12, 3), "float32"), np.ones((12, 1), "float32")
    notes = Notes()
    model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=[notes], **options)
    return notes


def test_steps_are_counted_over_epochs_and_over_fits():
    model = compiled()
    expected = [
        (0, 1),
        (0, 1),
        (0, 2),
        (0, 2),
        (0, 3),
        (0, 3),
        (1, 4),
        (1, 4),
        (1, 5),
        (1, 5),
        (1, 6),
        (1, 6),
    ]
    assert fitted(model).steps == expected
    assert fitted(model, epochs=1).steps == [(0, 7), (0, 7), (0, 8), (0, 8), (0, 9), (0, 9)]


def test_a_new_training_begins_at_its_first_step():
    fitted(compiled())
    assert fitted(compiled(), epochs=1).steps[0] == (0, 1)


def test_steps_that_run_as_one_are_all_counted():
    assert fitted(compiled(steps_per_execution=3)).steps == [(0, 1), (0, 3), (1, 4), (1, 6)]


def test_validation_is_noted():
    data = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    assert fitted(compiled(), validation_data=data).tests == [("validation", 0, 3), ("validation", 1, 6)]


def test_every_operation_is_noted_as_long_as_it_lasts(engine, monkeypatch):
    if engine.size == 1:
        pytest.skip("a world of one waits for nobody")
    seen, compare = [], type(engine)._compared

    def look(self, *args):
        seen.append(heartbeat.read())
        return compare(self, *args)

    monkeypatch.setattr(type(engine), "_compared", look)
    before = heartbeat.read().waits
    engine.allreduce(np.ones((2, 3), "float32"))
    engine.allgather_object({})
    engine.barrier()
    engine.broadcast(np.ones(1))
    assert [note.doing for note in seen] == [
        "in allreduce (float32 of shape (2, 3), op=average)",
        "in allgather_object",
        "in barrier",
        "in broadcast (float64 of shape (1,), root_rank=0)",
    ]
    assert all(note.since is not None for note in seen)
    assert heartbeat.read().since is None
    assert heartbeat.read().waits > before


def test_an_operation_that_fails_is_no_wait_any_more(engine):
    if engine.size == 1:
        pytest.skip("a world of one agrees with itself")
    with pytest.raises(ValueError, match="do not agree"):
        engine.allreduce(np.ones(2 + engine.rank))
    assert heartbeat.read().since is None


def test_a_worker_that_a_rank_forks_writes_elsewhere():
    page = heartbeat.share()
    try:
        heartbeat.keep_workers_away()
        heartbeat.at(1, 2)
        child = os.fork()
        if not child:
            heartbeat.at(8, 9)
            os._exit(0)
        os.waitpid(child, 0)
        assert (heartbeat.read(page).epoch, heartbeat.read(page).step) == (1, 2)
    finally:
        heartbeat.at(None, None)
