"""The timeline of real collectives and a real training, as a script or the environment asks for it."""

import json
from collections import defaultdict
from pathlib import Path

import keras
import numpy as np
import pytest
from twins import data, dense_model, fit, mine

import hvdtrain.keras as hvd
from hvdtrain import runtime
from hvdtrain.timeline.control import start_timeline, stop_timeline
from hvdtrain.timeline.recordings import path_of

pytestmark = pytest.mark.ranks


@pytest.fixture
def path(tmp_path_factory):
    """A path that all ranks know, and at the end no timeline."""
    folder = hvd.broadcast_object(str(tmp_path_factory.mktemp("timeline")) if hvd.rank() == 0 else None)
    yield Path(folder) / "t.json"
    stop_timeline()


def recorded(path):
    return json.loads(path_of(path, hvd.rank()).read_text())


def phases(events):
    """The names of the slices of each row, in order."""
    names = {each["pid"]: each["args"]["name"] for each in events if each.get("name") == "process_name"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "B" and event.get("cat") != "horovod":
            found[names[event["pid"]]].append(event["name"])
    return found


def all_phases(path):
    return {name for row in phases(recorded(path)).values() for name in row}


def test_every_rank_writes_what_it_did_between_start_and_stop(path):
    hvd.allreduce(np.ones(3))
    start_timeline(str(path))
    hvd.allreduce(np.ones(3))
    hvd.allgather(np.ones(3))
    hvd.broadcast(np.ones(3), 0)
    hvd.barrier()
    stop_timeline()
    hvd.allreduce(np.ones(3))
    about = recorded(path)[0]["args"]
    assert (about["rank"], about["size"]) == (hvd.rank(), hvd.size())
    rows = phases(recorded(path))
    assert rows["allreduce"] == ["NEGOTIATE_ALLREDUCE", "ALLREDUCE"]
    assert rows["allgather"][:2] == ["NEGOTIATE_ALLGATHER", "ALLGATHER"]
    assert rows["broadcast"][:2] == ["NEGOTIATE_BROADCAST", "BROADCAST"]


def test_horovods_arguments(path):
    for arguments, options in (((str(path), True), {}), ((), {"file_path": str(path), "mark_cycles": True})):
        start_timeline(*arguments, **options)
        hvd.allreduce(np.ones(3))
        stop_timeline()
        assert any(each.get("name") == "CYCLE_START" for each in recorded(path))
    start_timeline(str(path))
    hvd.allreduce(np.ones(3))
    stop_timeline()
    assert not any(each.get("name") == "CYCLE_START" for each in recorded(path))


def test_a_second_start_goes_on_or_goes_over_to_another_file_and_says_so(path, capfd):
    other = path.with_name("other.json")
    start_timeline(str(path))
    hvd.allreduce(np.ones(3))
    start_timeline(str(path))
    hvd.allgather(np.ones(3))
    start_timeline(str(other))
    hvd.broadcast(np.ones(3), 0)
    stop_timeline()
    stop_timeline()
    assert {"ALLREDUCE", "ALLGATHER"} <= all_phases(path) and "BROADCAST" not in all_phases(path)
    assert "BROADCAST" in all_phases(other) and "ALLREDUCE" not in all_phases(other)
    said = capfd.readouterr().err
    assert ("is already being written" in said and f"continues in {other}" in said) == (hvd.rank() == 0)


def test_a_path_that_cannot_be_opened_is_an_error_and_no_timeline_is_left(path):
    with pytest.raises(FileNotFoundError, match="the timeline cannot be written"):
        start_timeline(str(path.parent / "absent" / "t.json"))
    assert runtime.engine().timeline is None
    hvd.allreduce(np.ones(3))


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_training_shows_its_steps(path, eagerly):
    x, y = data(4)
    model = dense_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", run_eagerly=eagerly)
    start_timeline(str(path))
    fit(model, mine(x), mine(y), 4)
    stop_timeline()
    rows = phases(recorded(path))
    steps = [names for names in rows.values() if names.count("NEGOTIATE_ALLREDUCE") == 4]
    assert bool(steps) == (hvd.size() > 1)


def test_the_rows_of_a_process_set_are_its_own(path):
    if hvd.size() == 1:
        pytest.skip("needs two ranks")
    before = hvd.add_process_set([0])
    start_timeline(str(path))
    later = hvd.add_process_set([hvd.size() - 1])
    mine_of = [each for each in (before, later) if each.included()]
    for process_set in mine_of:
        for _ in range(3):
            hvd.allreduce(np.ones(3), process_set=process_set)
    hvd.allreduce(np.ones(3))
    stop_timeline()
    rows = phases(recorded(path))
    assert rows["allreduce"].count("ALLREDUCE") == 1
    others = [names for row, names in rows.items() if row != "allreduce" and names.count("ALLREDUCE") == 3]
    assert len(others) == len(mine_of)
    assert runtime.engine().timeline is None
    assert hvd.remove_process_set(before) and hvd.remove_process_set(later)
