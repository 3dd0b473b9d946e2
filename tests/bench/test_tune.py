"""`hvdtrain tune`: what counts as help, what is written down, and that `hvdtrain run` finds it."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from hvdtrain.bench import tune, tune_trial
from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.tune import KnobResult
from hvdtrain.launch import tuned_settings
from hvdtrain.launch.launchers.mpirun import KNOWN
from hvdtrain.launch.tuned_settings import KNOBS, STEPS, Knob, unasked

HALF = Knob("half", "speed", {"HVDTRAIN_TEST_FACTOR_A": "0.5"})
LESS = Knob("less", "speed", {"HVDTRAIN_TEST_FACTOR_A": "0.8"})
SLOWER = Knob("slower", "other", {"HVDTRAIN_TEST_FACTOR_B": "1.5"})
LOPSIDED = Knob("lopsided", "third", {"HVDTRAIN_TEST_FACTOR_C": "0.5", "HVDTRAIN_TEST_LARGE": "2.5"})
STEPPING = Knob("stepping", "fourth", {"HVDTRAIN_TEST_FACTOR_D": "0.5"}, shows=STEPS)


@pytest.fixture
def tuning(monkeypatch, marked, tmp_path):
    """Tune with workers whose speed depends on the variables of the settings; return the exit code and the file."""
    file = tmp_path / "found" / "tuned.json"

    def contender(shows, engine, model, name, environ):
        return Contender(name, "fake_tuned_worker:prepare", environ={**environ, "HVDTRAIN_ENGINE": engine})

    monkeypatch.setattr(tune_trial, "_contender", contender)

    def run(*knobs, **options):
        monkeypatch.setenv(tuned_settings.VARIABLE, str(file))
        monkeypatch.setattr(tune, "KNOBS", knobs)
        code = tune.tune(tune.Options(2, rounds=3, engines=("mpi",), **options), as_json=True)
        assert not marked()
        return code, file

    return run


def test_the_best_of_each_choice_is_written_down_and_used(tuning, tmp_path, capsys):
    code, file = tuning(HALF, LESS, SLOWER, LOPSIDED, STEPPING)
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    gains = {
        (row["contender"], *row["key"].values()): row["values"]["gain"]["median"] for row in report["rows"]
    }
    assert gains == {
        ("speed: half",): pytest.approx(2),
        ("speed: less",): pytest.approx(1.25),
        ("other: slower",): pytest.approx(1 / 1.5),
        # Of four sums three take half, and the largest 1.25 times as long.
        ("third: lopsided",): pytest.approx((8 / 1.25) ** 0.25),
        ("fourth: stepping",): pytest.approx(2),
        (tune.TOGETHER, "sums, mpi"): pytest.approx(4),
        (tune.TOGETHER, "steps, mpi"): pytest.approx(4),
    }
    (found,) = tuned_settings.read(file)
    assert found.settings == {"HVDTRAIN_TEST_FACTOR_A": "0.5", "HVDTRAIN_TEST_FACTOR_D": "0.5"}
    script = tmp_path / "script.py"
    script.write_text(
        "import os; print(os.environ['HVDTRAIN_TEST_FACTOR_A'], os.environ['HVDTRAIN_TEST_FACTOR_D'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", "2", str(script)],
        env={**os.environ, tuned_settings.VARIABLE: str(file), "HVDTRAIN_TEST_FACTOR_D": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.5 7\n") == 2
    assert f"({file}): HVDTRAIN_TEST_FACTOR_A=0.5\n" in done.stderr


def test_what_helps_no_longer_together_is_not_written_and_what_was_there_goes(tuning, capsys):
    first = Knob("first", "a", {"HVDTRAIN_TEST_FACTOR_A": "0.5"})
    _, file = tuning(first)
    assert tuned_settings.read(file)[0].settings
    clash = Knob("clash", "b", {"HVDTRAIN_TEST_FACTOR_B": "0.9", "HVDTRAIN_TEST_CLASH_1": ""})
    other = Knob("other", "c", {"HVDTRAIN_TEST_FACTOR_C": "0.9", "HVDTRAIN_TEST_CLASH_2": ""})
    code, _ = tuning(clash, other)
    assert code == 0
    assert json.loads(file.read_text()) == []


@pytest.mark.parametrize(
    "knob, words",
    [
        (Knob("broken", "a", {"HVDTRAIN_TEST_BROKEN": "1"}), "it does not start with this"),
        (Knob("wrong", "a", {"HVDTRAIN_TEST_WRONG": "1", "HVDTRAIN_TEST_FACTOR": "0.1"}), "was WRONG"),
    ],
)
def test_a_setting_with_which_nothing_works_is_left_out_and_named(tuning, capsys, knob, words):
    code, file = tuning(knob, HALF)
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert words in report["left_out"][f"a: {knob.name}"]
    assert tuned_settings.read(file)[0].settings == HALF.environ


def test_what_the_user_has_set_is_left_alone(tuning, monkeypatch, capsys):
    monkeypatch.setenv("HVDTRAIN_TEST_FACTOR_A", "1")
    _, file = tuning(HALF, STEPPING)
    report = json.loads(capsys.readouterr().out)
    assert "set in your environment" in report["left_out"]["speed: half"]
    assert tuned_settings.read(file)[0].settings == STEPPING.environ


def test_a_gain_is_a_geometric_mean_over_the_work_of_each_round():
    chance = np.random.default_rng(0)
    before, after = chance.uniform(1, 2, (2, 3, 5))
    works = [f"work {number}" for number in range(3)]
    gain, worst = tune_trial.gain(dict(zip(works, before, strict=True)), dict(zip(works, after, strict=True)))
    expected = np.exp(np.log(before / after).mean(axis=0))
    np.testing.assert_allclose(gain.rounds, expected)
    assert gain.median == pytest.approx(np.median(expected))
    assert worst == pytest.approx(np.median(before / after, axis=1).min())


@pytest.mark.parametrize(
    "times, helps",
    [
        ([0.9, 0.9, 0.9], True),
        ([0.99, 0.99, 0.99], False),  # too little
        ([0.7, 0.9, 1.2], False),  # may be noise
    ],
)
def test_noise_is_no_help(times, helps):
    assert KnobResult(HALF, *tune_trial.gain({"a": [1, 1, 1]}, {"a": times})).helps == helps


def test_harm_in_one_kind_of_work_is_not_made_up_for_by_another():
    before = {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert KnobResult(HALF, *tune_trial.gain(before, {"a": [0.5] * 3, "b": [1.0] * 3})).helps
    assert not KnobResult(HALF, *tune_trial.gain(before, {"a": [0.5] * 3, "b": [1.2] * 3})).helps
    assert math.isclose(tune_trial.gain(before, {"a": [0.5] * 3, "b": [1.2] * 3})[1], 1 / 1.2)


@pytest.mark.parametrize("mpi", [each.name for each in KNOWN])
def test_each_mpi_has_rows_of_its_own_in_the_table(mpi):
    mine = [each for each in KNOBS if each.mpi and each.fits(mpi, "one")]
    prefix = {"Open": "OMPI_MCA_", "Inte": "I_MPI_", "MPIC": "MPIR_CVAR_"}[mpi[:4]]
    assert len(mine) >= 3 and all(name.startswith(prefix) for each in mine for name in each.environ)
    assert len({(each.choice, each.name) for each in mine}) == len(mine)


def test_nothing_is_set_unasked_between_hosts():
    assert [bool(unasked(each.name, "several")) for each in KNOWN] == [False] * len(KNOWN)
    assert set(unasked("Open MPI 4", "one")) == {"OMPI_MCA_btl_vader_eager_limit"}
    assert set(unasked("Open MPI 5", "one")) == {"OMPI_MCA_btl_sm_eager_limit"}


BAD = {
    ("-np", "1"): "-np 1: tune needs 2 ranks or more",
    ("--rounds", "2"): "--rounds 2 is too few to tell a gain from noise",
    ("--engines", "gloo"): "--engines gloo: expected mpi, horovod or mpi,horovod",
    ("-H", "no-such-host.invalid:2"): "no-such-host.invalid",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_sentence_and_starts_nothing(words, marked):
    done = subprocess.run(
        [sys.executable, "-c", "from hvdtrain.cli import main; main()", "tune", *words],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert BAD[words] in done.stderr and done.stderr.count("\n") == 1
    assert not marked.now()


def test_a_file_that_cannot_be_added_to_is_named_before_anything_is_measured(tuning, tmp_path, capsys):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "tuned.json").write_text('[{"settings": 3}]')
    code, file = tuning(HALF)
    assert code == 2
    err = capsys.readouterr().err
    assert f"{file} is not what `hvdtrain tune` has written" in err and "set HVDTRAIN_TUNED=off" in err
    assert file.read_text() == '[{"settings": 3}]'


def test_one_real_setting_is_tried_with_real_sums(monkeypatch, marked, tmp_path, capsys):
    monkeypatch.setenv(tuned_settings.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tune, "KNOBS", (Knob("none", "verification", {"HVDTRAIN_VERIFY": "off"}),))
    code = tune.tune(tune.Options(2, rounds=3, engines=("mpi",)), as_json=False)
    out = capsys.readouterr().out
    assert code == 0 and "verification: none" in out
    assert not marked()
