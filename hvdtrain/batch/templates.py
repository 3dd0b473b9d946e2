"""The batch scripts that `sbatch` takes: where they are, and what sbatch's own options in them say."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import hvdtrain
from hvdtrain.launch.hosts import LaunchError

NAMES = ("cpu", "gpu", "preemptible", "container", "array_sweep", "smoke")

# sbatch's short options that take a value, and their long names.
SHORT = {
    "A": "account",
    "a": "array",
    "C": "constraint",
    "c": "cpus-per-task",
    "D": "chdir",
    "d": "dependency",
    "e": "error",
    "F": "nodefile",
    "G": "gpus",
    "J": "job-name",
    "L": "licenses",
    "M": "clusters",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}


@dataclass(frozen=True)
class Template:
    """A batch script.

    Args:
        name: What it is called on the command line.
        path: Where it is.
        defaults: The options in its `#SBATCH` lines.
        proves: Whether its success is a file that the training writes.
    """

    name: str
    path: Path
    defaults: dict[str, str | None]
    proves: bool


def find_template(named: str) -> Template:
    """Finds a template by its name, or takes the file that is named.

    Raises:
        LaunchError: If there is none.
    """
    own = "/" in named or named.endswith((".sbatch", ".sh"))
    path = Path(named) if own else _folder() / f"{named}.sbatch"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        there = ", ".join(sorted(each.stem for each in _folder().glob("*.sbatch")))
        raise LaunchError(
            f"The template {path} cannot be read: {error.strerror}. There are {there}; or name a file of your own."
        ) from error
    words = [line.removeprefix("#SBATCH") for line in text.splitlines() if line.startswith("#SBATCH")]
    options = read_options(word for line in words for word in shlex.split(line, comments=True))
    return Template(path.stem, path, options, proves="--done-file" in text)


def read_options(words: Iterable[str]) -> dict[str, str | None]:
    """Reads options as sbatch does, by their long names; the value of a flag is None.

    Raises:
        LaunchError: For a word that belongs to no option: sbatch would take it for the script to submit.
    """
    options: dict[str, str | None] = {}
    waiting = ""
    for word in words:
        if waiting and not word.startswith("-"):
            options[waiting], waiting = word, ""
            continue
        if not word.startswith("-") or word in ("-", "--"):
            raise LaunchError(
                f"{word!r} among the options for sbatch is none: sbatch would take it for the script. "
                "Options begin with a dash, as in --sbatch='--constraint=skylake --exclusive'."
            )
        name, value = _split(word)
        options[name] = value
        waiting = name if value is None else ""
    return options


def write_options(options: dict[str, str | None]) -> list[str]:
    """Writes options so that sbatch takes each value for what it is, whatever it begins with."""
    return [_written(name, value) for name, value in options.items()]


def _split(word: str) -> tuple[str, str | None]:
    if word.startswith("--"):
        name, _, value = word[2:].partition("=")
        return name, value if "=" in word else None
    letter, value = word[1], word[2:]
    return SHORT.get(letter, f"-{letter}"), value or None


def _written(name: str, value: str | None) -> str:
    if name.startswith("-"):
        return name + (value or "")
    return f"--{name}" if value is None else f"--{name}={value}"


def _folder() -> Path:
    """Beside the package in a checkout, and inside it where it was installed."""
    package = Path(hvdtrain.__file__).parent
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"
