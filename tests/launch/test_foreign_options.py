"""Options of horovodrun, mpirun and torchrun after `hvdtrain run`: understood, or answered with what to type."""

import argparse
import os
import shlex

import pytest
from click.testing import CliRunner

from hvdtrain.cli import cli
from hvdtrain.launch import run as launch
from hvdtrain.launch.foreign_options import FOREIGN, apply_foreign_options
from hvdtrain.launch.run_options import RunOptions, command_line


@pytest.fixture
def typed(monkeypatch):
    """Parses what follows `hvdtrain run` and returns the options that it means."""

    def parse(words: str) -> RunOptions:
        asked = []
        monkeypatch.setattr(
            launch, "run", lambda *received: asked.append(apply_foreign_options(*received)) or 0
        )
        done = CliRunner().invoke(cli, ["run", *shlex.split(words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return asked[0]

    return parse


INTERFACES = {"OMPI_MCA_btl_tcp_if_include=eth0", "NCCL_SOCKET_IFNAME=eth0", "HYDRA_IFACE=eth0"}


@pytest.mark.parametrize(
    "words, meaning",
    [
        ("-n 3", {"num_proc": 3}),
        ("--np 3", {"num_proc": 3}),
        ("-np 3 --mpi --oversubscribe -oversubscribe --allow-run-as-root --disable-cache", {"num_proc": 3}),
        ("-host a:2,b:2", {"hosts": "a:2,b:2"}),
        ("-hostfile hosts.txt", {"hostfile": "hosts.txt"}),
        ("--machinefile hosts.txt", {"hostfile": "hosts.txt"}),
        ("-x A=1 -x HOME -x B='2 3'", {"variables": ("A=1", "HOME", "B=2 3")}),
        ("-genv A 1", {"variables": ("A=1",)}),
        ("--timeline-filename t.json", {"variables": ("HOROVOD_TIMELINE=t.json",)}),
        ("--cycle-time-ms=3.5", {"variables": ("HOROVOD_CYCLE_TIME=3.5",)}),
        ("--fusion-threshold-mb 32", {"variables": ("HOROVOD_FUSION_THRESHOLD=33554432",)}),
        ("--autotune", {"variables": ("HOROVOD_AUTOTUNE=1",)}),
        ("--no-hierarchical-allreduce", {"variables": ("HOROVOD_HIERARCHICAL_ALLREDUCE=0",)}),
        ("--no-stall-check", {"variables": ("HVDTRAIN_STALL_SECONDS=0",)}),
        ("--stall-check-warning-time-seconds 9", {"variables": ("HVDTRAIN_STALL_SECONDS=9",)}),
        ("--mca btl tcp,self", {"mpirun": ("--mca", "btl", "tcp,self")}),
        ("-mca a 1 --mca b 2", {"mpirun": ("--mca", "a", "1", "--mca", "b", "2")}),
        ("--map-by node --report-bindings", {"mpirun": ("--map-by", "node", "--report-bindings")}),
        ("--bind-to core", {"bind": "core"}),
        ("-bind-to none", {"bind": "none"}),
        # Ranks would else bind themselves once more.
        ("--bind-to socket", {"bind": "none", "mpirun": ("--bind-to", "socket")}),
        ("--cpu-bind=cores --gpu-bind closest", {"srun": ("--cpu-bind=cores", "--gpu-bind=closest")}),
        ("-m", {"module": True}),
        ("--verbose", {"verbose": True}),
    ],
)
def test_what_means_the_same_is_accepted(typed, words, meaning):
    found = typed(f"{words} train.py --gloo")
    assert found == RunOptions(**{"num_proc": None, "script": "train.py", "args": ("--gloo",), **meaning})


@pytest.mark.parametrize("option", ["--network-interface", "--network-interfaces"])
def test_a_network_interface_is_named_to_every_mpi(typed, option):
    assert set(typed(f"{option} eth0 train.py").variables) >= INTERFACES


KEPT = "--wrap -np 4 --mpi-args '--mca a b' -x A=1"


@pytest.mark.parametrize(
    "words, told",
    [
        ("--gloo", "there is no Gloo here"),
        ("--start-timeout 30", "as much time to start"),
        ("--output-filename logs", "> run.log"),
        ("-p 2222", "~/.ssh/config"),
        ("--ssh-identity-file=key", "~/.ssh/config"),
        ("--check-build", "hvdtrain doctor"),
        ("-N 2", "-H a:4,b:4"),
        ("--nproc_per_node=2", "-H a:4,b:4"),
        ("--wdir /data", "cd to it"),
        ("--gloo --start-timeout 30", "as much time to start"),
    ],
)
def test_what_means_nothing_here_is_answered_with_the_whole_command(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        cli, ["run", *shlex.split(f"{KEPT} {words}"), "my train.py", "--epochs", "3", "--gloo"]
    )
    assert done.exit_code == 2
    line = " ".join(done.output.split())
    assert line.startswith("hvdtrain: ") and told in line
    advice = shlex.split(line.partition("Type: ")[2])
    assert advice[:2] == ["hvdtrain", "run"] and advice[-4:] == ["my train.py", "--epochs", "3", "--gloo"]
    assert {"--wrap", "-np", "4", "--mpi-args", "--mca a b", "-x", "A=1"} <= set(advice[:-4])


def test_advice_has_what_to_type_in_place_of_an_option(tmp_path):
    done = CliRunner().invoke(cli, ["run", "-np", "4", "--reset-limit", "5", "train.py"])
    assert "Type: hvdtrain run -np 4 --max-restarts 5 train.py" in " ".join(done.output.split())


def test_the_command_that_is_shown_asks_for_the_same(typed):
    words = "-np 4 -H a:4 --bind core --mpi-args '-v x' --as-horovod --stage /data --done-file d "
    words += "--python 'apptainer exec' --max-restarts 2 --min-np 1 --walltime 1:00 -v --mca a 'b c' -x A=1 "
    options = typed(f"{words} -m pkg.train --epochs '3 4'")
    assert typed(command_line(options).removeprefix("hvdtrain run ")) == options


@pytest.mark.parametrize("words", ["-n two", "--fusion-threshold-mb much"])
def test_a_value_that_is_no_number(words):
    done = CliRunner().invoke(cli, ["run", *words.split(), "train.py"])
    assert done.exit_code == 2 and "expected a number" in done.output


def test_an_unknown_option_is_told_where_options_go():
    done = CliRunner().invoke(cli, ["run", "-np", "2", "--epochs", "3", "train.py"])
    assert done.exit_code == 2
    assert "--epochs" in done.output and "--mpi-args" in done.output and "after its name" in done.output


def test_every_option_of_horovodrun_is_known(monkeypatch):
    launcher = pytest.importorskip("horovod.runner.launch")
    found = []

    def parse_args(parser, *rest, **more):
        found.extend(name for action in parser._actions for name in action.option_strings)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        launcher.parse_args()
    known = {name for row in FOREIGN for name in row.names}
    known |= {name for option in cli.commands["run"].params for name in option.opts}
    # Of the command `hvdtrain` itself, which has its own --version.
    assert set(found) - known == {"--help", "-h", "--version"}


def test_no_option_is_written_twice():
    names = [name for row in FOREIGN for name in row.names]
    names += [name for option in cli.commands["run"].params for name in option.opts if name.startswith("-")]
    assert sorted(names) == sorted(set(names))


def test_variables_reach_the_launcher_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HVDTRAIN_STALL_SECONDS", raising=False)
    options = RunOptions(1, "train.py", dry_run=True, variables=("HVDTRAIN_STALL_SECONDS=9",))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert launch.run(options) == 0
    assert os.environ["HVDTRAIN_STALL_SECONDS"] == "9"
    assert "HVDTRAIN_STALL_SECONDS=9" in capsys.readouterr().out
