"""Define every environment variable HVDTRAIN_…: its values, its default and its meaning.

`python -m hvdtrain.settings` prints the table of docs/settings.md.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "HVDTRAIN_"


@dataclass(frozen=True)
class Setting:
    """An environment variable that users set.

    Args:
        name: Its name.
        values: Its possible values, as the documentation shows them.
        default: Its value if it is not set or empty; "" if it has none.
        meaning: One sentence in Markdown, with links as in docs/.
    """

    name: str
    values: str
    default: str
    meaning: str


SETTINGS = (
    Setting(
        "HVDTRAIN_ENGINE",
        "`auto`, `horovod`, `mpi`, `single`",
        "auto",
        "which engine communicates ([compatibility.md](compatibility.md))",
    ),
    Setting(
        "HVDTRAIN_OVERLAP",
        "`auto`, `on`, `off`",
        "auto",
        "whether the `mpi` engine sends gradients during backprop; `auto` does so between hosts where the link "
        "carries less than 1 GB/s",
    ),
    Setting(
        "HVDTRAIN_VERIFY",
        "`first`, `second`, `every:N`, `off`",
        "first",
        "which steps are verified ([training.md](training.md#what-is-verified))",
    ),
    Setting(
        "HVDTRAIN_TIMELINE",
        "a path, or `DYNAMIC`",
        "",
        "each rank records its operations with their times; `HOROVOD_TIMELINE` means the same "
        "([timeline.md](timeline.md))",
    ),
    Setting(
        "HVDTRAIN_TIMELINE_MARK_CYCLES",
        "`0`, `1`",
        "0",
        "whether the timeline marks the cycles of Horovod's core; `HOROVOD_TIMELINE_MARK_CYCLES` means the same",
    ),
    Setting(
        "HVDTRAIN_TUNED",
        "a file, or `off`",
        "",
        "the file that `hvdtrain tune` writes and `hvdtrain run` reads: the settings that are faster on this "
        "machine; by default `tuned.json` among the user's settings ([tune.md](tune.md))",
    ),
    Setting(
        "HVDTRAIN_LAUNCHER",
        "`srun`, `mpirun`",
        "",
        "how ranks start inside a Slurm job, instead of letting `hvdtrain run` detect it",
    ),
    Setting(
        "HVDTRAIN_STALL_SECONDS",
        "seconds, 0 for never",
        "60",
        "how long ranks wait before the missing rank is reported ([faults.md](faults.md))",
    ),
    Setting(
        "HVDTRAIN_STALL_ABORT_SECONDS",
        "seconds, 0 for never",
        "600",
        "how long ranks wait before a hang ends the job ([faults.md](faults.md))",
    ),
    Setting(
        "HVDTRAIN_STALL_DIR",
        "a folder",
        ".",
        "where the stacks of all ranks are written when a hang is reported ([faults.md](faults.md))",
    ),
    Setting(
        "HVDTRAIN_BACKOFF",
        "seconds",
        "1",
        "the pause before the first restart; it doubles with each restart ([run.md](run.md#restarting))",
    ),
    Setting(
        "HVDTRAIN_DEADLINE",
        "seconds since 1970",
        "",
        "when the time of this job ends; set by `hvdtrain run` where Slurm or `--walltime` tells it",
    ),
    Setting(
        "HVDTRAIN_DATA",
        "a folder",
        "",
        "where `hvdtrain run --stage` has put the data on this host; set by `hvdtrain run`, read by scripts",
    ),
    Setting(
        "HVDTRAIN_ELASTIC_DIR",
        "a folder",
        ".hvdtrain_elastic",
        "where `elastic` keeps its commits ([elastic.md](elastic.md))",
    ),
    Setting(
        "HVDTRAIN_CLUSTER",
        "a name or a file",
        "cluster",
        "the profile that `hvdtrain submit` uses ([slurm.md](slurm.md))",
    ),
    Setting(
        "HVDTRAIN_SITE",
        "a shell file",
        "~/.config/hvdtrain/site.sh",
        "the file with which the templates in [slurm/](../slurm/README.md) load the modules of your site",
    ),
    Setting(
        "HVDTRAIN_STAGE",
        "a folder",
        "",
        "data that the templates in [slurm/](../slurm/README.md) copy to each node",
    ),
    Setting(
        "HVDTRAIN_MAX_RESTARTS",
        "a number",
        "3",
        "how often `preemptible.sbatch` and `container.sbatch` restart the ranks within a job",
    ),
    Setting(
        "HVDTRAIN_MAX_REQUEUES",
        "a number",
        "20",
        "how often `preemptible.sbatch` and `container.sbatch` requeue the job",
    ),
    Setting(
        "HVDTRAIN_IMAGE",
        "an image",
        "",
        "the image of `container.sbatch` ([slurm/README.md](../slurm/README.md))",
    ),
    Setting(
        "HVDTRAIN_CONTAINER",
        "`apptainer`, `singularity`, `shifter`, `sarus`, `pyxis`",
        "",
        "what runs that image; by default the first of them on PATH",
    ),
    Setting(
        "HVDTRAIN_TRIAL",
        "a number",
        "",
        "the trial of a sweep; set by `array_sweep.sbatch`, read by scripts",
    ),
    Setting("HVDTRAIN_APPTAINER", "options", "", "further options for that program, such as `--nv`"),
)

# Set by hvdtrain for the processes that it starts, or by its test suite.
_INTERNAL = {
    *(
        "HVDTRAIN_RUN_ADDRESS",
        "HVDTRAIN_RUN_TOKEN",
        "HVDTRAIN_RUN_TYPED",
        "HVDTRAIN_BIND",
        "HVDTRAIN_RESTART",
    ),
    *("HVDTRAIN_BENCH_ADDRESS", "HVDTRAIN_BENCH_TOKEN", "HVDTRAIN_TESTS", "HVDTRAIN_TEST_EVENTS"),
}

_DEFAULTS = {setting.name: setting.default for setting in SETTINGS} | dict.fromkeys(_INTERNAL, "")


def get(name: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the value of a setting without surrounding spaces, or its default if it is not set or empty.

    Args:
        name: The name of the variable.
        environ: The environment; that of this process by default.

    Raises:
        KeyError: If there is no such setting.
    """
    default = _DEFAULTS[name]
    return (os.environ if environ is None else environ).get(name, "").strip() or default


def is_set(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether a setting is set, and not empty."""
    return (os.environ if environ is None else environ).get(name, "").strip() != ""


def unknown(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return a message for each variable HVDTRAIN_… in the environment that is not a setting."""
    messages = []
    for name in sorted(os.environ if environ is None else environ):
        if name.startswith(PREFIX) and name not in _DEFAULTS:
            names = [setting.name.removeprefix(PREFIX) for setting in SETTINGS]
            similar = difflib.get_close_matches(name.removeprefix(PREFIX), names, n=1, cutoff=0.6)
            hint = (
                f"Did you mean {PREFIX}{similar[0]}?" if similar else "docs/settings.md lists all settings."
            )
            messages.append(f"{name} is set, but hvdtrain has no such setting, so it has no effect. {hint}")
    return messages


def table() -> str:
    """Return the table of docs/settings.md."""
    rows = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    for setting in SETTINGS:
        default = f"`{setting.default}`" if setting.default else "none"
        rows.append(f"| `{setting.name}` | {setting.values} | {default} | {setting.meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
