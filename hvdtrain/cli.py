"""The `hvdtrain` command: parses what was typed and delegates; every import waits for its command."""

import functools
import sys
from typing import Any

import click

from hvdtrain import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train one Keras model on many ranks, and prove that it is one model."""


def _names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Takes names with commas between."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


# What several commands take.
_NUM_PROC = click.option(
    "-np", "--num-proc", "num_proc", type=int, help="Ranks [in a Slurm job all its tasks, else 2]."
)
_HOSTS = click.option("-H", "--hosts", help="Hosts and their slots: a:4,b:4.")
_ENGINES = click.option(
    "--engines", default="mpi,horovod", show_default=True, callback=_names, help="Which engines of hvdtrain."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
_SAVE = click.option("--save", type=click.Path(), help="Write FILE.json, and a plot of it, FILE.png.")


class _Run(click.Command):
    """A command that also takes the options of other launchers, which its help does not show."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *_foreign_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            told = "Options for the MPI launcher go into --mpi-args, those of the script stand after it."
            raise click.NoSuchOption(
                error.option_name, f"{error.message} {told}", error.possibilities, ctx
            ) from None


@functools.cache
def _foreign_options() -> tuple[click.Option, ...]:
    from hvdtrain.launch.foreign_options import FOREIGN, Foreign

    def option(number: int, row: Foreign) -> click.Option:
        def note(context: click.Context, parameter: click.Parameter, typed: Any) -> None:
            if typed:
                context.meta.setdefault("foreign", []).append((row, typed if row.values else [()]))

        how = {"nargs": row.values, "multiple": True} if row.values else {"is_flag": True}
        names = [*row.names, f"foreign_{number}"]
        return click.Option(names, hidden=True, expose_value=False, callback=note, **how)

    return tuple(option(number, row) for number, row in enumerate(FOREIGN))


@cli.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.option(
    "-np",
    "--num-proc",
    "num_proc",
    type=int,
    help="How many ranks to start [all slots of the hosts, or of the scheduler's job].",
)
@_HOSTS
@click.option("--hostfile", type=click.Path(), help="A file of hosts, one a line: a:4, or a slots=4.")
@click.option(
    "--bind", type=click.Choice(["auto", "core", "none"]), default="auto", help="Binding of ranks to cores."
)
@click.option("--mpi-args", default="", help="More options for the MPI launcher, as one quoted string.")
@click.option("--as-horovod", is_flag=True, help="Let `import horovod` mean hvdtrain in SCRIPT.")
@click.option("--wrap", is_flag=True, help="Divide the work of a SCRIPT that knows nothing of ranks.")
@click.option("--scale-batch", is_flag=True, help="With --wrap: each rank keeps the whole batch of SCRIPT.")
@click.option(
    "--stage", type=click.Path(), help="Data that each node of a Slurm job copies to HVDTRAIN_DATA."
)
@click.option(
    "--done-file", type=click.Path(), help="A file that appears only once every rank has done its work."
)
@click.option("--python", default="", help="What runs Python for a rank: 'apptainer exec image.sif python3'.")
@click.option("--max-restarts", type=int, default=0, help="How often to start again what has failed [0].")
@click.option(
    "--min-np", type=int, help="With --max-restarts: how few ranks will do if hosts are lost [-np]."
)
@click.option("--walltime", help="Stop in time, with a checkpoint: 8:00:00 [the end of the Slurm job].")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, to be run as python -m runs it.")
@click.option("--dry-run", is_flag=True, help="Print the command and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Show TensorFlow's and MPI's own messages too.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(**options) -> None:
    """Start SCRIPT with ARGS on several ranks with the MPI found here."""
    from hvdtrain.launch.run import RunOptions, run

    foreign = click.get_current_context().meta.get("foreign", [])
    sys.exit(run(RunOptions(**options), foreign))


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("-N", "--nodes", help="How many nodes: 4, or 2-4.")
@click.option("-n", "--ntasks", type=click.IntRange(1), help="Ranks in all.")
@click.option("--ntasks-per-node", type=click.IntRange(1), help="Ranks a node [one a GPU, else 1].")
@click.option("-c", "--cpus-per-task", type=click.IntRange(1), help="CPUs a rank.")
@click.option("--gpus-per-node", help="GPUs a node: 4, or with their kind a100:4.")
@click.option("--gpus-per-task", help="GPUs a rank: 1, or with their kind a100:1.")
@click.option("--cpus-per-gpu", type=click.IntRange(1), help="CPUs for each GPU.")
@click.option("-t", "--time", help="Time limit: 8:00:00, 2-00:00:00.")
@click.option("--mem", help="Memory of a node: 32G.")
@click.option("--mem-per-gpu", help="Memory for each GPU of a node: 16G.")
@click.option("-p", "--partition", help="Where to run.")
@click.option("-A", "--account", help="Who pays.")
@click.option("-q", "--qos", help="Quality of service.")
@click.option("-J", "--job-name", help="Name of job, log and proof.")
@click.option("-a", "--array", help="Trials of a sweep: 0-8, or 0-8%4 for four at once.")
@click.option(
    "--template", help="cpu, gpu, preemptible, container, array_sweep, smoke, or a file of your own."
)
@click.option("--preemptible", is_flag=True, help="Requeue the job, which goes on from its checkpoint.")
@click.option("--image", help="The container's image.")
@click.option("--cpu-bind", help="How srun binds ranks to CPUs: cores, none.")
@click.option("--gpu-bind", help="Which GPUs srun shows to a rank: closest, none.")
@click.option("--sbatch", default="", help="More options for sbatch, as one quoted string.")
@click.option(
    "--cluster", help="A profile: NAME is ~/.config/hvdtrain/NAME.toml [HVDTRAIN_CLUSTER, cluster]."
)
@click.option("--as-horovod", is_flag=True, help="Let `import horovod` mean hvdtrain in the script.")
@click.option("--wrap", is_flag=True, help="Divide the work of a script that knows nothing of ranks.")
@click.option("--scale-batch", is_flag=True, help="With --wrap: each rank keeps the whole batch.")
@click.option("--dry-run", is_flag=True, help="Print what was checked and the sbatch command, and stop.")
@click.option(
    "--follow", is_flag=True, help="Show the log until the job has ended; Ctrl-C leaves it running."
)
@click.option("--force", is_flag=True, help="Submit although a check objects.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]...")
def submit(**typed) -> None:
    """Submit SCRIPT with ARGS to Slurm, checked before it waits in the queue."""
    from hvdtrain.batch.submit import read_typed, submit

    sys.exit(submit(read_typed(typed)))


@cli.command("build-horovod")
@click.option("--mpi", "mpi", default="mpicxx", show_default=True, help="MPI's C++ compiler wrapper.")
@click.option("--gpu", type=click.Choice(["none", "nccl"]), default="none", show_default=True)
@click.option("--wheel-dir", type=click.Path(), help="Cache of built wheels [~/.cache/hvdtrain/wheels].")
@click.option("-v", "--verbose", is_flag=True, help="Show the compiler's output.")
def build_horovod(**options) -> None:
    """Build Horovod's native core for the TensorFlow and the MPI of this environment."""
    from hvdtrain.horovod_build.build import BuildOptions, build

    sys.exit(build(BuildOptions(**options)))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Check everything training depends on, and say what mends what is wrong."""
    from hvdtrain.doctor.report import doctor

    sys.exit(doctor(as_json))


@cli.command()
@_NUM_PROC
@_HOSTS
def smoke(**options) -> None:
    """Try the road before the journey: sums of three sizes and ten steps of training, on real ranks."""
    from hvdtrain.doctor.smoke import smoke

    sys.exit(smoke(**options))


@cli.command()
@_NUM_PROC
@_HOSTS
@click.option(
    "--model",
    type=click.Choice(["resnet20", "cnn", "mlp", "vgg", "transformer"]),
    default="cnn",
    show_default=True,
    help="Whose steps are timed.",
)
@click.option("--rounds", default=6, show_default=True, help="How often each setting's turn comes.")
@click.option(
    "--engines",
    default="mpi,horovod",
    show_default=True,
    callback=_names,
    help="Whose settings are tried.",
)
@_JSON
def tune(as_json: bool, **options) -> None:
    """Try what can be set in MPI, Horovod and the C library; `hvdtrain run` then uses what is faster here."""
    from hvdtrain.bench.tune.measure import Options, tune

    sys.exit(tune(Options(**options), as_json))


@cli.group()
def timeline() -> None:
    """See what each rank does when, and for which rank the others wait.

    A run writes one file a rank with HOROVOD_TIMELINE=timeline.json set, or between hvd.start_timeline() and
    hvd.stop_timeline().
    """


@timeline.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="What to write [FILE.merged.json beside the first].")
def merge(files: tuple[str, ...], output: str | None) -> None:
    """Make one file for Perfetto of FILES, the ranks' timelines; of rank 0's alone, with those beside it."""
    from hvdtrain.timeline.merge import merge

    sys.exit(merge(files, output))


@cli.group()
def bench() -> None:
    """Measure, in alternating rounds of one run, what hvdtrain costs beside everything else one could pick."""


@bench.command("allreduce")
@_NUM_PROC
@_HOSTS
@click.option("--sizes", default="4K:256M", show_default=True, help="A range by factors of 4, or 64K,16M.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"]),
    default="float32",
    show_default=True,
)
@click.option("--rounds", default=5, show_default=True, help="How often each contender's turn comes.")
@_ENGINES
@click.option("--peers/--no-peers", default=True, help="Stock Horovod and torch.distributed too [yes].")
@_JSON
@_SAVE
def bench_allreduce(as_json: bool, save: str | None, **options) -> None:
    """Sum arrays over ranks: time and bandwidth of each engine, of plain MPI, Horovod and torch, all checked."""
    from hvdtrain.bench.allreduce import Options, allreduce

    sys.exit(allreduce(Options(**options), as_json, save))


@bench.command("step")
@_NUM_PROC
@_HOSTS
@click.option(
    "--model",
    type=click.Choice(["resnet20", "cnn", "mlp", "vgg", "transformer"]),
    default="cnn",
    show_default=True,
)
@click.option("--batch", type=int, help="Samples a rank [64; vgg 16, transformer 8 texts].")
@click.option("--rounds", default=6, show_default=True, help="How often each contender's turn comes.")
@click.option("--steps", type=int, help="Steps a turn [as many as take about a second].")
@_ENGINES
@click.option("--peers/--no-peers", default=True, help="torch and tf_keras too [yes].")
@click.option("--xla", is_flag=True, help="hvdtrain and Keras alone with jit_compile=True too.")
@click.option("--fit", type=int, metavar="STEPS", help="Time whole epochs of fit, of that many steps each.")
@_JSON
@_SAVE
def bench_step(as_json: bool, save: str | None, **options) -> None:
    """Train a model: time a step, efficiency beside processes by themselves, communication, memory; and peers."""
    from hvdtrain.bench.step.measure import step
    from hvdtrain.bench.step.options import Options

    sys.exit(step(Options(**options), as_json, save))


@bench.command("compare")
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
def bench_compare(before: str, after: str) -> None:
    """Set two reports that --save has written side by side: AFTER over BEFORE, and which differences are real."""
    from hvdtrain.bench.compare import compare

    sys.exit(compare(before, after))


def main() -> None:
    """Entry point of the console script."""
    cli()
