"""One best file, decided by one rank, written by it alone."""

from pathlib import Path

import keras
import numpy as np
import pytest
from twins import BATCH, data, dense_model, flat, mine

import hvdtrain.keras as hvd

pytestmark = pytest.mark.ranks

BestModelCheckpoint = hvd.callbacks.BestModelCheckpoint


class Reports(keras.callbacks.Callback):
    """Puts made-up values into the logs, and the number of the epoch into the model."""

    def __init__(self, name, values):
        super().__init__()
        self.name, self.values = name, values

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.values[epoch]
        self.model.layers[-1].bias.assign([epoch] * 3)


def trained(values, *callbacks, name="val_loss", metrics=(), before=()):
    x, y = data(2, "float32")
    model = dense_model("float32")
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse", metrics=list(metrics), run_eagerly=True
    )
    model.fit(
        flat(mine(x)),
        flat(mine(y)),
        batch_size=BATCH,
        epochs=len(values),
        verbose=0,
        callbacks=[Reports(name, values), *before, *callbacks],
    )
    hvd.barrier()
    return model


def epoch_in(path):
    return int(keras.saving.load_model(path).layers[-1].bias.numpy()[0])


@pytest.fixture
def path(tmp_path):
    """A path that is the same on all ranks."""
    return hvd.broadcast_object(str(tmp_path / "folder" / "best.keras"))


def saved_by(callback, path):
    """Sets the path as Horovod's estimator does: after construction."""
    callback.filepath = path
    return callback


@pytest.mark.parametrize(
    "mode, name, best", [("auto", "val_loss", 1), ("min", "val_loss", 1), ("max", "val_score", 2)]
)
def test_the_best_is_kept(path, mode, name, best):
    trained([2.0, 1.0, 3.0], saved_by(BestModelCheckpoint(monitor=name, mode=mode), path), name=name)
    assert epoch_in(path) == best
    assert [each.name for each in Path(path).parent.iterdir()] == ["best.keras"]


def test_the_metrics_of_all_ranks_decide_behind_the_average(path):
    """Rank 0 alone would take the first epoch; all ranks together the second."""
    if hvd.size() == 1:
        pytest.skip("a world of one is its own average")
    values = [0.0, 1.0] if hvd.rank() == 0 else [9.0, 1.0]
    callback = saved_by(BestModelCheckpoint(), path)
    trained(values, callback, before=[hvd.callbacks.MetricAverageCallback()])
    assert set(hvd.allgather_object(float(callback.best))) == {1.0}
    assert epoch_in(path) == 1


def test_rank_0_decides_where_nothing_is_averaged_and_no_other_rank_writes(tmp_path):
    mine_only = tmp_path / "best.keras"
    values = [2.0, 1.0, 3.0] if hvd.rank() == 0 else [1.0, 2.0, 0.0]
    trained(values, BestModelCheckpoint(filepath=mine_only))
    assert mine_only.exists() == (hvd.rank() == 0)
    assert hvd.rank() or epoch_in(mine_only) == 1


def test_given_to_rank_0_only_as_horovods_scripts_do(path):
    trained([2.0, 1.0], *([saved_by(BestModelCheckpoint(), path)] if hvd.rank() == 0 else []))
    assert epoch_in(path) == 1


def test_a_nan_is_never_the_best(path):
    trained([float("nan"), 2.0, float("nan")], saved_by(BestModelCheckpoint(), path))
    assert epoch_in(path) == 1


def test_without_the_metric_nothing_is_saved_and_a_warning_says_so(path):
    with pytest.warns(UserWarning, match="no 'val_auc'"):
        trained([1.0, 2.0], saved_by(BestModelCheckpoint("val_auc", mode="max"), path))
    assert not Path(path).exists()


def test_weights_only(path):
    weights = path.replace(".keras", ".weights.h5")
    model = trained([1.0, 2.0], saved_by(BestModelCheckpoint("val_loss", 0, True, "min", "epoch"), weights))
    model.load_weights(weights)
    np.testing.assert_array_equal(model.layers[-1].bias.numpy(), [0, 0, 0])


def test_after_so_many_batches(path):
    """Looked at after each second batch, by the loss up to there."""
    x, y = data(6, "float32")
    model = dense_model("float32")
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse", run_eagerly=True)
    callback, losses = saved_by(BestModelCheckpoint("loss", save_freq=2), path), []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    model.fit(flat(mine(x)), flat(mine(y)), batch_size=BATCH, verbose=0, callbacks=[note, callback])
    hvd.barrier()
    assert callback.best == min(losses[1::2])
    assert Path(path).exists()


@pytest.mark.parametrize("verbose", [0, 1])
def test_only_rank_0_speaks(path, verbose, capfd):
    trained([1.0, 2.0], saved_by(BestModelCheckpoint(verbose=verbose), path))
    said = capfd.readouterr().out
    assert ("improved" in said) == (verbose == 1 and hvd.rank() == 0)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), (False, "auto", "epoch")),
        (("val_loss", 0), (False, "auto", "epoch")),
        (("val_loss", 0, True), (True, "auto", "epoch")),
        (("val_loss", 0, False, "max", 7), (False, "max", 7)),
        (("val_loss", 0, "min"), (False, "min", "epoch")),
        (("val_loss", 0, "max", "epoch"), (False, "max", "epoch")),
        (("val_loss", 0, "auto", 5), (False, "auto", 5)),
    ],
)
def test_the_calls_of_both_of_horovods_modules(arguments, expected):
    callback = BestModelCheckpoint(*arguments)
    assert (callback.save_weights_only, callback.mode, callback.save_freq) == expected
    assert callback.save_best_only and callback.filepath is None
    assert isinstance(callback, keras.callbacks.ModelCheckpoint)


@pytest.mark.parametrize("filepath", [None, "best.tf", "best"])
def test_a_path_is_needed(filepath):
    with pytest.raises(ValueError, match=r"ends in \.keras or \.h5.*callback\.filepath"):
        trained([1.0], saved_by(BestModelCheckpoint(), filepath))
