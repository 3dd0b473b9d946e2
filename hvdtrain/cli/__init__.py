"""Parse the `hvdtrain` command line and call the function of each command.

Each command imports its modules only when it runs, so that `hvdtrain --help` starts fast.
"""

import click

from hvdtrain import __version__
from hvdtrain.cli import environment, measurement, run, submit


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train one Keras model on many ranks, and verify that all ranks hold the same model."""


for _command in (run.run, submit.submit, *environment.COMMANDS, *measurement.COMMANDS):
    cli.add_command(_command)


def main() -> None:
    """Run the console script `hvdtrain`."""
    cli()
