"""Parse `hvdtrain run`."""

import functools
import sys
from typing import Any

import click

from hvdtrain.cli.options import AS_HOROVOD, HOSTS, SCALE_BATCH, WRAP


class _Run(click.Command):
    """A command that also accepts the options of other launchers, which its help does not show."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *_foreign_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            advice = "Options of the MPI launcher belong in --mpi-args, those of the script after its name."
            raise click.NoSuchOption(
                error.option_name, f"{error.message} {advice}", error.possibilities, ctx
            ) from None


@functools.cache
def _foreign_options() -> tuple[click.Option, ...]:
    from hvdtrain.launch.foreign_options import FOREIGN, ForeignOption

    def click_option(number: int, row: ForeignOption) -> click.Option:
        def record(context: click.Context, parameter: click.Parameter, typed: Any) -> None:
            if typed:
                context.meta.setdefault("foreign", []).append((row, typed if row.values else [()]))

        how = {"nargs": row.values, "multiple": True} if row.values else {"is_flag": True}
        names = [*row.names, f"foreign_{number}"]
        return click.Option(names, hidden=True, expose_value=False, callback=record, **how)

    return tuple(click_option(number, row) for number, row in enumerate(FOREIGN))


@click.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.option(
    "-np",
    "--num-proc",
    "num_proc",
    type=int,
    help="Number of ranks to start [all slots of the hosts, or of the scheduler's job].",
)
@HOSTS
@click.option("--hostfile", type=click.Path(), help="A file with one host per line: a:4, or a slots=4.")
@click.option(
    "--bind", type=click.Choice(["auto", "core", "none"]), default="auto", help="Binding of ranks to cores."
)
@click.option("--mpi-args", default="", help="More options for the MPI launcher, as one quoted string.")
@AS_HOROVOD
@WRAP
@SCALE_BATCH
@click.option(
    "--stage",
    type=click.Path(),
    help="Data to copy to each node of a Slurm job; the copy is HVDTRAIN_DATA.",
)
@click.option(
    "--done-file", type=click.Path(), help="A file to write once every rank has finished successfully."
)
@click.option("--python", default="", help="Command to run Python: 'apptainer exec image.sif python3'.")
@click.option("--max-restarts", type=int, default=0, help="How often to restart a failed job [0].")
@click.option(
    "--min-np", type=int, help="With --max-restarts: the smallest number of ranks if hosts are lost [-np]."
)
@click.option("--walltime", help="Stop with a checkpoint within this time: 8:00:00 [end of the Slurm job].")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, to be run like `python -m`.")
@click.option("--dry-run", is_flag=True, help="Print the command without running it.")
@click.option("-v", "--verbose", is_flag=True, help="Also show the messages of TensorFlow and MPI.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(**options) -> None:
    """Start SCRIPT with ARGS on several ranks with the MPI installed on this machine."""
    from hvdtrain.launch.run import RunOptions, run

    foreign = click.get_current_context().meta.get("foreign", [])
    sys.exit(run(RunOptions(**options), foreign))
