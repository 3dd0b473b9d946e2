"""Run all checks of `hvdtrain doctor` and print their findings, or the list of `--patches`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdtrain import __version__
from hvdtrain.doctor import check_hardware, check_horovod, check_mpi, check_network, check_software
from hvdtrain.doctor.finding import Finding, wrong
from hvdtrain.doctor.probe_runner import ProbeRunner, probe_command

Check = Callable[[], Finding]

MARKS = {"ok": ("✓", "ok", "green"), "note": ("!", "!", "yellow"), "wrong": ("✗", "x", "bold red")}


def doctor(as_json: bool = False) -> int:
    """Check this environment and print what would make training fail or give wrong results.

    Args:
        as_json: Whether to print a JSON list of `{name, status, found, mend}` in place of the table;
            `status` is `ok`, `note` or `wrong`.

    Returns:
        The exit code: 1 if a finding is `wrong`, else 0.
    """
    built = check_horovod.installed()
    engines = ("mpi", "horovod") if built and built.tensorflow else ("mpi",)
    with (
        Console(stderr=True).status("Running the checks; this takes half a minute …"),
        ProbeRunner(engines=engines) as probes,
    ):
        findings = run_checks(_checks(probes, built))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        render(findings, Console())
    return int(any(finding.status == "wrong" for finding in findings))


def _checks(probes: ProbeRunner, built: check_horovod.Horovod | None) -> dict[str, Check]:
    """Return the name and the function of every check, in the order of the rows."""
    return {
        "Python": check_software.python,
        "Settings": partial(check_software.variables, probes.environ),
        "TensorFlow": partial(check_software.tensorflow, probes),
        "Keras": partial(check_software.keras, probes),
        "MPI library": partial(check_mpi.library, probes),
        "Launcher": partial(check_mpi.launcher, probes),
        "Horovod": partial(check_horovod.horovod, probes, built),
        "One MPI": partial(check_mpi.agreement, probes, built),
        "Engine": partial(check_horovod.engine, probes),
        "Allreduce, mpi": partial(check_mpi.allreduce, probes, "mpi"),
        "Allreduce, horovod": partial(check_mpi.allreduce, probes, "horovod", built),
        "Cores and threads": partial(check_hardware.cores, probes.environ),
        "GPUs": partial(check_hardware.gpus, probes),
        "Shared memory": check_hardware.shared_memory,
        "Locked memory": check_hardware.locked_memory,
        "Network": partial(check_network.network, probes),
        "Host name": partial(check_network.hostname, probes),
        "ssh": partial(check_network.ssh, probes.environ),
        "Slurm": partial(check_mpi.slurm, probes),
    }


def run_checks(checks: dict[str, Check]) -> list[Finding]:
    """Run every check; one that raises an exception becomes a `wrong` finding, and the others still run."""
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check())
        except Exception as error:  # an unusual machine may break a check in any way
            found = f"This check itself failed with {type(error).__name__}: {error}"
            findings.append(wrong(name, found, "report it, with what `hvdtrain doctor --json` prints"))
    return findings


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
    problems = ", ".join(finding.name for finding in findings if finding.status == "wrong")
    summary = f"Training would be wrong or fail here: fix {problems}."
    console.print(Text(summary if problems else "Training would be right here."))


def list_patches(as_json: bool = False) -> int:
    """Print the functions of Keras that hvdtrain has replaced in a process where it was started.

    Args:
        as_json: Whether to print a JSON list of `{replaced, by, purpose}` in place of the list.

    Returns:
        The exit code: 1 if hvdtrain cannot start.
    """
    done = subprocess.run(
        probe_command("patches"),
        env=os.environ | {"HVDTRAIN_ENGINE": "single", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"hvdtrain cannot start here; `hvdtrain doctor` finds out why.\n{done.stderr}", file=sys.stderr)
        return 1
    rows = json.loads(done.stdout.splitlines()[-1])
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for module in dict.fromkeys(row["by"] for row in rows):
        of_module = [row for row in rows if row["by"] == module]
        print(f"{module}: {of_module[0]['purpose']}")
        for row in of_module:
            print(f"    {row['replaced']}")
    print("--as-horovod and --wrap replace more functions; see docs/horovod.md and docs/wrap.md.")
    return 0
