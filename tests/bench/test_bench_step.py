"""`hvdtrain bench step`: who trains on what, what is computed from it, and what a user sees when it goes wrong."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.bench import models, step
from hvdtrain.bench.models import WORKLOADS
from hvdtrain.bench.step import ScalingTimes, rows_of
from hvdtrain.bench.step_contenders import WEAK, Options, StepContender, step_contenders

MILLIONS = {"resnet20": 0.27, "cnn": 6.4, "mlp": 14.7, "vgg": 14.7, "transformer": 10.0}


def run_short(folder, command, *words):
    model = ["step", "-np", "2", "--model", "mlp", "--batch", "4", "--rounds", "2"]
    done = subprocess.run(
        [*command, *model, *words, "--engines", "mpi", "--no-peers", "--save", "short"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return folder, done


@pytest.fixture(scope="module")
def saved(tmp_path_factory, command):
    """A short run of a real model, its files and what it printed."""
    return run_short(tmp_path_factory.mktemp("saved"), command, "--steps", "1")


@pytest.fixture
def rows(saved):
    """The rows of that run by scaling and contender."""
    report = json.loads((saved[0] / "short.json").read_text())
    return {(row["key"]["scaling"], row["contender"]): row for row in report["rows"]}


def of(row, value):
    return np.array(row["values"][value]["rounds"])


def test_all_train_and_ranks_that_train_together_end_alike(saved, rows):
    assert saved[1].returncode == 0, saved[1].stderr
    everyone = {"alone", "wrapped, one rank", "hvdtrain mpi", "compute only"}
    assert set(rows) == {("weak", name) for name in everyone} | {
        ("strong", "alone"),
        ("strong", "hvdtrain mpi"),
    }
    assert all(row["right"] for row in rows.values())
    assert all(row["key"] == {"model": "mlp", "batch": 4, "scaling": s} for (s, _), row in rows.items())


def test_pace_efficiency_and_communication_follow_from_the_steps_of_the_same_round(rows):
    mine, alone = rows["weak", "hvdtrain mpi"], rows["weak", "alone"]
    silent = rows["weak", "compute only"]
    assert of(mine, "images_per_s") == pytest.approx(2 * 4 / of(mine, "step_ms") * 1e3)
    assert of(mine, "efficiency") == pytest.approx(of(alone, "step_ms") / of(mine, "step_ms"))
    assert of(mine, "communication") == pytest.approx(1 - of(silent, "step_ms") / of(mine, "step_ms"))
    assert of(alone, "efficiency") == pytest.approx([1, 1])
    assert (of(mine, "beside_slowest") >= of(mine, "efficiency")).all()


def test_strong_scaling_divides_one_batch(rows):
    mine, alone = rows["strong", "hvdtrain mpi"], rows["strong", "alone"]
    assert of(mine, "images_per_s") == pytest.approx(4 / of(mine, "step_ms") * 1e3)
    assert of(mine, "speedup") == pytest.approx(of(alone, "step_ms") / of(mine, "step_ms"))
    assert of(mine, "efficiency") == pytest.approx(of(mine, "speedup") / 2)


def test_memory_is_counted_in_gradients(rows):
    mine, alone = rows["weak", "hvdtrain mpi"], rows["weak", "alone"]
    excess = of(mine, "excess_gradients") * 14.7 * 4e6 / 2**20
    assert excess == pytest.approx(of(mine, "peak_mib") - of(alone, "peak_mib"), rel=0.02, abs=0.1)


def test_tables_and_plot_are_there(saved):
    for words in (
        "mlp, a batch of 4 a rank",
        "mlp, a batch of 4 for all ranks",
        "compute only",
        "efficiency:",
    ):
        assert words in saved[1].stdout
    assert "WRONG" not in saved[1].stdout and "…" not in saved[1].stdout
    assert (saved[0] / "short.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_of_fit_are_timed_beside_plain_keras(tmp_path, command):
    others = ["--compression", "topk:0.01", "--every", "2"]
    folder, done = run_short(tmp_path, command, "--fit", "2", *others)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "short.json").read_text())["rows"]
    ways = [f"hvdtrain mpi, {way}" for way in ("topk:0.01", "LocalSGD(2)", "DiLoCo(2)")]
    names = ["alone", "wrapped, one rank", "hvdtrain mpi", *ways, "compute only"]
    assert [(row["contender"], row["key"]["scaling"], row["right"]) for row in rows] == [
        (name, "weak", True) for name in names
    ]
    _, wrapped, mine, *_ = rows
    assert of(mine, "beside_wrapped") == pytest.approx(of(wrapped, "step_ms") / of(mine, "step_ms"))
    assert "mlp, epochs of 2 steps by fit, a batch of 4 a rank" in done.stdout
    assert "…" not in done.stdout


def test_an_epoch_lasts_from_its_first_step_to_the_first_step_of_the_next(monkeypatch):
    import keras

    from hvdtrain.bench import keras_workers

    model = models.compiled(keras, "mlp")
    # A clock that counts the steps that have been trained.
    monkeypatch.setattr(keras_workers.time, "perf_counter", lambda: int(model.optimizer.iterations))
    seconds, loss = keras_workers.KerasSteps(keras, model, {"model": "mlp", "rank": 0}).epoch(2, 3)
    assert (seconds, int(model.optimizer.iterations)) == (3, 4)
    assert math.isfinite(loss)


@pytest.fixture
def played(monkeypatch, marked, tmp_path):
    """Run the command with models that are one number; return its exit code and the steps of each rank."""

    def run(options, **changes):
        diary = tmp_path / "diary"
        settings = {"diary": str(diary)}
        participants = [
            StepContender(
                name,
                "fake_step_worker:prepare",
                {**settings, "name": name, **changes.get(name, {})},
                independent=alone,
                baseline="alone",
                distributed=not alone,
            )
            for name, alone in (("alone", True), ("hvdtrain mpi", False))
        ]
        monkeypatch.setattr(step, "step_contenders", lambda *_: participants)
        code = step.step(options, as_json=True)
        assert not marked()
        return code, [tuple(json.loads(line)) for line in diary.read_text().splitlines()]

    return run


def test_a_process_by_itself_has_the_whole_batch_and_the_others_rest(played, capsys):
    code, ran = played(Options(2, batch=7, rounds=2, steps=3))
    assert code == 0
    batches = {(name, rank): [] for name in ("alone", "hvdtrain mpi") for rank in (0, 1)}
    for name, rank, batch, steps in ran:
        if steps == 3:
            batches[name, rank].append(batch)
    assert batches == {
        ("alone", 0): [7, 7, 6, 6],
        ("alone", 1): [7, 7],
        ("hvdtrain mpi", 0): [7, 7, 3, 3],
        ("hvdtrain mpi", 1): [7, 7, 3, 3],
    }
    keys = [row["key"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert [key["batch"] for key in keys if key["scaling"] == "strong"] == [6, 6]


@pytest.mark.parametrize("ranks, batch", [(1, 4), (2, 1)])
def test_a_batch_that_cannot_be_divided_is_not(played, ranks, batch):
    code, ran = played(Options(ranks, batch=batch, rounds=1, steps=1))
    assert code == 0
    assert {each[2] for each in ran} == {batch}


@pytest.mark.parametrize("fault", [{"differs": 1}, {"diverges": True}])
def test_weights_that_differ_or_are_no_numbers_are_named_and_end_with_1(played, capsys, fault):
    code, _ = played(Options(2, batch=4, rounds=1, steps=1), **{"hvdtrain mpi": fault})
    out, err = capsys.readouterr()
    assert code == 1
    assert {row["contender"] for row in json.loads(out)["rows"] if not row["right"]} == {"hvdtrain mpi"}
    assert "WRONG: hvdtrain mpi" in err


def test_processes_by_themselves_may_end_with_other_weights(played):
    code, _ = played(Options(2, batch=4, rounds=1, steps=1), alone={"differs": 1})
    assert code == 0


def test_who_fails_half_way_keeps_what_was_measured_and_ends_with_1(played, capsys):
    code, _ = played(Options(2, batch=4, rounds=1, steps=1), **{"hvdtrain mpi": {"fails at": 2}})
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert "out of something" in report["left_out"]["hvdtrain mpi"]
    measured = [(row["contender"], row["key"]["scaling"]) for row in report["rows"]]
    assert measured == [("alone", "weak"), ("hvdtrain mpi", "weak"), ("alone", "strong")]


def test_without_its_single_a_contender_has_no_efficiency():
    end = {"checksum": 1, "finite": True, "peak": 10, "gradients": 4}
    mine = ScalingTimes({"torch DDP": [0.5]}, final_states={"torch DDP": [end, end]})
    ddp = next(each for each in step_contenders(Options(engines=("mpi",))) if each.name == "torch DDP")
    (row,) = rows_of([ddp], WEAK, mine, Options(2, batch=4))
    assert set(row.values) == {"step_ms", "images_per_s", "peak_mib"}


def test_who_trains_together_is_also_set_beside_the_slowest_of_those_who_do_not():
    end = {"checksum": 1, "finite": True, "peak": 10, "gradients": 4}
    seconds = {"torch alone": [0.2, 0.3], "torch DDP": [0.25, 0.4]}
    weak = ScalingTimes(seconds, {"torch alone": [0.24, 0.32]}, {name: [end, end] for name in seconds})
    alone, ddp = [each for each in step_contenders(Options(engines=("mpi",))) if each.name in seconds]
    (row,) = rows_of([ddp], WEAK, weak, Options(2, batch=4))
    assert row.values["efficiency"].rounds == pytest.approx([0.8, 0.75])
    assert row.values["beside_slowest"].rounds == pytest.approx([0.96, 0.8])
    (row,) = rows_of([alone], WEAK, weak, Options(2, batch=4))
    assert "beside_slowest" not in row.values


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["-np", "0"], "-np 0 measures nothing"),
        (["--batch", "0"], "--batch 0 measures nothing"),
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--steps", "0"], "--steps 0 measures nothing"),
        (["--fit", "0"], "--fit 0 measures nothing"),
        (["--fit", "12", "--steps", "3"], "leave out --steps"),
        (["--engines", "nccl"], "--engines nccl"),
        (["--compression", "int8,zip"], "--compression zip is not known; expected fp16,"),
        (["--compression", "topk:much"], "--compression topk:much is not known"),
        (["--every", "4"], "--every 4 needs --steps"),
        (["--every", "4", "--steps", "6"], "--every 4 needs --steps with a multiple"),
        (["-H", "localhost:1"], "fewer than the 2 ranks"),
        (["--save", "nowhere/to/be/found.json"], "an existing folder"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(bench, marked, words, sentence):
    done = bench("step", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("hvdtrain: ") and sentence in done.stderr
    assert not marked.now()


def test_peers_and_engines_can_be_left_out():
    names = [each.name for each in step_contenders(Options(engines=("horovod",), peers=False))]
    assert names == ["alone", "wrapped, one rank", "hvdtrain horovod", "compute only"]
    names = [each.name for each in step_contenders(Options(engines=("mpi",), compression=("int8",)))]
    assert {"hvdtrain mpi, int8", "torch DDP, fp16", "torch DDP, powersgd:4"} < set(names)
    assert {each.baseline for each in step_contenders(Options(engines=("mpi",)))} == {
        "alone",
        "torch alone",
        "tf_keras alone",
    }


@pytest.mark.parametrize("module", ["keras", "tf_keras"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_keras_models_have_the_sizes_that_are_documented(module, name):
    keras = pytest.importorskip(module)
    model = models.build(keras, name)
    count = sum(math.prod(each.shape) for each in model.trainable_weights)
    assert count == pytest.approx(MILLIONS[name] * 1e6, rel=0.01)
    inputs, labels = next(WORKLOADS[name].batches(2, seed=0))
    assert model(inputs).shape == (*labels.shape, WORKLOADS[name].classes)


@pytest.mark.parametrize("name", WORKLOADS)
def test_torch_trains_models_of_the_same_size(name):
    torch = pytest.importorskip("torch")
    from hvdtrain.bench import torch_worker

    model = torch_worker.build(name)
    count = sum(each.numel() for each in model.parameters())
    assert count == pytest.approx(MILLIONS[name] * 1e6, rel=0.01)
    assert torch_worker.optimizer(name, model).defaults["lr"] == WORKLOADS[name].rate
    inputs, labels = next(WORKLOADS[name].batches(2, seed=0))
    made = torch.from_numpy(inputs)
    outputs = model(made.movedim(-1, 1) if made.dim() == 4 else made)
    assert outputs.shape == (*labels.shape, WORKLOADS[name].classes)


def test_each_rank_has_batches_of_its_own_the_same_in_each_run():
    first, again, other = (next(WORKLOADS["cnn"].batches(2, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
