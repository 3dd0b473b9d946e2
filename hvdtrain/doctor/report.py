"""Run all checks of `hvdtrain doctor` and print their findings as a table or as JSON."""

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
from hvdtrain.doctor.probe_runner import ProbeRunner

MARKS = {"ok": ("✓", "ok", "green"), "note": ("!", "!", "yellow"), "wrong": ("✗", "x", "bold red")}


def doctor(as_json: bool = False) -> int:
    """Check this environment and print what would make training fail or give wrong results.

    Args:
        as_json: Whether to print a JSON list of `{name, status, found, mend}` in place of the table;
            `status` is `ok`, `note` or `wrong`.

    Returns:
        The exit code: 1 if a finding is `wrong`, else 0.
    """
    built = horovod.installed()
    engines = ("mpi", "horovod") if built and built.tensorflow else ("mpi",)
    with (
        Console(stderr=True).status("Running the checks; this takes half a minute …"),
        ProbeRunner(engines=engines) as probes,
    ):
        findings = examine(checks(probes, built))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        render(findings, Console())
    return int(any(finding.status == "wrong" for finding in findings))


def checks(probes: ProbeRunner, built: horovod.Horovod | None) -> Sequence[tuple[str, Callable[[], Finding]]]:
    """Return the name and the function of every check, in the order of the rows."""
    return (
        ("Python", software.python),
        ("Settings", partial(software.variables, probes.environ)),
        ("TensorFlow", partial(software.tensorflow, probes)),
        ("Keras", partial(software.keras, probes)),
        ("MPI library", partial(mpi.library, probes)),
        ("Launcher", partial(mpi.launcher, probes)),
        ("Horovod", partial(horovod.horovod, probes, built)),
        ("One MPI", partial(mpi.agreement, probes, built)),
        ("Engine", partial(engine.engine, probes)),
        ("Allreduce, mpi", partial(allreduce.allreduce, probes, "mpi")),
        ("Allreduce, horovod", partial(allreduce.allreduce, probes, "horovod", built)),
        ("Cores and threads", partial(cores.cores, probes.environ)),
        ("GPUs", partial(gpus.gpus, probes)),
        ("Shared memory", memory.shared),
        ("Locked memory", memory.locked),
        ("Network", partial(network.network, probes)),
        ("Host name", partial(network.hostname, probes)),
        ("ssh", partial(network.ssh, probes.environ)),
        ("Slurm", partial(slurm.slurm, probes)),
    )


def render(findings: Sequence[Finding], console: Console) -> None:
    """Print the table: each finding, and below it the command that fixes it, wrapped but never cut."""
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
    """Return one line that says whether training would be right."""
    wrong = [finding.name for finding in findings if finding.status == "wrong"]
    if wrong:
        return f"Training would be wrong or fail here: fix {', '.join(wrong)}."
    return "Training would be right here."
