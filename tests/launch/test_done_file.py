"""The file that proves success, and the data that a script is told of."""

import json

import pytest

TOLD = ["--done-file", "done.json"]


@pytest.mark.smoke
def test_it_appears_when_every_rank_has_done_its_work(jobs):
    (jobs.folder / "done.json").write_text("of the last job")
    done = jobs.run("assert not os.path.exists('done.json')\n", options=TOLD)
    assert done.returncode == 0, done.stderr
    facts = json.loads((jobs.folder / "done.json").read_text())
    assert facts["ranks"] == 2 and len(facts["hosts"]) == 1 and facts["seconds"] > 0
    assert not list(jobs.folder.glob(".done*"))


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_does_not_when_one_has_not(jobs, ending):
    (jobs.folder / "done.json").write_text("of the last job")
    done = jobs.run(f"if rank == 1:\n    {ending}\n", options=TOLD)
    assert done.returncode != 0
    assert not (jobs.folder / "done.json").exists()


def test_where_it_cannot_be_written_nothing_is_started(jobs):
    done = jobs.run("print('started')", options=["--done-file", "no/such/folder/done"])
    assert (done.returncode, done.stdout) == (2, b"")
    assert "--done-file no/such/folder/done cannot be written: No such file" in done.stderr


def test_where_it_cannot_be_written_in_the_end_that_is_said(jobs):
    (jobs.folder / "place").mkdir()
    done = jobs.run(
        "import shutil\nif rank == 0: shutil.rmtree('place')\n", options=["--done-file", "place/done"]
    )
    assert done.returncode == 2
    assert "every rank has done its work, but --done-file place/done cannot be written" in done.stderr


def test_outside_slurm_the_script_reads_the_data_where_they_are(jobs):
    (jobs.folder / "data").mkdir()
    done = jobs.run("if rank == 0: print(os.environ['HVDTRAIN_DATA'])", options=["--stage", "data"])
    assert done.stdout.decode().strip() == str(jobs.folder / "data")


def test_data_that_are_not_there(jobs):
    done = jobs.run("print('started')", options=["--stage", "gone"])
    assert (done.returncode, done.stdout) == (2, b"")
    assert "--stage gone is not there" in done.stderr
