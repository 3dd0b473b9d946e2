"""Parse options of sbatch, on a command line or in a batch script, and the quantities that are their values."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import hvdtrain
from hvdtrain.launch.hosts import LaunchError

# Options by their long names, with their values; the value of a flag is None.
Options = dict[str, str | None]

UNLIMITED = float("inf")

# sbatch's short options that take a value, and their long names.
_LONG_NAMES = {"A": "account", "a": "array", "C": "constraint", "c": "cpus-per-task", "D": "chdir"}
_LONG_NAMES |= {
    "d": "dependency",
    "e": "error",
    "F": "nodefile",
    "G": "gpus",
    "J": "job-name",
    "L": "licenses",
}
_LONG_NAMES |= {"M": "clusters", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "q": "qos"}
_LONG_NAMES |= {"t": "time", "w": "nodelist", "x": "exclude"}

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
_GPU = re.compile(r"(?:gres[:/])?gpu(?:[:=](?P<kind>[A-Za-z][\w.-]*))?(?:[:=](?P<count>\d+))?(?:\(.*\))?")
# In MiB, Slurm's own unit.
_UNITS = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}


@dataclass(frozen=True)
class Template:
    """A batch script for `sbatch`."""

    name: str
    path: Path
    defaults: Options  # those in its `#SBATCH` lines
    proves: bool  # whether the job writes a done file when it succeeded


def find_template(named: str) -> Template:
    """Return the template of a name, or the file if a path is given.

    Raises:
        LaunchError: If the file cannot be read.
    """
    own = "/" in named or named.endswith((".sbatch", ".sh"))
    path = Path(named) if own else _template_folder() / f"{named}.sbatch"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        names = ", ".join(sorted(template.stem for template in _template_folder().glob("*.sbatch")))
        raise LaunchError(
            f"The template {path} cannot be read: {error.strerror}. There are {names}; or name your own file."
        ) from error
    lines = [line.removeprefix("#SBATCH") for line in text.splitlines() if line.startswith("#SBATCH")]
    options = read_options(word for line in lines for word in shlex.split(line, comments=True))
    return Template(path.stem, path, options, proves="--done-file" in text)


def _template_folder() -> Path:
    """Return the folder of the templates: beside the package in a checkout, inside it after an installation."""
    package = Path(hvdtrain.__file__).parent
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def read_options(words: Iterable[str]) -> Options:
    """Parse options as sbatch does.

    Raises:
        LaunchError: For a word that does not belong to an option: sbatch would take it for the script to submit.
    """
    options: Options = {}
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


def _split(word: str) -> tuple[str, str | None]:
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, value if equals else None
    return _LONG_NAMES.get(word[1], f"-{word[1]}"), word[2:] or None


def write_option(name: str, value: str | None) -> str:
    """Return an option as `--name=value`, so that sbatch also reads a value that begins with a dash."""
    if name.startswith("-"):
        return name + (value or "")
    return f"--{name}" if value is None else f"--{name}={value}"


def first_number(options: Mapping[str, str | None], name: str, default: int = 0) -> int:
    """Return the value of an option that is a number; of a range, the minimum."""
    match = re.match(r"\d+", options.get(name) or "")
    return int(match[0]) if match else default


def minutes(time: str) -> float | None:
    """Parse a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Returns:
        Minutes, infinity for UNLIMITED and for 0, or None for a text that Slurm would reject.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return UNLIMITED
    match = _TIME.fullmatch(time.strip())
    if not match:
        return None
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is None:
        hours, mins, seconds = {1: [0, *fields, 0], 2: [0, *fields], 3: fields}[len(fields)]
    else:
        hours, mins, seconds = [*fields, 0, 0][:3]
    return (int(match["days"] or 0) * 24 + hours) * 60 + mins + seconds / 60 or UNLIMITED


def mebibytes(size: str) -> float | None:
    """Parse an amount of memory: a number of MiB, or a number with the unit K, M, G or T.

    Returns:
        MiB, infinity for UNLIMITED, or None for a text that Slurm would reject.
    """
    if size.upper() == "UNLIMITED":
        return UNLIMITED
    match = _SIZE.fullmatch(size.strip())
    return int(match["number"]) * _UNITS[match["unit"].upper()] if match else None


def gpus(resources: str | None, kind: str = "") -> tuple[str, int]:
    """Parse the GPUs in a list of generic resources such as `gpu:a100:4(S:0-1),nvme:1`.

    Args:
        resources: The list; None for an option that is not set.
        kind: Count only GPUs of this kind, and those without a kind; by default all.

    Returns:
        Their kind, empty if there is none or more than one, and their number.
    """
    kinds, total = set(), 0
    # Commas in parentheses, as in `gpu:4(S:0,1)`, do not separate resources.
    for resource in re.split(r",(?![^(]*\))", resources or ""):
        match = _GPU.fullmatch(resource.strip())
        if match and (not kind or match["kind"] in (None, kind)):
            kinds.add(match["kind"] or "")
            total += int(match["count"] or 1)
    return (kinds.pop() if len(kinds) == 1 else ""), total
