"""One rank does the work, the others find it done; what fails there fails everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.data import collective_errors, first_on_node, first_overall

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(engine, tmp_path_factory):
    return Path(engine.broadcast_object(str(tmp_path_factory.mktemp("first"))))


@pytest.mark.ranks
@pytest.mark.parametrize("order", [first_on_node, first_overall])
def test_one_makes_what_the_others_find(engine, folder, order):
    file = folder / "download"
    with order() as mine:
        made = not file.exists()
        if made:
            file.write_text("once")
        assert file.read_text() == "once"
    everyone = engine.allgather_object((made, mine))
    assert everyone == [(True, True)] + [(False, False)] * (engine.size - 1)


@pytest.mark.ranks
def test_an_error_in_the_first_reaches_all(engine):
    if engine.rank == 0:
        with pytest.raises(OSError, match="no such server"), first_overall():
            raise OSError("no such server")
    else:
        says = r"first_overall: .* failed on rank 0: OSError: no such server"
        with pytest.raises(RuntimeError, match=says), first_overall():
            pytest.fail("the block ran although the first failed")
    assert engine.allgather_object(1) == [1] * engine.size


@pytest.mark.ranks
def test_an_error_in_another_is_its_own(engine):
    if engine.rank == 1:
        with pytest.raises(OSError, match="disk full"), first_on_node():
            raise OSError("disk full")
    else:
        with first_on_node():
            pass
    assert engine.allgather_object(1) == [1] * engine.size


@pytest.mark.ranks
def test_every_host_has_a_first(engine, monkeypatch):
    """Of four ranks on two hosts, numbered by hosts, ranks 0 and 2 go first."""
    if engine.size != 4:
        pytest.skip("needs four ranks")
    import dataclasses

    world = dataclasses.replace(
        engine.world, local_rank=engine.rank % 2, local_size=2, cross_rank=engine.rank // 2
    )
    monkeypatch.setattr(engine, "world", world)
    with first_on_node() as mine:
        pass
    assert engine.allgather_object(mine) == [True, False, True, False]


@pytest.mark.ranks
def test_who_waits_long_says_for_whom(engine, monkeypatch, capfd):
    monkeypatch.setattr(collective_errors, "REMIND", 0.0)
    with first_overall(timeout=60):
        pass
    said = "waiting for rank 0 since 0 s, for 60 s at most" in capfd.readouterr().err
    assert said == (engine.size > 1 and engine.rank == 1)


SCRIPT = """
import threading
import hvdtrain.keras as hvd
from hvdtrain.data import first_overall
hvd.init()
with first_overall(timeout=0.5):
    if hvd.rank() == 0:
        threading.Event().wait(60)
print("never")
"""


@pytest.mark.jobs
def test_the_time_limit_ends_the_job_and_names_who_is_waited_for(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", "2", str(script)]
    done = subprocess.run(
        launch,
        env=os.environ | {"HVDTRAIN_ENGINE": "mpi", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "never" not in done.stdout
    assert "Rank 1: hvd.first_overall has waited 0.5 s for rank 0" in done.stdout + done.stderr
    assert "first_overall(timeout=1)" in done.stdout + done.stderr
