"""Checkpoints are written in the background, and one that cannot be written is no end of the training."""

import json

import numpy as np
import pytest

from hvdtrain.checkpoints import plain
from hvdtrain.checkpoints.folder import check
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.keras.checkpointing.checkpoint_files import Place, Store, files_of


def files(step, *values):
    packed = [plain.packed(each) for each in values or [{"seen": step}]]
    facts = {"data": None, "schemes": [{"op": "average"}, {"op": "sum"}]}
    return {"model.weights.h5": bytes(1 << 20), **files_of(Place(total=step), facts, packed)}


def test_a_full_disk_is_a_warning_and_the_next_one_is_tried(small_disk, capfd):
    store = Store(small_disk / "checkpoints", 3, SingleEngine())
    assert store.open() is None
    store.submit(1, lambda: files(1))
    before, failure = store.settle()
    assert before.name == "step-000000001" and failure is None
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
        file.write(bytes(4 << 20))
    store.submit(2, lambda: files(2))
    newest, failure = store.settle()
    assert newest == before and "could not be written ([Errno 28] No space left" in failure
    assert f"the last complete one is {before}" in failure
    check(before)
    assert not [*before.parent.glob(".partial-2*")]
    store.submit(3, lambda: files(3))
    store.submit(4, lambda: files(4))
    assert "the checkpoint of step 3 could not be written" in capfd.readouterr().err
    store.settle()
    ballast.unlink()
    store.submit(5, lambda: files(5))
    store.close()
    store = Store(small_disk / "checkpoints", 3, SingleEngine())
    saved = store.open()
    store.close()
    assert saved.entry.name == "step-000000005" and saved.place.total == 5 and saved.values == {"seen": 5}
    assert json.loads((saved.entry / "state.json").read_text())["ranks"] == 1


def test_errors_of_compression_are_divided_among_another_number_of_ranks(tmp_path):
    mean, total = "scheme/0/errors/3/dense/kernel", "scheme/1/errors/0/dense/kernel"
    shared = {"scheme/0/shared/count": np.array(7)}
    values = [shared | {mean: np.full((2, 3), rank), total: np.array(rank)} for rank in (1.0, 2.0, 6.0)]
    store = Store(tmp_path / "checkpoints", 3, SingleEngine())
    store.open()
    store.submit(1, lambda: files(1, *values))
    store.close()
    store = Store(tmp_path / "checkpoints", 3, SingleEngine())
    saved = store.open()
    store.close()
    np.testing.assert_array_equal(saved.values[mean], np.full((2, 3), 3.0))
    assert saved.values[total] == 9 and saved.values["scheme/0/shared/count"] == 7
