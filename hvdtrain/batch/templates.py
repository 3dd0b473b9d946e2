"""Find the batch scripts for `sbatch`, and parse and write options of sbatch."""

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
    """A batch script for `sbatch`.

    Args:
        name: Its name on the command line.
        path: Its file.
        defaults: The options in its `#SBATCH` lines.
        proves: Whether the job writes a done file when it succeeded.
    """

    name: str
    path: Path
    defaults: dict[str, str | None]
    proves: bool


def find_template(named: str) -> Template:
    """Return the template of a name, or the file if a path is given.

    Raises:
        LaunchError: If the file cannot be read.
    """
    own = "/" in named or named.endswith((".sbatch", ".sh"))
    path = Path(named) if own else _folder() / f"{named}.sbatch"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        names = ", ".join(sorted(template.stem for template in _folder().glob("*.sbatch")))
        raise LaunchError(
            f"The template {path} cannot be read: {error.strerror}. There are {names}; or name your own file."
        ) from error
    words = [line.removeprefix("#SBATCH") for line in text.splitlines() if line.startswith("#SBATCH")]
    options = read_options(word for line in words for word in shlex.split(line, comments=True))
    return Template(path.stem, path, options, proves="--done-file" in text)


def read_options(words: Iterable[str]) -> dict[str, str | None]:
    """Parse options as sbatch does, and return them by their long names; the value of a flag is None.

    Raises:
        LaunchError: For a word that does not belong to an option: sbatch would take it for the script to submit.
    """
    options: dict[str, str | None] = {}
    incomplete = ""  # the name of an option that may have its value in the next word
    for word in words:
        if incomplete and not word.startswith("-"):
            options[incomplete], incomplete = word, ""
            continue
        if not word.startswith("-") or word in ("-", "--"):
            raise LaunchError(
                f"{word!r} among the options for sbatch is not an option: sbatch would take it for the script. "
                "Options begin with a dash, as in --sbatch='--constraint=skylake --exclusive'."
            )
        name, value = _split(word)
        options[name] = value
        incomplete = name if value is None else ""
    return options


def write_options(options: dict[str, str | None]) -> list[str]:
    """Return options as `--name=value`, so that sbatch also reads values that begin with a dash."""
    return [_joined(name, value) for name, value in options.items()]


def _split(word: str) -> tuple[str, str | None]:
    if word.startswith("--"):
        name, _, value = word[2:].partition("=")
        return name, value if "=" in word else None
    letter, value = word[1], word[2:]
    return SHORT.get(letter, f"-{letter}"), value or None


def _joined(name: str, value: str | None) -> str:
    if name.startswith("-"):
        return name + (value or "")
    return f"--{name}" if value is None else f"--{name}={value}"


def _folder() -> Path:
    """Return the folder of the templates: beside the package in a checkout, inside it after an installation."""
    package = Path(hvdtrain.__file__).parent
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"
