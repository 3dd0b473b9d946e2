"""container.sbatch: the command of each container runtime, with stand-ins for all of them."""

import subprocess
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "container.sbatch"

# Leaves its words, and the file that proves its success, as `hvdtrain run` does.
HVDTRAIN = """#!/bin/bash
printf '%s\\0' "$@" >words
while [[ $1 != --done-file ]]; do shift; done
echo done >"$2"
"""


@pytest.fixture
def node(tmp_path):
    """Runs the template on a node that has some programs, and returns how it ended and hvdtrain's words."""
    (tmp_path / "bin").mkdir()

    def program(name: str, text: str = "#!/bin/sh\n") -> None:
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*programs: str, image: str, **environ: str):
        program("hvdtrain", HVDTRAIN)
        for name in programs:
            program(name)
        job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "7"}
        job |= {
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS": "2",
            "HVDTRAIN_IMAGE": image,
            "HOME": str(tmp_path),
        }
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        done = subprocess.run(
            ["/bin/bash", TEMPLATE, "train.py"],
            cwd=tmp_path,
            env={**job, "PATH": path, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        words = tmp_path / "words"
        return done, words.read_text().split("\0") if words.exists() else []

    (tmp_path / "image.sif").write_text("")
    return run


@pytest.mark.parametrize(
    "programs, image, environ, command",
    [
        (["apptainer", "singularity"], "image.sif", {}, "apptainer exec --nv image.sif python3"),
        (["singularity"], "image.sif", {}, "singularity exec --nv image.sif python3"),
        (["shifter"], "docker:tf:1", {}, "shifter --image=docker:tf:1 --nv python3"),
        (["sarus"], "org/tf:1", {}, "sarus run --nv org/tf:1 python3"),
        (["apptainer", "sarus"], "tf:1", {"HVDTRAIN_CONTAINER": "sarus"}, "sarus run --nv tf:1 python3"),
    ],
)
def test_python_runs_in_the_container(node, programs, image, environ, command):
    done, words = node(*programs, image=image, HVDTRAIN_APPTAINER="--nv", **environ)
    assert done.returncode == 0, done.stderr
    assert words[:3] == ["run", "--python", command]


def test_srun_starts_the_containers_of_pyxis(node):
    options = "--container-mounts=/data --container-env=A"
    done, words = node(image="nvcr.io#tf", HVDTRAIN_CONTAINER="pyxis", HVDTRAIN_APPTAINER=options)
    assert done.returncode == 0, done.stderr
    assert words[:5] == ["run", "--container-image", "nvcr.io#tf", *options.split()]


def test_what_cannot_run_the_image_is_named(node):
    for programs, image, environ, told in (
        (["apptainer"], "gone.sif", {}, "The image gone.sif cannot be read"),
        ([], "image.sif", {"HVDTRAIN_CONTAINER": "sarus"}, "sarus is not on PATH"),
        (["podman"], "image.sif", {"HVDTRAIN_CONTAINER": "podman"}, "expected apptainer, singularity"),
    ):
        done, words = node(*programs, image=image, **environ)
        assert done.returncode in (2, 127) and told in done.stderr and not words
