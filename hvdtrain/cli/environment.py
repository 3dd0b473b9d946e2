"""Parse the commands that examine and prepare an environment: doctor, smoke and build-horovod."""

import sys

import click

from hvdtrain.cli.options import HOSTS, NUM_PROC


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--patches", is_flag=True, help="List the functions of Keras that hvdtrain replaces, and stop.")
def doctor(as_json: bool, patches: bool) -> None:
    """Check everything that training depends on, and print the command that fixes each problem."""
    from hvdtrain.doctor.report import doctor, list_patches

    sys.exit(list_patches(as_json) if patches else doctor(as_json))


@click.command()
@NUM_PROC
@HOSTS
def smoke(**options) -> None:
    """Run a five-minute smoke test: check the installation, three allreduces and ten training steps."""
    from hvdtrain.doctor.smoke import smoke

    sys.exit(smoke(**options))


@click.command("build-horovod")
@click.option("--mpi", default="mpicxx", show_default=True, help="MPI's C++ compiler wrapper.")
@click.option("--gpu", type=click.Choice(["none", "nccl"]), default="none", show_default=True)
@click.option("--wheel-dir", type=click.Path(), help="Folder for built wheels [~/.cache/hvdtrain/wheels].")
@click.option("-v", "--verbose", is_flag=True, help="Show the compiler's output.")
def build_horovod(**options) -> None:
    """Build Horovod's native core for the TensorFlow and the MPI of this environment."""
    from hvdtrain.horovod_build.build import build

    sys.exit(build(**options))


COMMANDS = (doctor, smoke, build_horovod)
