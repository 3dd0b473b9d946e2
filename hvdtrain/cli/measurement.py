"""Parse the commands that measure: tune, bench and timeline."""

import sys
from typing import Any

import click

from hvdtrain.cli.options import HOSTS, NUM_PROC


def _names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Split a list of names separated by commas, without duplicates."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _counts(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """Split a list of numbers separated by commas."""
    try:
        return tuple(int(name) for name in _names(context, parameter, text))
    except ValueError:
        raise click.BadParameter(f"expected numbers of steps, such as 8,64. Received: {text}.") from None


def _engines(help: str = "Engines to measure.") -> Any:
    return click.option("--engines", default="mpi,horovod", show_default=True, callback=_names, help=help)


_MODELS = click.Choice(["resnet20", "cnn", "mlp", "vgg", "transformer"])
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
_SAVE = click.option(
    "--save", type=click.Path(), help="Write the report to FILE.json and a plot to FILE.png."
)


@click.command()
@NUM_PROC
@HOSTS
@click.option(
    "--model", type=_MODELS, default="cnn", show_default=True, help="Model whose training steps are timed."
)
@click.option("--rounds", default=6, show_default=True, help="How often each setting is measured.")
@_engines("Engines whose settings are tried.")
@_JSON
def tune(as_json: bool, **options) -> None:
    """Measure settings of MPI, Horovod and the C library; `hvdtrain run` then uses the fastest ones."""
    from hvdtrain.bench.tune import Options, tune

    sys.exit(tune(Options(**options), as_json))


@click.group()
def bench() -> None:
    """Measure hvdtrain and its alternatives in alternating rounds of one run."""


@bench.command("allreduce")
@NUM_PROC
@HOSTS
@click.option(
    "--sizes", default="4K:256M", show_default=True, help="A range with factor 4, or a list 64K,16M."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"]),
    default="float32",
    show_default=True,
)
@click.option("--rounds", default=5, show_default=True, help="How often each contender is measured.")
@_engines()
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
@NUM_PROC
@HOSTS
@click.option("--model", type=_MODELS, default="cnn", show_default=True)
@click.option("--batch", type=int, help="Samples per rank [64; vgg 16, transformer 8 texts].")
@click.option("--rounds", default=6, show_default=True, help="How often each contender is measured.")
@click.option("--steps", type=int, help="Steps per round [as many as take about one second].")
@_engines()
@click.option("--peers/--no-peers", default=True, help="Also measure torch and tf_keras [yes].")
@click.option(
    "--compression",
    default="",
    callback=_names,
    help="Also measure hvdtrain with these, such as int8,topk:0.01,powersgd:4, and torch with its own.",
)
@click.option(
    "--every",
    default="",
    metavar="STEPS",
    callback=_counts,
    help="Also measure LocalSGD and DiLoCo with averages after so many steps, such as 8,64.",
)
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


@click.group()
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


COMMANDS = (tune, bench, timeline)
