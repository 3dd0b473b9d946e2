"""`hvdtrain bench allreduce` as users type it: right numbers, wrong sums told, one exit code, files."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.bench.allreduce import Options, check, contenders
from hvdtrain.bench.allreduce_workers import AllreduceWorker, one_core, summands
from hvdtrain.bench.output import run
from hvdtrain.bench.report import Report, Row, Spread
from hvdtrain.bench.tables import ADD, COPY
from hvdtrain.launch.hosts import LaunchError

MACHINE = {"cpu": "one", "cores": 2, "memory_gib": 4, "python": "3", "hosts": ["a"], "pinned": True}
VALUES = {name: Spread.of([1.0]) for name in ("latency_us", "algorithm_gb_s", "bus_gb_s")}
REPORT = Report("allreduce", 2, MACHINE, {}, [Row({"bytes": 1024}, "raw MPI", VALUES)])
QUICK = ["allreduce", "-np", "2", "--rounds", "2", "--engines", "mpi", "--no-peers"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, command):
    """A short run, its files and what it printed."""
    folder = tmp_path_factory.mktemp("saved")
    done = subprocess.run(
        [*command, *QUICK, "--sizes", "1K,2M", "--save", "short"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return folder, done


def test_each_contender_is_measured_at_each_size_and_its_sums_are_right(saved):
    folder, done = saved
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "short.json").read_text())
    assert (report["bench"], report["ranks"]) == ("allreduce", 2)
    assert report["command"].startswith("hvdtrain bench allreduce -np 2")
    assert report["left_out"] == {}
    measured = {(row["key"]["bytes"], row["contender"]) for row in report["rows"]}
    everyone = {"hvdtrain mpi", "hvdtrain mpi, graph", "raw MPI", "one core copies", "one core adds"}
    assert {(size, name) for size in (1024, 2 << 20) for name in everyone} <= measured
    assert (2 << 20, "MPI, 1 MiB pieces") in measured and (1024, "MPI, 1 MiB pieces") not in measured
    assert all(row["right"] for row in report["rows"])


def test_bandwidths_follow_from_size_and_time(saved):
    report = json.loads((saved[0] / "short.json").read_text())
    for row in report["rows"]:
        for quantity in row["values"].values():
            assert len(quantity["rounds"]) == 2
            assert quantity["low"] <= quantity["median"] <= quantity["high"]
            assert quantity["median"] == pytest.approx(np.median(quantity["rounds"]))
        times = row["values"]["latency_us"]["rounds"]
        expected = [row["key"]["bytes"] / each / 1e3 for each in times]
        # 2 (n - 1) / n is 1 on two ranks.
        assert row["values"]["algorithm_gb_s"]["rounds"] == pytest.approx(expected)
        assert row["values"]["bus_gb_s"]["rounds"] == pytest.approx(expected)


def test_the_tables_name_machine_contenders_and_ratios(saved):
    shown = saved[1].stdout
    for words in ("2 ranks on 1 host", "hvdtrain mpi", "best MPI", "as a multiple of", "1 KiB", "2 MiB"):
        assert words in shown
    assert "WRONG" not in shown


def test_a_plot_lies_beside_the_report(saved):
    assert (saved[0] / "short.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_compared_with_itself_differs_in_nothing(saved, command):
    done = subprocess.run(
        [*command, "compare", "short.json", "short.json"],
        cwd=saved[0],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1.000" in done.stdout and "Different" not in done.stdout and "Only in" not in done.stdout


# What Python runs first in every process: here nobody has installed a peer, nor TensorFlow.
BARE = """
import importlib.machinery, os
find = importlib.machinery.PathFinder.find_spec
def find_less(name, path=None, target=None):
    return None if name in ("tensorflow", "torch", "horovod") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_less
"""

# And on rank 1 it spoils what hvdtrain sums.
SPOILT = f"""{BARE}
if os.environ.get("RANK") == "1":
    from hvdtrain.collectives.engine import Engine
    right = Engine.allreduce
    def spoilt(self, array, op, out=None):
        result = right(self, array, op, out=out)
        result[-1:] += 1
        return result
    Engine.allreduce = spoilt
"""


@pytest.fixture
def begins_with(bench, tmp_path):
    """Return a function that runs the command with code that every process executes first."""

    def run(code, *words):
        (tmp_path / "sitecustomize.py").write_text(code)
        return bench(*words, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))

    return run


def test_who_is_not_installed_is_named_with_what_brings_it_and_the_others_are_measured(begins_with, marked):
    done = begins_with(BARE, "allreduce", "--rounds", "1", "--sizes", "4K")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    tensorflow = "tensorflow not installed; type pip install 'tensorflow-cpu>=2.16'"
    for sentence in (
        f"Left out: hvdtrain mpi, graph: {tensorflow}",
        "Left out: hvdtrain horovod, graph: horovod and tensorflow not installed; type hvdtrain build-horovod",
        "Left out: stock Horovod: horovod and tensorflow not installed; type hvdtrain build-horovod",
        "Left out: torch Gloo: torch not installed; type pip install 'hvdtrain[peers]'",
    ):
        assert sentence in told
    assert "hvdtrain mpi" in told and "raw MPI" in told
    assert not marked()


def test_a_wrong_sum_is_named_and_ends_with_1(begins_with, marked):
    done = begins_with(SPOILT, *QUICK, "--sizes", "4K", "--json")
    assert done.returncode == 1, done.stderr
    assert done.stderr == "hvdtrain: WRONG: hvdtrain mpi, bytes 4096: a result is not the expected one.\n"
    rows = {row["contender"]: row["right"] for row in json.loads(done.stdout)["rows"]}
    assert [name for name, right in rows.items() if not right] == ["hvdtrain mpi"]
    assert not marked()


def test_an_engine_that_fails_ends_with_1_and_the_others_are_measured(begins_with, marked):
    failing = SPOILT.replace("result[-1:] += 1", "raise OSError('no more')")
    done = begins_with(failing, *QUICK, "--sizes", "4K", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert "rank 1" in report["left_out"]["hvdtrain mpi"] and "no more" in report["left_out"]["hvdtrain mpi"]
    assert "raw MPI" in {row["contender"] for row in report["rows"]}
    assert not marked()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_words_and_leaves_nothing(command, marked, tmp_path, number, code):
    words = [*command, "allreduce", "-np", "2", "--rounds", "100000", "--engines", "mpi", "--sizes", "4K"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
    while process.poll() is None and not any(map(_works, marked.now())):
        pass
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert f"{number.name} ended the measurement" in stderr.decode()
    assert not marked()


def _works(pid):
    try:
        return b"hvdtrain.bench.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["-np", "1"], "bench allreduce needs 2 ranks or more"),
        (["-np", "0"], "bench allreduce needs 2 ranks or more"),
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--sizes", "4X"], "'4X' is not a size"),
        (["--sizes", "6", "--dtype", "float64"], "not a whole number of float64"),
        (["--sizes", "100000G"], "type smaller sizes"),
        (["--engines", "nccl"], "--engines nccl"),
        (["-H", "localhost:1"], "fewer than the 2 ranks"),
        (["-H", "no-such-host.invalid:2"], "cannot find"),
        (["--save", "nowhere/to/be/found.json"], "an existing folder"),
        (["--save", "taken"], "taken.json cannot be written"),
        (["--save", ""], "expected the name of a file"),
        (["--save", "kept", "--sizes", "4X"], "'4X' is not a size"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(bench, marked, tmp_path, words, sentence):
    (tmp_path / "taken.json").mkdir()
    done = bench("allreduce", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("hvdtrain: ") and sentence in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]
    assert not marked.now()


def test_a_dtype_that_nobody_knows_is_refused_with_those_there_are(bench):
    done = bench("allreduce", "--dtype", "complex64")
    assert done.returncode == 2
    assert "float32" in done.stderr and "bfloat16" in done.stderr


@pytest.mark.parametrize("typed, named", [("a", "a"), ("a.json", "a"), ("a.png", "a"), ("v1.2", "v1.2")])
def test_report_and_plot_lie_side_by_side_however_the_name_is_typed(
    tmp_path, monkeypatch, capfd, typed, named
):
    monkeypatch.chdir(tmp_path)
    assert run(lambda say: REPORT, lambda report, out: None, False, typed) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{named}.json", f"{named}.png"]


def test_a_report_that_cannot_be_written_in_the_end_is_shown_all_the_same(tmp_path, capfd):
    def measure(say):
        (tmp_path / "sums").rmdir()
        return REPORT

    (tmp_path / "sums").mkdir()
    assert run(measure, lambda report, out: out.print("the table"), False, str(tmp_path / "sums/a")) == 2
    out, err = capfd.readouterr()
    assert "the table" in out
    assert "a.json cannot be written: No such file or directory" in err


def test_peers_can_be_left_out():
    names = [each.name for each in contenders(Options(peers=False))]
    assert "stock Horovod" not in names and "torch Gloo" not in names and "raw MPI" in names
    assert {"stock Horovod", "torch Gloo", "hvdtrain horovod, graph"} <= {
        each.name for each in contenders(Options())
    }


def test_16_bit_floats_need_no_whole_number_of_more_than_2_bytes():
    check(Options(sizes="6", dtype="bfloat16"))
    with pytest.raises(LaunchError, match="multiples of 2"):
        check(Options(sizes="7", dtype="bfloat16"))


def worker(bind):
    return AllreduceWorker(bind, lambda: None, 0, 1)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"]
)
def test_a_sum_of_one_rank_is_the_array_itself(dtype):
    request = {"bytes": 8 * 3001, "dtype": dtype, "seed": 3, "repeat": 2}
    assert worker(lambda array: lambda: array)(request)["right"] is True


@pytest.mark.parametrize(
    "spoil",
    [
        lambda array: array + 1,
        lambda array: array[::-1],
        lambda array: np.where(np.arange(len(array)) == 2047, 0, array),
    ],
)
def test_no_other_array_passes_for_the_sum(spoil):
    request = {"bytes": 4 * 2048, "dtype": "float32", "seed": 5, "repeat": 1}
    assert worker(lambda array: lambda: spoil(array))(request)["right"] is False


def test_the_sum_of_another_round_is_wrong():
    first = []
    keep = worker(lambda array: lambda: first.append(array) or first[0])
    request = {"bytes": 4096, "dtype": "float32", "repeat": 1}
    assert keep({**request, "seed": 1})["right"] is True
    assert keep({**request, "seed": 2})["right"] is False


@pytest.mark.parametrize("size", [2, 12, 64, 65, 1000])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_what_many_ranks_draw_has_a_sum_that_every_dtype_holds(size, dtype):
    drawn = [summands(1, rank, size, np.dtype(dtype)).astype(int) for rank in range(size)]
    assert 0 < np.sum(drawn, 0).max() < 128
    assert all(each.any() for each in drawn)  # nobody's part could be missing and the sum be right


def test_memory_is_that_of_the_ranks_of_one_host(monkeypatch):
    monkeypatch.setattr("hvdtrain.launch.launchers.slurm.node_count", lambda: 64)
    check(Options(num_proc=64, sizes="256M"))
    monkeypatch.setattr("hvdtrain.launch.launchers.slurm.node_count", lambda: 1)
    with pytest.raises(LaunchError, match="4096 ranks need 4 arrays of 256 MiB each"):
        check(Options(num_proc=4096, sizes="256M"))


@pytest.mark.parametrize("name, called", [(COPY, "copyto"), (ADD, "add")])
def test_the_limits_of_one_core_do_what_they_are_called(monkeypatch, name, called):
    (contender,) = (each for each in contenders(Options()) if each.name == name)
    calls = []
    for function in ("copyto", "add"):
        original = getattr(np, function)
        record = lambda *args, original=original, function=function, **options: (  # noqa: E731
            calls.append(function),
            original(*args, **options),
        )
        monkeypatch.setattr(np, function, record)
    one_core(contender.settings)({"bytes": 64, "dtype": "float32", "repeat": 2})
    assert set(calls) == {called}


def test_one_core_knows_no_other_operation():
    with pytest.raises(ValueError, match="copy or add"):
        one_core({"operation": "copies"})
