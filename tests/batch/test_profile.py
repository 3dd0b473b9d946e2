"""A cluster's profile: what it fills in, how mistakes are named, and what becomes of it on the nodes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.batch.cluster_profile import read_profile
from hvdtrain.batch.site_script import compose_site
from hvdtrain.launch.hosts import LaunchError


def test_what_goes_before_what(login):
    login.profile(
        'partition = "gpu"\naccount = "deep"\ncpus-per-task = 4\nsbatch = ["--exclusive"]\ntime = 30\n'
    )
    words = login.submitted("train.py")
    assert words[1:-2] == [
        "--partition=gpu",
        "--account=deep",
        "--time=30",
        "--cpus-per-task=4",
        "--exclusive",
    ]
    words = login.submitted("-p", "main", "train.py", SBATCH_TIMELIMIT="5")
    assert "--partition=main" in words and not any(word.startswith("--time") for word in words)
    assert not any(word.startswith("--time") for word in login.submitted("--template=smoke"))
    login.profile('gpus_per_node = 4\npartition = "gpu"\naccount = "deep"\n')
    assert {"--gres=gpu:4", login.template("gpu")} <= set(login.submitted("train.py"))
    assert not any(word.startswith("--gres") for word in login.submitted("--template=cpu", "train.py"))


def test_gpus_of_the_profile_count_for_what_is_typed_by_gpu(login):
    login.profile('gpus_per_node = 4\npartition = "gpu"\naccount = "deep"\nmem = "1G"\nntasks_per_node = 4\n')
    words = login.submitted("--cpus-per-gpu=2", "--mem-per-gpu=1G", "train.py")
    assert {"--gres=gpu:4", "--cpus-per-task=2", "--mem=4096M"} <= set(words)


def test_profiles_by_name_and_by_file(login):
    login.profile('account = "by name"', name="big")
    own = login.folder / "own.toml"
    own.write_text('account = "by file"')
    assert "--account=by name" in login.submitted("--cluster=big", "train.py")
    assert "--account=by file" in login.submitted("--cluster=./own.toml", "train.py")
    assert "--account=by file" in login.submitted("train.py", HVDTRAIN_CLUSTER=str(own))
    assert "--account=by name" in login.submitted("train.py", HVDTRAIN_CLUSTER="big")


MISTAKES = [
    ("partiton = 'x'", "the unknown key partiton: did you mean partition?"),
    ("pmi_type = 'x'", "did you mean pmi?"),
    ("zzz = 1", "the keys are partition, account"),
    ("time = 08:00:00", 'in quotes: time = "08:00:00"'),
    ("cpus_per_task = '4'", "expected a whole number of 1 or more: cpus_per_task = 4"),
    ("cpus_per_task = true", "expected a whole number"),
    ("nodes = 0", "expected a whole number of 1 or more"),
    ("modules = 'openmpi'", 'expected a list of texts: modules = ["…", "…"]'),
    ("modules = ['openmpi', 4]", "expected a list of texts"),
    ("account = 5", 'expected a text in quotes: account = "…"'),
    ("account = main", "Texts need quotes"),
    ("launcher = 'mpiexec'", "it may be srun or mpirun"),
    ("[partition]\nname = 'x'", "expected a text in quotes"),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES)
def test_a_profile_with_a_mistake(login, text, sentence):
    path = login.profile(text)
    with pytest.raises(LaunchError) as raised:
        read_profile(None, login.environ())
    assert str(path) in str(raised.value) and sentence in str(raised.value)


def test_what_a_profile_says_is_true_on_the_nodes_and_only_setup_is_taken_as_shell(login):
    (login.folder / "venv $(touch executed)" / "bin").mkdir(parents=True)
    (login.folder / "venv $(touch executed)" / "bin" / "activate").write_text("IN_VENV=yes")
    login.profile(
        "modules = ['openmpi/4.1', 'a b; touch executed']\nvenv = 'venv $(touch executed)'\n"
        "setup = ['SETUP=\"$IN_VENV sir\"']\npmi = 'pmix'\nlauncher = 'mpirun'\nnetwork = '$(touch executed)'\n"
    )
    (login.folder / "own.sh").write_text("OWN=first")
    words = login.submitted("train.py", HVDTRAIN_SITE="own.sh")
    assert words[1:] == [login.template("cpu"), "train.py"]
    site = (login.folder / "site").read_text()
    told = '"$OWN" "$LOADED" "$SETUP" "$SLURM_MPI_TYPE" "$HVDTRAIN_LAUNCHER" "$OMPI_MCA_btl_tcp_if_include"'
    script = f"""
        set -euo pipefail
        module() {{ shift; LOADED=$(printf '<%s>' "$@"); }}
        set +u; source {shlex.quote(site)}; set -u
        printf '%s|' {told}
    """
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd="/", env=login.environ(), capture_output=True, text=True
    )
    expected = [
        "first",
        "<openmpi/4.1><a b; touch executed>",
        "yes sir",
        "pmix",
        "mpirun",
        "$(touch executed)",
        "",
    ]
    assert done.stdout.split("|") == expected, done.stderr
    assert not list(login.folder.rglob("executed"))
    # A job that waits keeps its file; the same profile needs no second.
    assert login.submitted("train.py", HVDTRAIN_SITE="own.sh") and (login.folder / "site").read_text() == site
    login.profile("pmi = 'pmi2'\n")
    login.submit("train.py")
    assert Path(site).exists() and (login.folder / "site").read_text() != site


def test_a_dry_run_writes_nothing_and_prints_what_does(login):
    login.profile("pmi = 'it\\'s'\nsetup = ['A=1']\n".replace("\\'", ""))
    before = sorted(login.folder.rglob("*"))
    dry = login.submit("--dry-run", "train.py")
    assert dry.returncode == 0 and sorted(login.folder.rglob("*")) == before
    assert login.submit("train.py").returncode == 0
    site = Path((login.folder / "site").read_text())
    text = site.read_text()
    site.unlink()
    path = f"{login.environ()['PATH']}:{os.environ['PATH']}"
    subprocess.run(
        ["/bin/bash", "-ec", dry.stdout],
        cwd=login.folder,
        env=login.environ(PATH=path),
        check=True,
        timeout=60,
    )
    assert site.read_text() == text


# A conda that knows one way only: the shell function that its hook defines.
CONDA = """#!/bin/sh
echo 'conda() { [ "$1" = activate ] && [ "$2" = "my env" ] && export IN_CONDA="$2"; }'
"""


def activated(login, site, **environ):
    script = f'set -euo pipefail; set +u; source {shlex.quote(str(site.path))}; set -u; printf %s "$IN_CONDA"'
    path = f"{login.environ()['PATH']}:/usr/bin:/bin"
    return subprocess.run(
        ["/bin/bash", "-c", script],
        env=login.environ(PATH=path, **environ),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_conda_environment_is_activated_on_the_nodes(login):
    login.profile("conda = 'my env'\n")
    site = compose_site(read_profile(None, login.environ()), login.environ())
    site.write()
    assert "conda is not on PATH" in activated(login, site).stderr
    (login.bin / "conda").write_text(CONDA)
    (login.bin / "conda").chmod(0o755)
    assert activated(login, site).stdout == "my env"


def test_the_conda_of_whoever_submits_is_found_where_the_nodes_have_none(login):
    base = login.folder / "mini conda"
    (base / "etc" / "profile.d").mkdir(parents=True)
    (base / "bin").mkdir()
    (base / "bin" / "conda").write_text(CONDA)
    (base / "bin" / "conda").chmod(0o755)
    (base / "etc" / "profile.d" / "conda.sh").write_text(f'PATH="{base}/bin:$PATH"')
    login.profile("conda = 'my env'\n")
    environ = login.environ(CONDA_EXE=str(base / "bin" / "conda"))
    site = compose_site(read_profile(None, environ), environ)
    site.write()
    assert activated(login, site).stdout == "my env"


def test_a_conda_environment_that_is_not_there(login):
    login.profile("conda = './env'\n")
    assert "is not a conda environment" in login.refused("train.py")
    (login.folder / "env" / "conda-meta").mkdir(parents=True)
    assert login.submitted("train.py")
    login.profile("conda = 'a'\nvenv = 'b'\n")
    (login.folder / "words").unlink()
    assert "write one of them" in login.refused("train.py")


def test_a_venv_that_is_not_there(login):
    login.profile("venv = '$HOME/venv'\n")
    assert "$HOME/venv/bin/activate is not there" in login.refused("train.py")


def test_an_export_that_would_keep_the_profile_from_the_job(login):
    login.profile("pmi = 'pmix'\n")
    for told in (["--sbatch=--export=NONE"], []):
        said = login.refused(*told, "train.py", **({} if told else {"SBATCH_EXPORT": "NONE"}))
        assert "--export=NONE does not export HVDTRAIN_SITE" in said
    assert "--export=HVDTRAIN_SITE" in login.submitted("--sbatch=--export=HVDTRAIN_SITE", "train.py")


def test_nothing_is_written_where_there_is_nothing_to_say(login):
    assert compose_site(read_profile(None, login.environ()), login.environ()) is None
    assert login.submitted("train.py") and (login.folder / "site").read_text() == ""
    assert not (login.folder / "config").exists()


def test_the_nodes_find_the_hvdtrain_that_was_typed(login, monkeypatch):
    """As in .venv/bin/hvdtrain submit, with nothing of it on PATH."""
    (login.bin / "hvdtrain").rename(login.folder / "hvdtrain")
    monkeypatch.setattr(sys, "executable", str(login.folder / "python"))
    site = compose_site(read_profile(None, login.environ()), login.environ()).write()
    found = subprocess.run(
        ["/bin/bash", "-euc", f"source {shlex.quote(str(site))}; command -v hvdtrain"],
        env=login.environ(),
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(login.folder / "hvdtrain")
