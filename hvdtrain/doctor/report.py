"""`hvdtrain doctor`: everything training depends on, each with what mends it, on one screen."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdtrain import __version__
from hvdtrain.doctor.checks import (
    allreduce,
    cores,
    engine,
    gpus,
    horovod,
    memory,
    mpi,
    network,
    slurm,
    software,
)
from hvdtrain.doctor.finding import Finding, examine
from hvdtrain.doctor.inquiry import Inquiry

MARKS = {"ok": ("✓", "ok", "green"), "note": ("!", "!", "yellow"), "wrong": ("✗", "x", "bold red")}


def doctor(as_json: bool = False) -> int:
    """Finds what would make training fail or lie, before hours of it are spent.

    Args:
        as_json: Whether to print a JSON list of `{name, status, found, mend}` in place of the table;
            `status` is `ok`, `note` or `wrong`.

    Returns:
        1 when something would make training wrong, else 0.
    """
    built = horovod.installed()
    engines = ("mpi", "horovod") if built and built.tensorflow else ("mpi",)
    with (
        Console(stderr=True).status("Looking; this takes half a minute …"),
        Inquiry(engines=engines) as inquiry,
    ):
        findings = examine(checks(inquiry, built))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        render(findings, Console())
    return int(any(finding.status == "wrong" for finding in findings))


def checks(inquiry: Inquiry, built: horovod.Horovod | None) -> Sequence[tuple[str, Callable[[], Finding]]]:
    """Lists every check, in the order in which its row appears."""
    return (
        ("Python", software.python),
        ("TensorFlow", partial(software.tensorflow, inquiry)),
        ("Keras", partial(software.keras, inquiry)),
        ("MPI library", partial(mpi.library, inquiry)),
        ("Launcher", partial(mpi.launcher, inquiry)),
        ("Horovod", partial(horovod.horovod, inquiry, built)),
        ("One MPI", partial(mpi.agreement, inquiry, built)),
        ("Engine", partial(engine.engine, inquiry)),
        ("Allreduce, mpi", partial(allreduce.allreduce, inquiry, "mpi")),
        ("Allreduce, horovod", partial(allreduce.allreduce, inquiry, "horovod", built)),
        ("Cores and threads", partial(cores.cores, inquiry.environ)),
        ("GPUs", partial(gpus.gpus, inquiry)),
        ("Shared memory", memory.shared),
        ("Locked memory", memory.locked),
        ("Network", partial(network.network, inquiry)),
        ("Host name", partial(network.hostname, inquiry)),
        ("ssh", partial(network.ssh, inquiry.environ)),
        ("Slurm", partial(slurm.slurm, inquiry)),
    )


def render(findings: Sequence[Finding], console: Console) -> None:
    """Draws the table: what was found, and beneath it the line that mends it, wrapped but never cut."""
    plain = not (console.encoding or "").lower().startswith("utf")
    table = Table(title=f"hvdtrain {__version__} doctor", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for finding in findings:
        mark, plain_mark, style = MARKS[finding.status]
        text = Text(finding.found)
        if finding.mend:
            text.append(f"\n{'->' if plain else '→'} {finding.mend}", style="bold")
        table.add_row(Text(plain_mark if plain else mark, style=style), finding.name, text)
    console.print(table)
    console.print(Text(summary(findings)))


def summary(findings: Sequence[Finding]) -> str:
    """Says in one line whether to train."""
    wrong = [finding.name for finding in findings if finding.status == "wrong"]
    if wrong:
        return f"Training would be wrong or fail here: mend {', '.join(wrong)}."
    return "Training would be right here."
