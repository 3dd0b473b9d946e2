"""`hvdtrain submit` from what is typed to what sbatch gets, and what is refused before."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.batch.sbatch_options import find_template, gpus, mebibytes, minutes, read_options

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["two words", "$(touch executed)", "`touch executed`", "a'b\"c", "new\nline"]
WORDS += ["", "*", "-x", "--", "ünï", "\\n"]


def test_words_reach_sbatch_untouched_and_first_without_a_shell_then_through_one(login):
    asked = ["--nodes=2", "--cpus-per-task", "4", "-t", "2:00:00", "--mem", "8G", "-J", "my job"]
    options = ["--nodes=2", "--cpus-per-task=4", "--time=2:00:00", "--mem=8G", "--job-name=my job"]
    expected = ["--parsable", *options, login.template("cpu"), "train.py", *WORDS]
    assert login.submitted(*asked, "train.py", *WORDS) == expected
    (login.folder / "words").unlink()
    dry = login.submit("--dry-run", *asked, "train.py", *WORDS)
    assert dry.returncode == 0 and not (login.folder / "words").exists()
    command = dry.stdout[dry.stdout.index("\nsbatch --parsable") + 1 :]
    for pasted in (command, dry.stdout):
        subprocess.run(["/bin/bash", "-c", pasted], cwd=login.folder, env=login.environ(), check=True)
        assert (login.folder / "words").read_text().split("\0")[:-1] == expected
    assert not (login.folder / "executed").exists()


def test_a_script_whose_name_would_be_executed(login):
    name = "a b\ntouch executed\n$(touch executed).py"
    (login.folder / name).write_text("")
    assert login.submitted(name)[-1] == name
    dry = login.submit("--dry-run", name).stdout
    subprocess.run(["/bin/bash", "-c", dry], cwd=login.folder, env=login.environ(), check=True)
    assert (login.folder / "words").read_text().split("\0")[-2] == name
    assert not (login.folder / "executed").exists()


def test_what_is_said_after_a_submission(login):
    login.job(0, "PENDING")
    told = login.submit("train.py").stdout
    log_file = shlex.quote(str(login.folder / "hvdtrain-42.log"))
    assert told.splitlines()[0] == "Submitted batch job 42"
    assert all(line in told for line in (f"tail -F {log_file}", "squeue -j 42", "scancel 42"))


CHOICES = [
    (["train.py"], "cpu", []),
    (
        ["--gpus-per-node=4", "--account=deep", "-p", "gpu", "train.py"],
        "gpu",
        ["--gres=gpu:4", "--ntasks-per-node=4"],
    ),
    (["--gpus-per-node=a100:2", "-A", "deep", "-p", "gpu", "train.py"], "gpu", ["--gres=gpu:a100:2"]),
    (["--sbatch", "--gpus-per-node=2", "-A", "deep", "-p", "gpu", "train.py"], "gpu", ["--gres=gpu:2"]),
    (["--gpus-per-node=0", "train.py"], "cpu", ["--gres=none"]),
    (["--preemptible", "train.py"], "preemptible", []),
    (["--preemptible", "--image=train.py", "train.py"], "container", []),
    (["--array=0-1", "trials.txt", "train.py"], "array_sweep", ["--array=0-1"]),
    (["--template=array_sweep", "trials.txt", "train.py"], "array_sweep", ["--array=0-1"]),
    (["--template=smoke", "--nodes=3"], "smoke", ["--nodes=3"]),
    (["--sbatch", "-N 2 --exclusive --constraint 'a b'", "train.py"], "cpu", ["--nodes=2", "--exclusive"]),
    (["-n6", "-N2", "train.py"], "cpu", ["--ntasks=6", "--nodes=2", "--ntasks-per-node=3"]),
    (["-n6", "--ntasks-per-node=3", "train.py"], "cpu", ["--ntasks=6", "--nodes=2", "--ntasks-per-node=3"]),
    (
        ["-n4", "--gpus-per-task=1", "-p", "gpu", "-A", "deep", "train.py"],
        "gpu",
        ["--gres=gpu:4", "--ntasks-per-node=4"],
    ),
    (
        ["--ntasks-per-node=2", "--gpus-per-task=a100:1", "-p", "gpu", "-A", "deep", "train.py"],
        "gpu",
        ["--gres=gpu:a100:2"],
    ),
    (["--sbatch", "--gpus-per-task=1", "-p", "gpu", "-A", "deep", "train.py"], "gpu", ["--gres=gpu:1"]),
    (
        [
            *[
                "--gpus-per-node=4",
                "--cpus-per-gpu=3",
                "--mem-per-gpu=8G",
                "-p",
                "gpu",
                "-A",
                "deep",
                "train.py",
            ]
        ],
        "gpu",
        ["--cpus-per-task=3", "--mem=32768M", "--ntasks-per-node=4"],
    ),
    (
        [
            *[
                "--gpus-per-node=4",
                "--ntasks-per-node=2",
                "--cpus-per-gpu=3",
                "-p",
                "gpu",
                "-A",
                "deep",
                "train.py",
            ]
        ],
        "gpu",
        ["--cpus-per-task=6"],
    ),
    (["--sbatch", "--ntasks=6 -N2", "train.py"], "cpu", ["--ntasks=6", "--ntasks-per-node=3"]),
]


@pytest.mark.parametrize(("asked", "name", "options"), CHOICES, ids=lambda each: " ".join(each)[:40])
def test_the_template_that_is_chosen(login, asked, name, options):
    words = login.submitted(*asked)
    assert login.template(name) in words
    assert set(options) <= set(words[: words.index(login.template(name))])


def test_options_of_run_stand_before_the_script_and_after_the_trials(login):
    assert login.submitted("--wrap", "--scale-batch", "train.py", "--wrap")[-4:] == [
        "--wrap",
        "--scale-batch",
        "train.py",
        "--wrap",
    ]
    words = login.submitted("--as-horovod", "-a", "0", "trials.txt", "train.py")
    assert words[-3:] == ["trials.txt", "--as-horovod", "train.py"]


def test_options_of_srun_are_handed_on_before_the_script(login):
    words = login.submitted("--cpu-bind=cores", "--gpu-bind", "closest", "train.py", "--cpu-bind=x")
    assert words[-4:] == ["--cpu-bind=cores", "--gpu-bind=closest", "train.py", "--cpu-bind=x"]


def test_a_template_of_ones_own(login):
    (login.folder / "mine.sbatch").write_text("#!/bin/bash\n#SBATCH --nodes=9\n")
    assert "--nodes=9 is more than partition main gives" in login.refused(
        "--template", "./mine.sbatch", "train.py"
    )
    assert str(login.folder / "mine.sbatch") in login.submitted("--template=mine.sbatch", "-N1", "train.py")


REFUSED = [
    ([], "There is no script to run", "hvdtrain submit --nodes=2 train.py"),
    (["gone.py"], "The script gone.py is not there (searched from", "ls"),
    (["."], "The script . is a folder", "ls"),
    (["python", "train.py"], "hvdtrain starts the ranks and their Python", "without python"),
    (["--", "-train.py"], "-train.py looks like an option", "./-train.py"),
    (["--nodes=4", "train.py"], "--nodes=4 is more than partition main gives to a job: 3", "--nodes=3"),
    (["--nodes=x", "train.py"], "--nodes=x is not a number", "--nodes=2"),
    (["--nodes=", "train.py"], "--nodes is empty", "Is a shell variable not set?"),
    (["-t", "8h", "train.py"], "--time=8h is not a time", "--time=8:00:00"),
    (
        ["-t", "2-0", "train.py"],
        "--time=2-0 is more than the 1-00:00:00",
        "--time=1-00:00:00, with --preemptible",
    ),
    (["--mem=lots", "train.py"], "--mem=lots is not an amount", "--mem=32G"),
    (["--mem=20G", "-N2", "train.py"], "20480 MiB of memory a node", "--mem=16000M"),
    (
        ["-c", "9", "-N2", "train.py"],
        "9 CPUs a node (1 x 9)",
        "each of 2 nodes of partition main has 8 at most",
    ),
    (["-c", "4", "--ntasks-per-node=5", "train.py"], "20 CPUs a node (5 x 4)", "--cpus-per-task=3"),
    (
        ["-c", "17", "--ntasks-per-node=17", "train.py"],
        "has 16 at most",
        "--ntasks-per-node=16 --cpus-per-task=1",
    ),
    (["-p", "mian", "train.py"], "There is no partition mian; there is main, gpu, old", "--partition=main"),
    (["-p", "old", "-N2", "train.py"], "Partition old is in state INACTIVE", "sinfo"),
    (
        ["-p", "gpu", "train.py"],
        "accepts jobs of the accounts deep,learning, and none is given",
        "--account=deep",
    ),
    (["--gpus-per-node=1", "train.py"], "1 GPU(s) a node are asked for", "--partition=gpu"),
    (["--gpus-per-node=8", "-p", "gpu", "-A", "deep", "train.py"], "has 4 at most", "--gpus-per-node=4"),
    (
        ["--gpus-per-node=h100:1", "-p", "gpu", "-A", "deep", "train.py"],
        "1 GPU(s) of kind h100",
        "sinfo -o '%P %G'",
    ),
    (
        ["--gpus-per-node=2", "--ntasks-per-node=3", "train.py"],
        "3 rank(s) and 2 GPU(s) a node",
        "--ntasks-per-node=2",
    ),
    (["--gpus-per-task=some", "train.py"], "--gpus-per-task=some is not a number of GPUs", "a100:1"),
    (["--gpus-per-task=1", "--gpus-per-node=2", "train.py"], "means --gpus-per-node=1", "type one"),
    (["--cpus-per-gpu=4", "train.py"], "counts by GPUs, and none are asked for", "--cpus-per-task"),
    (["--mem-per-gpu=4G", "train.py"], "counts by GPUs, and none are asked for", "--mem"),
    (["--mem-per-gpu=x", "--gpus-per-node=1", "train.py"], "--mem-per-gpu=x is not an amount", "16G"),
    (
        ["--cpus-per-gpu=4", "-c2", "--gpus-per-node=1", "train.py"],
        "--cpus-per-task set the same",
        "type one",
    ),
    (["--mem-per-gpu=4G", "--mem=9G", "--gpus-per-node=1", "train.py"], "and --mem set the same", "type one"),
    (["--sbatch=--cpu-bind=cores", "train.py"], "--sbatch has --cpu-bind", "before the script"),
    (["-n20", "train.py"], "40 CPUs a node (20 x 2)", "--ntasks-per-node=16"),
    (["--gpus-per-node=many", "train.py"], "--gpus-per-node=many is not a number of GPUs", "a100:4"),
    (["--template=cpu", "--gpus-per-node=2", "train.py"], "does not use the GPUs that are asked for", "gpu"),
    (
        ["--template=cqu", "train.py"],
        "cqu.sbatch cannot be read: No such file",
        "array_sweep, container, cpu",
    ),
    (["--template=smoke", "train.py"], "The smoke test has its own script", "leave them out"),
    (["--template=cpu", "--preemptible", "train.py"], "contradict each other", "type one"),
    (["--template=container", "train.py"], "The template container needs an image", "--image="),
    (["--image=gone.sif", "train.py"], "The image gone.sif cannot be read", "--image="),
    (["-N2", "--sbatch=-N3", "train.py"], "--nodes is given twice, as 2 and as 3", "type one"),
    (
        ["--sbatch=train.py", "x.py"],
        "'train.py' among the options for sbatch is not an option",
        "begin with a dash",
    ),
    (["--sbatch=--wrap=date", "train.py"], "--sbatch has --wrap", "name a Python script"),
    (["--sbatch=--test-only", "train.py"], "--sbatch has --test-only", "--dry-run"),
    (["--sbatch=--gpus=8", "train.py"], "--sbatch has --gpus", "--gpus-per-node"),
    (["--sbatch='", "train.py"], "cannot be parsed", "No closing quotation"),
    (["--sbatch=-o logs/%j.log", "train.py"], "The log's folder logs is not there", "mkdir -p logs"),
    (["--sbatch=-e err/%x.err", "train.py"], "The log's folder err is not there", "mkdir -p err"),
    (["-J", "fit", "--sbatch=-o logs/%x/out.log", "train.py"], "folder logs/fit is not", "mkdir -p logs/fit"),
    (["--sbatch=-o 50%%/%j.log", "train.py"], "folder 50% is not there", "mkdir -p 50%"),
    (["--sbatch=-o logs/%4j/out.log", "train.py"], "depends on %4j", "--output=logs/%x-%j.log"),
    (["-J", "a/b", "train.py"], "--job-name=a/b has a slash", "--job-name=a-b"),
    (["--cluster=gone", "train.py"], "gone.toml cannot be read: No such file", ""),
    (
        ["-a", "0-2", "trials.txt", "train.py"],
        "trials.txt has 2 trials, 0 to 1, and --array=0-2",
        "--array=0-1",
    ),
    (
        ["-a", "0", "gone.txt", "train.py"],
        "The file of trials gone.txt cannot be read",
        "trials.txt train.py",
    ),
    (["-a", "0"], "A sweep needs a file of trials, then a script.", "trials.txt train.py"),
    (["-a", "0", "train.py"], "then a script, and only train.py was given", "trials.txt train.py"),
    (["-t", "0", "train.py"], "--time=0 is more than the 1-00:00:00", "--time=1-00:00:00"),
    (["srun", "-n2", "train.py"], "so srun is not needed", "without srun"),
    (["--scale-batch", "train.py"], "--scale-batch says how --wrap divides", "--wrap --scale-batch"),
    (["--wrap", "--as-horovod", "train.py"], "type one of them", "--as-horovod is for a script"),
]


@pytest.mark.parametrize(("asked", "sentence", "mend"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_is_refused_before_it_waits_in_the_queue(login, asked, sentence, mend):
    said = login.refused(*asked)
    assert sentence in said and mend in said


def test_variables_that_a_template_would_stumble_over(login):
    assert "HVDTRAIN_STAGE names the data gone" in login.refused("train.py", HVDTRAIN_STAGE="gone")
    assert "HVDTRAIN_SITE names gone.sh, which is not there" in login.refused(
        "train.py", HVDTRAIN_SITE="gone.sh"
    )
    assert "it may be srun or mpirun" in login.refused("train.py", HVDTRAIN_LAUNCHER="mpiexec")


def test_what_is_worth_a_word_does_not_stop_the_job(login):
    done = login.submit(
        "-p", "gpu", "-A", "deep", "--gpus-per-node=2", "--ntasks-per-node=1", "train.py", "--nodes=2"
    )
    assert done.returncode == 0
    assert "1 rank(s) and 2 GPU(s) a node: 1 GPU(s) would be idle" in done.stderr
    assert "--nodes=2 after the script is passed to the script" in done.stderr


def test_no_slurm_here(login):
    (login.bin / "sbatch").unlink()
    assert "There is no sbatch on PATH" in login.refused("train.py")
    dry = login.submit("--dry-run", "train.py")
    assert dry.returncode == 0 and "the checks that need Slurm were skipped" in dry.stdout
    assert dry.stdout.splitlines()[-1] == shlex.join(
        ["sbatch", "--parsable", login.template("cpu"), "train.py"]
    )


def test_sbatch_has_the_last_word_before_and_at_the_submission(login):
    (login.folder / "code").write_text("1\n")
    words = "sbatch: error: Invalid account or account/partition combination specified"
    (login.folder / "test_only").write_text(f"{words}\nallocation failure: Invalid account\n")
    said = login.refused("train.py")
    assert (
        "Invalid account or account/partition combination specified" in said and "sacctmgr show assoc" in said
    )
    (login.folder / "code").write_text("0\n")
    (login.folder / "refusal").write_text("sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
    done = login.submit("train.py")
    assert done.returncode == 2 and "sbatch refused the job: QOSMaxSubmitJobPerUserLimit" in done.stderr
    assert "squeue --me" in done.stderr


def test_nodes_that_are_down_are_waited_for(login):
    """sbatch --test-only refuses what sbatch itself queues until the nodes are back."""
    (login.folder / "nodes").write_text("main|n1|8|16000|(null)|idle\nmain|n2|8|16000|(null)|drained\n")
    (login.folder / "code").write_text("1\n")
    (login.folder / "test_only").write_text(
        "allocation failure: Requested node configuration is not available\n"
    )
    done = login.submit("-N2", "train.py")
    assert done.returncode == 0 and "the job waits for n2 (drained)" in done.stderr


def test_a_log_in_a_folder_of_the_jobs_name(login):
    (login.folder / "logs" / "fit").mkdir(parents=True)
    assert "--output=logs/%x/%j.log" in login.submitted("-J", "fit", "--sbatch=-o logs/%x/%j.log", "train.py")


def test_force(login):
    assert login.submitted("--force", "-N9", "train.py")[1] == "--nodes=9"


def test_several_partitions_of_which_one_will_do(login):
    assert login.submitted("-p", "main,gpu", "-A", "deep", "-t", "9-0", "train.py")
    (login.folder / "words").unlink()
    assert "--time=9-0 is more than" in login.refused("-p", "main", "-t", "9-0", "train.py")


def test_slurm_that_describes_nothing(login):
    (login.folder / "partitions").write_text("")
    done = login.submit("train.py")
    assert done.returncode == 0 and "no limit was checked" in done.stderr


def test_quantities_as_slurm_writes_them():
    times = {"30": 30, "1:30": 1.5, "2:00:00": 120, "1-0": 1440, "1-2:30": 1590, "1-0:0:30": 1440.5}
    assert {text: minutes(text) for text in times} == times
    assert minutes("UNLIMITED") == minutes("0") == mebibytes("UNLIMITED") == float("inf")
    assert [minutes(text) for text in ("8h", "", "-1", "1:2:3:4", "1-")] == [None] * 5
    assert [mebibytes(text) for text in ("512", "2G", "1T", "2048K", "x", "-1")] == [
        512,
        2048,
        1 << 20,
        2,
        None,
        None,
    ]
    assert gpus("gpu:a100:4(S:0,1),nvme:1") == ("a100", 4)
    assert gpus("gpu:a100:4,gpu:v100:2") == ("", 6)
    assert gpus("gpu") == ("", 1) and gpus("(null)") == gpus("none") == ("", 0)


def test_an_installed_package_brings_the_templates(login):
    """As `pip install .` lays it out, far from any checkout."""
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("setuptools is not installed")
    copy, installed = login.folder / "checkout", login.folder / "site-packages"
    for name in ("hvdtrain", "slurm"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(installed)]
    subprocess.run(build, cwd=copy, env=login.environ(), check=True, capture_output=True)
    words = login.submitted("train.py", PYTHONPATH=str(installed))
    assert words[-2:] == [str(installed / "hvdtrain" / "slurm" / "cpu.sbatch"), "train.py"]
    assert {path.name for path in (installed / "hvdtrain" / "slurm").glob("*.sbatch")} == {
        path.name for path in (ROOT / "slurm").glob("*.sbatch")
    }


@pytest.mark.parametrize("name", ["cpu", "gpu", "preemptible", "container", "array_sweep", "smoke"])
def test_every_template_is_there(name):
    found = find_template(name)
    assert found.defaults["nodes"] and found.proves == (name != "smoke")


def test_options_as_sbatch_reads_them():
    words = ["-N2", "-t", "1:00", "--mem=4G", "--qos", "long", "--exclusive", "-pmain", "--requeue"]
    assert read_options(words) == {
        "nodes": "2",
        "time": "1:00",
        "mem": "4G",
        "qos": "long",
        "exclusive": None,
        "partition": "main",
        "requeue": None,
    }
