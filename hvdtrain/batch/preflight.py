"""What is looked at before a job is submitted, because after it the answer comes when the job starts: at night."""

import os
import pwd
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.batch.value_checks import examine_values
from hvdtrain.doctor.finding import Finding, note, ok, wrong

# Options that somebody may have meant for submit though they stand after the script.
_OURS = re.compile(
    r"--(nodes|ntasks(-per-node)?|cpus-per-(task|gpu)|gpus-per-(node|task)|mem-per-gpu|(cpu|gpu)-bind|partition|"
    r"account|dry-run|follow|preemptible)(=.*)?"
)

# What starts ranks elsewhere, and here is done by the templates.
_STARTERS = re.compile(r"python[\d.]*|mpirun|mpiexec|srun|hvdtrain|horovodrun")


def examine_job(batch: Batch, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Looks at everything that can be judged without Slurm.

    Args:
        batch: The job.
        environ: The environment of the submission.

    Yields:
        What was found, of the script first.
    """
    yield ok("template", f"{batch.template.path}")
    base = Path(batch.options.get("chdir") or ".")
    if batch.template.name == "array_sweep":
        yield _trials(base, batch)
    if batch.template.name != "array_sweep" or len(batch.words) > 1:
        yield _script(batch, base)
        yield from _words(batch)
    yield from examine_values(batch)
    yield from _variables(batch, base, environ)
    yield _log(batch, base)


def examine_programs(environ: Mapping[str, str]) -> Finding:
    """Looks for Slurm."""
    found = shutil.which("sbatch", path=environ.get("PATH"))
    if found:
        return ok("sbatch", found)
    told = (
        "There is no sbatch on PATH: this is no login node of a Slurm cluster, or its module is not loaded."
    )
    return wrong("sbatch", told, "on one machine: hvdtrain run -np 2 train.py")


def trials_of(path: Path) -> list[str]:
    """Reads a file of trials as array_sweep.sbatch does: without empty lines and comments."""
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _script(batch: Batch, base: Path) -> Finding:
    if batch.template.name == "smoke":
        if not batch.words:
            return ok("script", "the smoke test's own")
        return wrong("script", "The smoke test brings its own script and takes no words.", "leave them out")
    if not batch.script:
        return wrong("script", "There is no script to run.", "hvdtrain submit --nodes=2 train.py --epochs 10")
    path = base / batch.script
    if batch.script.startswith("-"):
        return wrong(
            "script", f"{batch.script} looks like an option.", f"./{batch.script} for a file of that name"
        )
    if path.is_file() and os.access(path, os.R_OK):
        return ok("script", f"{path.absolute()}")
    if _STARTERS.fullmatch(path.name) and batch.words[-1] != batch.script:
        found = f"Ranks and their Python are started for you, so {batch.script} is no script."
        return wrong("script", found, f"hvdtrain submit train.py, without {batch.script}")
    what = "is a folder" if path.is_dir() else "cannot be read" if path.exists() else "is not there"
    found = f"The script {batch.script} {what} (looked for from {base.absolute()})."
    return wrong("script", found, "ls, to see how it is called")


def _words(batch: Batch) -> Iterator[Finding]:
    """Says which words go to the script though they look like submit's own."""
    after = batch.words[batch.words.index(batch.script) + 1 :] if batch.script else ()
    ours = [word for word in after if _OURS.fullmatch(word)]
    if ours:
        found = f"{', '.join(ours)} after the script is the script's; what is for submit stands before it."
        yield note("words", found, f"hvdtrain submit {shlex.join(ours)} … {shlex.quote(batch.script)}")


def _trials(base: Path, batch: Batch) -> Finding:
    if len(batch.words) < 2:
        given = f", and only {batch.words[0]} was given" if batch.words else ""
        found = f"A sweep wants a file of trials, then a script{given}."
        return wrong("trials", found, "hvdtrain submit --array=0-8 trials.txt train.py")
    path = base / batch.words[0]
    try:
        lines = trials_of(path)
    except OSError as error:
        found = f"The file of trials {path} cannot be read: {error.strerror}."
        return wrong("trials", found, "hvdtrain submit --array=0-8 trials.txt train.py")
    open_quotes = [number for number, line in enumerate(lines) if not _closed(line)]
    if open_quotes:
        found = f"Trial {open_quotes[0]} of {path} has a quote without its end: {lines[open_quotes[0]]}"
        return wrong("trials", found, "close it, or double it to mean itself")
    array = batch.options.get("array") or ""
    last = max(_last(part) for part in array.partition("%")[0].split(","))
    if last < len(lines):
        return ok("trials", f"{len(lines)} in {path}, --array={array}")
    there = f"{path} has {len(lines)} trials" + (f", 0 to {len(lines) - 1}" if lines else "")
    found = f"{there}, and --array={array} asks for number {last}."
    return wrong("trials", found, f"--array=0-{len(lines) - 1}" if lines else "write one trial a line")


def _closed(line: str) -> bool:
    try:
        return shlex.split(line) is not None
    except ValueError:
        return False


def _last(part: str) -> int:
    """Gives the last number of a part of --array: 7, 0-8, or 0-8:2."""
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+))?)?\s*", part)
    if not match:
        return 0  # sbatch says what is wrong with it
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1) or 1
    return first + (last - first) // step * step


def _variables(batch: Batch, base: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the templates are told by variables."""
    stage = environ.get("HVDTRAIN_STAGE")
    if stage and not (base / stage).exists():
        found = (
            f"HVDTRAIN_STAGE names the data {stage}, which is not there (looked for from {base.absolute()})."
        )
        yield wrong("data", found, "unset HVDTRAIN_STAGE, or name a folder that all nodes see")
    launcher = environ.get("HVDTRAIN_LAUNCHER", "")
    if launcher not in ("", "srun", "mpirun"):
        found = f"HVDTRAIN_LAUNCHER is {launcher!r}; it may be srun or mpirun."
        yield wrong("launcher", found, "unset HVDTRAIN_LAUNCHER")
    if batch.template.name == "container":
        yield from _image(batch, base, environ)
    kept = (batch.options.get("export") or "ALL").split(",")
    lost = [name for name in batch.settings if "ALL" not in kept and name not in kept]
    if lost:
        found = f"--export={','.join(kept)} keeps {', '.join(lost)} from the job, which it needs."
        yield wrong("export", found, f"--sbatch='--export={','.join(lost)}'")


def _image(batch: Batch, base: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    image = batch.settings.get("HVDTRAIN_IMAGE")
    if not image:
        yield wrong("image", "The template container needs an image.", "--image=/shared/train.sif")
    elif _is_file(image, environ) and not os.access(base / image, os.R_OK):
        yield wrong("image", f"The image {image} cannot be read.", "--image=/shared/train.sif")
    elif batch.gpus[1] and _needs_nv(environ) and "--nv" not in environ.get("HVDTRAIN_APPTAINER", ""):
        found = "The container would not see the GPUs without Apptainer's --nv."
        yield note("image", found, "export HVDTRAIN_APPTAINER=--nv")


def _needs_nv(environ: Mapping[str, str]) -> bool:
    return environ.get("HVDTRAIN_CONTAINER", "apptainer") in ("apptainer", "singularity")


def _is_file(image: str, environ: Mapping[str, str]) -> bool:
    """Says whether an image is a file; Shifter, Sarus and Pyxis also take names of a registry."""
    return "://" not in image and (_needs_nv(environ) or image.startswith(("/", "./")))


def _log(batch: Batch, base: Path) -> Finding:
    name = batch.options.get("job-name") or ""
    if "/" in name:
        found = f"--job-name={name} has a slash, so no log could be written under it."
        return wrong("log", found, f"--job-name={shlex.quote(name.replace('/', '-'))}")
    folders = [_folder(batch, base, option) for option in ("output", "error")]
    for folder in folders:
        unknown = re.search(r"%\d*[A-Za-z]", str(folder))
        if unknown:
            found = f"The log's folder {folder} depends on {unknown[0]}, which is known when the job starts, "
            found += "and Slurm makes no folders."
            return wrong(
                "log", found, "--sbatch='--output=logs/%x-%j.log', with the pattern in the file's name"
            )
        if not folder.is_dir():
            # Slurm would end the job at once, without a word anywhere.
            return wrong(
                "log", f"The log's folder {folder} is not there.", f"mkdir -p {shlex.quote(str(folder))}"
            )
    for needed in (*folders, Path()):
        if not os.access(needed, os.W_OK):
            found = f"Log and proof of success are written to {needed.absolute()}, where you may not write."
            return wrong("log", found, "cd to a folder of your own that the nodes see")
    return ok("log", f"in {folders[0].absolute()}")


def _folder(batch: Batch, base: Path, option: str) -> Path:
    """Returns the folder of a log, with the patterns replaced whose values are known before the job starts."""
    name = batch.options.get("job-name") or batch.template.path.name
    user = pwd.getpwuid(os.geteuid()).pw_name
    folder = str((base / (batch.options.get(option) or "log")).parent)
    if "\\" in folder:  # Slurm then takes every % for itself
        return Path(folder.replace("\\", ""))
    known = {"%x": name, "%u": user, "%%": "%"}
    return Path(re.sub(r"%[xu%]", lambda pattern: known[pattern[0]], folder))
