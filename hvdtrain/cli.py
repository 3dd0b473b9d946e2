"""Parse the `hvdtrain` command line and call the function of each command.

Each command imports its modules only when it runs, so that `hvdtrain --help` starts fast.
"""

import functools
import sys
from typing import Any

import click

from hvdtrain import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Train one Keras model on many ranks, and verify that all ranks hold the same model."""


def _names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Split a list of names separated by commas, without duplicates."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


# Options of several commands.
_NUM_PROC = click.option(
    "-np", "--num-proc", "num_proc", type=int, help="Number of ranks [all tasks of the Slurm job, else 2]."
)
_HOSTS = click.option("-H", "--hosts", help="Hosts and their numbers of slots: a:4,b:4.")
_ENGINES = click.option(
    "--engines",
    default="mpi,horovod",
    show_default=True,
    callback=_names,
    help="Engines to measure.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
_SAVE = click.option(
    "--save", type=click.Path(), help="Write the report to FILE.json and a plot to FILE.png."
)


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


@cli.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.option(
    "-np",
    "--num-proc",
    "num_proc",
    type=int,
    help="Number of ranks to start [all slots of the hosts, or of the scheduler's job].",
)
@_HOSTS
@click.option("--hostfile", type=click.Path(), help="A file with one host per line: a:4, or a slots=4.")
@click.option(
    "--bind", type=click.Choice(["auto", "core", "none"]), default="auto", help="Binding of ranks to cores."
)
@click.option("--mpi-args", default="", help="More options for the MPI launcher, as one quoted string.")
@click.option("--as-horovod", is_flag=True, help="Make `import horovod` in SCRIPT import hvdtrain.")
@click.option("--wrap", is_flag=True, help="Distribute a SCRIPT written for one process over the ranks.")
@click.option(
    "--scale-batch", is_flag=True, help="With --wrap: each rank keeps the full batch size of SCRIPT."
)
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
@click.option(
    "--walltime",
    help="Stop with a checkpoint within this time: 8:00:00 [end of the Slurm job].",
)
@click.option(
    "-m",
    "--module",
    is_flag=True,
    help="SCRIPT is a module, to be run like `python -m`.",
)
@click.option("--dry-run", is_flag=True, help="Print the command without running it.")
@click.option("-v", "--verbose", is_flag=True, help="Also show the messages of TensorFlow and MPI.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(**options) -> None:
    """Start SCRIPT with ARGS on several ranks with the MPI installed on this machine."""
    from hvdtrain.launch.run import RunOptions, run

    foreign = click.get_current_context().meta.get("foreign", [])
    sys.exit(run(RunOptions(**options), foreign))


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("-N", "--nodes", help="Number of nodes: 4, or 2-4.")
@click.option("-n", "--ntasks", type=click.IntRange(1), help="Total number of ranks.")
@click.option("--ntasks-per-node", type=click.IntRange(1), help="Ranks per node [one per GPU, else 1].")
@click.option("-c", "--cpus-per-task", type=click.IntRange(1), help="CPUs per rank.")
@click.option("--gpus-per-node", help="GPUs per node: 4, or with their type a100:4.")
@click.option("--gpus-per-task", help="GPUs per rank: 1, or with their type a100:1.")
@click.option("--cpus-per-gpu", type=click.IntRange(1), help="CPUs per GPU.")
@click.option("-t", "--time", help="Time limit: 8:00:00, 2-00:00:00.")
@click.option("--mem", help="Memory per node: 32G.")
@click.option("--mem-per-gpu", help="Memory per GPU: 16G.")
@click.option("-p", "--partition", help="Partition of the cluster.")
@click.option("-A", "--account", help="Account to charge.")
@click.option("-q", "--qos", help="Quality of service.")
@click.option("-J", "--job-name", help="Name of the job, of its log and of its done file.")
@click.option("-a", "--array", help="Trials of a parameter sweep: 0-8, or 0-8%4 for four at a time.")
@click.option(
    "--template", help="cpu, gpu, preemptible, container, array_sweep, smoke, or the path of your own file."
)
@click.option(
    "--preemptible",
    is_flag=True,
    help="Requeue a preempted job; it continues from its checkpoint.",
)
@click.option("--image", help="Container image.")
@click.option("--cpu-bind", help="How srun binds ranks to CPUs: cores, none.")
@click.option("--gpu-bind", help="Which GPUs srun shows to a rank: closest, none.")
@click.option("--sbatch", default="", help="More options for sbatch, as one quoted string.")
@click.option(
    "--cluster",
    help="Cluster profile: NAME is ~/.config/hvdtrain/NAME.toml [HVDTRAIN_CLUSTER, else cluster].",
)
@click.option("--as-horovod", is_flag=True, help="Make `import horovod` in SCRIPT import hvdtrain.")
@click.option("--wrap", is_flag=True, help="Distribute a SCRIPT written for one process over the ranks.")
@click.option(
    "--scale-batch", is_flag=True, help="With --wrap: each rank keeps the full batch size of SCRIPT."
)
@click.option("--dry-run", is_flag=True, help="Print the checks and the sbatch command without submitting.")
@click.option(
    "--follow", is_flag=True, help="Show the log until the job has ended; Ctrl-C leaves it running."
)
@click.option("--force", is_flag=True, help="Submit even if a check fails.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]...")
def submit(**typed) -> None:
    """Check SCRIPT with ARGS and submit it to Slurm."""
    from hvdtrain.batch.submit import read_typed, submit

    sys.exit(submit(read_typed(typed)))


@cli.command("build-horovod")
@click.option("--mpi", "mpi", default="mpicxx", show_default=True, help="MPI's C++ compiler wrapper.")
@click.option("--gpu", type=click.Choice(["none", "nccl"]), default="none", show_default=True)
@click.option("--wheel-dir", type=click.Path(), help="Folder for built wheels [~/.cache/hvdtrain/wheels].")
@click.option("-v", "--verbose", is_flag=True, help="Show the compiler's output.")
def build_horovod(**options) -> None:
    """Build Horovod's native core for the TensorFlow and the MPI of this environment."""
    from hvdtrain.horovod_build.build import BuildOptions, build

    sys.exit(build(BuildOptions(**options)))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--patches", is_flag=True, help="List the functions of Keras that hvdtrain replaces, and stop.")
def doctor(as_json: bool, patches: bool) -> None:
    """Check everything that training depends on, and print the command that fixes each problem."""
    from hvdtrain.doctor.patches import list_patches
    from hvdtrain.doctor.report import doctor

    sys.exit(list_patches(as_json) if patches else doctor(as_json))


@cli.command()
@_NUM_PROC
@_HOSTS
def smoke(**options) -> None:
    """Run a five-minute smoke test: check the installation, three allreduces and ten training steps."""
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
    help="Model whose training steps are timed.",
)
@click.option("--rounds", default=6, show_default=True, help="How often each setting is measured.")
@click.option(
    "--engines",
    default="mpi,horovod",
    show_default=True,
    callback=_names,
    help="Engines whose settings are tried.",
)
@_JSON
def tune(as_json: bool, **options) -> None:
    """Measure settings of MPI, Horovod and the C library; `hvdtrain run` then uses the fastest ones."""
    from hvdtrain.bench.tune import Options, tune

    sys.exit(tune(Options(**options), as_json))


@cli.group()
def timeline() -> None:
    """Show what each rank does over time, and for which rank the others wait.

    A run writes one file per rank if HOROVOD_TIMELINE=timeline.json is set, or between hvd.start_timeline() and
    hvd.stop_timeline().
    """


@timeline.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Output file [FILE.merged.json next to the first].")
def merge(files: tuple[str, ...], output: str | None) -> None:
    """Merge FILES, the timelines of the ranks, into one file for Perfetto.

    If only the file of rank 0 is given, the files of the other ranks in the same folder are merged too.
    """
    from hvdtrain.timeline.merge import merge

    sys.exit(merge(files, output))


@cli.group()
def bench() -> None:
    """Measure hvdtrain and its alternatives in alternating rounds of one run."""


@bench.command("allreduce")
@_NUM_PROC
@_HOSTS
@click.option(
    "--sizes",
    default="4K:256M",
    show_default=True,
    help="A range with factor 4, or a list 64K,16M.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"]),
    default="float32",
    show_default=True,
)
@click.option("--rounds", default=5, show_default=True, help="How often each contender is measured.")
@_ENGINES
@click.option(
    "--peers/--no-peers", default=True, help="Also measure stock Horovod and torch.distributed [yes]."
)
@_JSON
@_SAVE
def bench_allreduce(as_json: bool, save: str | None, **options) -> None:
    """Measure time and bandwidth of allreduce for each engine, MPI, Horovod and torch, and check the sums."""
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
@click.option("--batch", type=int, help="Samples per rank [64; vgg 16, transformer 8 texts].")
@click.option("--rounds", default=6, show_default=True, help="How often each contender is measured.")
@click.option("--steps", type=int, help="Steps per round [as many as take about one second].")
@_ENGINES
@click.option("--peers/--no-peers", default=True, help="Also measure torch and tf_keras [yes].")
@click.option(
    "--xla", is_flag=True, help="Also measure hvdtrain and single-process Keras with jit_compile=True."
)
@click.option(
    "--fit", type=int, metavar="STEPS", help="Time whole epochs of `fit` with this many steps each."
)
@_JSON
@_SAVE
def bench_step(as_json: bool, save: str | None, **options) -> None:
    """Measure training steps: time, scaling efficiency, communication and memory, also of other frameworks."""
    from hvdtrain.bench.step import Options, step

    sys.exit(step(Options(**options), as_json, save))


@bench.command("compare")
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
def bench_compare(before: str, after: str) -> None:
    """Compare two reports written by --save: the ratio AFTER / BEFORE, and which differences are significant."""
    from hvdtrain.bench.compare import compare

    sys.exit(compare(before, after))


def main() -> None:
    """Run the console script `hvdtrain`."""
    cli()
