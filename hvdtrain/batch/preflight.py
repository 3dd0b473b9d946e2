"""Check script, trials, option values, variables, image and log of a job before it is submitted, without Slurm."""

import os
import pwd
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from hvdtrain import settings
from hvdtrain.batch.sbatch_command import Batch
from hvdtrain.batch.sbatch_options import mebibytes, minutes
from hvdtrain.doctor.finding import Finding, note, ok, wrong

# Options that the user may have meant for submit, although they are after the script.
_SUBMIT_OPTIONS = re.compile(
    r"--(nodes|ntasks(-per-node)?|cpus-per-(task|gpu)|gpus-per-(node|task)|mem-per-gpu|(cpu|gpu)-bind|partition|"
    r"account|dry-run|follow|preemptible)(=.*)?"
)

# Programs that start Python or ranks; the templates do this already.
_STARTERS = re.compile(r"python[\d.]*|mpirun|mpiexec|srun|hvdtrain|horovodrun")

_SWEEP = "hvdtrain submit --array=0-8 trials.txt train.py"


def examine_job(batch: Batch, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check everything that can be judged without Slurm, and yield the findings in the order of the checks."""
    yield ok("template", f"{batch.template.path}")
    base = Path(batch.options.get("chdir") or ".")
    if batch.template.name == "array_sweep":
        yield _trials(base, batch)
    if batch.template.name != "array_sweep" or len(batch.words) > 1:
        yield _script(batch, base)
        yield from _script_options(batch)
    yield from _values(batch)
    yield from _gpus(batch)
    yield from _stop_signal(batch)
    yield from _variables(batch, base, environ)
    yield _log(batch, base)


def trials_of(path: Path) -> list[str]:
    """Return the trials in a file, as array_sweep.sbatch reads them: without empty lines and comments."""
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _script(batch: Batch, base: Path) -> Finding:
    script = batch.script
    if batch.template.name == "smoke":
        if not batch.words:
            return ok("script", "that of the smoke test")
        return wrong("script", "The smoke test has its own script and takes no arguments.", "leave them out")
    if not script:
        return wrong("script", "There is no script to run.", "hvdtrain submit --nodes=2 train.py --epochs 10")
    path = base / script
    if script.startswith("-"):
        return wrong("script", f"{script} looks like an option.", f"./{script} for a file of that name")
    if path.is_file() and os.access(path, os.R_OK):
        return ok("script", f"{path.absolute()}")
    if _STARTERS.fullmatch(path.name) and batch.words[-1] != script:
        found = f"hvdtrain starts the ranks and their Python, so {script} is not needed here."
        return wrong("script", found, f"hvdtrain submit train.py, without {script}")
    if path.is_dir():
        problem = "is a folder"
    elif path.exists():
        problem = "cannot be read"
    else:
        problem = "is not there"
    found = f"The script {script} {problem} (searched from {base.absolute()})."
    return wrong("script", found, "ls, to see the names of the files")


def _script_options(batch: Batch) -> Iterator[Finding]:
    """Report options after the script that look like options of submit; they are passed to the script."""
    after = batch.words[batch.words.index(batch.script) + 1 :] if batch.script else ()
    similar = [word for word in after if _SUBMIT_OPTIONS.fullmatch(word)]
    if similar:
        found = f"{', '.join(similar)} after the script is passed to the script; options of submit come before it."
        yield note("words", found, f"hvdtrain submit {shlex.join(similar)} … {shlex.quote(batch.script)}")


def _trials(base: Path, batch: Batch) -> Finding:
    if len(batch.words) < 2:
        given = f", and only {batch.words[0]} was given" if batch.words else ""
        return wrong("trials", f"A sweep needs a file of trials, then a script{given}.", _SWEEP)
    path = base / batch.words[0]
    try:
        lines = trials_of(path)
    except OSError as error:
        return wrong("trials", f"The file of trials {path} cannot be read: {error.strerror}.", _SWEEP)
    for number, line in enumerate(lines):
        try:
            shlex.split(line)
        except ValueError:
            found = f"Trial {number} of {path} has an opening quote without a closing one: {line}"
            return wrong("trials", found, "close the quote, or put it between quotes of the other kind")
    array = batch.options.get("array") or ""
    last = max(_last(part) for part in array.partition("%")[0].split(","))
    if last < len(lines):
        return ok("trials", f"{len(lines)} in {path}, --array={array}")
    there = f"{path} has {len(lines)} trials" + (f", 0 to {len(lines) - 1}" if lines else "")
    found = f"{there}, and --array={array} asks for number {last}."
    return wrong("trials", found, f"--array=0-{len(lines) - 1}" if lines else "write one trial a line")


def _last(part: str) -> int:
    """Return the last number of a part of --array: 7, 0-8, or 0-8:2."""
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+))?)?\s*", part)
    if not match:
        return 0  # sbatch reports the error
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1) or 1
    return first + (last - first) // step * step


def _values(batch: Batch) -> Iterator[Finding]:
    """Check the values of the options that sbatch will parse."""
    time, mem = batch.options.get("time"), batch.options.get("mem")
    if time is not None and minutes(time) is None:
        found = f"--time={time} is not a time that Slurm accepts: minutes, hours:minutes:seconds, days-hours."
        yield wrong("time", found, "--time=8:00:00 for eight hours, --time=2-00:00:00 for two days")
    if mem is not None and mebibytes(mem) is None:
        found = f"--mem={mem} is not an amount that Slurm accepts."
        yield wrong("memory", found, "--mem=32G, the memory of a node")
    for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"):
        value = batch.options.get(name)
        pattern = r"[1-9]\d*(-[1-9]\d*)?" if name == "nodes" else r"[1-9]\d*"
        if value is not None and not re.fullmatch(pattern, value):
            yield wrong(name, f"--{name}={value} is not a number of 1 or more.", f"--{name}=2")


def _gpus(batch: Batch) -> Iterator[Finding]:
    """Compare the numbers of ranks and GPUs."""
    count = batch.gpus[1]
    if not count or batch.template.name == "smoke":
        return
    numbers = f"{batch.ranks} rank(s) and {count} GPU(s) a node"
    fix = f"--ntasks-per-node={count}, or --gpus-per-node={batch.ranks}"
    if batch.ranks > count:
        yield wrong("GPUs", f"There are {numbers}: ranks would share a GPU, which NCCL refuses.", fix)
    elif batch.ranks < count:
        yield note("GPUs", f"There are {numbers}: {count - batch.ranks} GPU(s) would be idle.", fix)
    else:
        yield ok("GPUs", numbers)


def _stop_signal(batch: Batch) -> Iterator[Finding]:
    """Check that the time limit leaves time to train before Slurm sends the signal to stop."""
    notice = re.search(r"@(\d+)", batch.options.get("signal") or "")
    limit = minutes(batch.options.get("time") or "") or float("inf")
    if notice and limit * 60 < 2 * int(notice[1]) + 60:
        found = f"The job is asked to stop {notice[1]} s before the end of --time={batch.options['time']}, "
        found += "so almost no time is left to train."
        yield note("time", found, "a longer --time")


def _variables(batch: Batch, base: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check the environment variables that the templates read."""
    stage = settings.get("HVDTRAIN_STAGE", environ)
    if stage and not (base / stage).exists():
        found = (
            f"HVDTRAIN_STAGE names the data {stage}, which is not there (searched from {base.absolute()})."
        )
        yield wrong("data", found, "unset HVDTRAIN_STAGE, or name a folder on a file system of all nodes")
    launcher = settings.get("HVDTRAIN_LAUNCHER", environ)
    if launcher not in ("", "srun", "mpirun"):
        found = f"HVDTRAIN_LAUNCHER is {launcher!r}; it may be srun or mpirun."
        yield wrong("launcher", found, "unset HVDTRAIN_LAUNCHER")
    if batch.template.name == "container":
        yield from _image(batch, base, environ)
    exported = (batch.options.get("export") or "ALL").split(",")
    missing = [name for name in batch.settings if "ALL" not in exported and name not in exported]
    if missing:
        found = f"--export={','.join(exported)} does not export {', '.join(missing)}, which the job needs."
        yield wrong("export", found, f"--sbatch='--export={','.join(missing)}'")


def _image(batch: Batch, base: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    image = settings.get("HVDTRAIN_IMAGE", batch.settings)
    apptainer = settings.get("HVDTRAIN_CONTAINER", environ) in ("", "apptainer", "singularity")
    # Shifter, Sarus and Pyxis also take names of a registry.
    is_file = "://" not in image and (apptainer or image.startswith(("/", "./")))
    if not image:
        yield wrong("image", "The template container needs an image.", "--image=/shared/train.sif")
    elif is_file and not os.access(base / image, os.R_OK):
        yield wrong("image", f"The image {image} cannot be read.", "--image=/shared/train.sif")
    elif batch.gpus[1] and apptainer and "--nv" not in settings.get("HVDTRAIN_APPTAINER", environ):
        found = "Without Apptainer's --nv the container does not see the GPUs."
        yield note("image", found, "export HVDTRAIN_APPTAINER=--nv")


def _log(batch: Batch, base: Path) -> Finding:
    name = batch.options.get("job-name") or ""
    if "/" in name:
        found = f"--job-name={name} has a slash, so a log of that name cannot be written."
        return wrong("log", found, f"--job-name={shlex.quote(name.replace('/', '-'))}")
    folders = [_folder(batch, base, option) for option in ("output", "error")]
    for folder in folders:
        unknown = re.search(r"%\d*[A-Za-z]", str(folder))
        if unknown:
            found = f"The log's folder {folder} depends on {unknown[0]}, which is only known when the job starts, "
            found += "and Slurm does not create folders."
            fix = "--sbatch='--output=logs/%x-%j.log', with the pattern in the file's name"
            return wrong("log", found, fix)
        if not folder.is_dir():
            # Slurm would end the job at once, without any message.
            fix = f"mkdir -p {shlex.quote(str(folder))}"
            return wrong("log", f"The log's folder {folder} is not there.", fix)
    for needed in (*folders, Path()):
        if not os.access(needed, os.W_OK):
            found = f"The log and the done file are written to {needed.absolute()}, where you may not write."
            return wrong("log", found, "cd to a writable folder on a file system of all nodes")
    return ok("log", f"in {folders[0].absolute()}")


def _folder(batch: Batch, base: Path, option: str) -> Path:
    """Return the folder of a log, with the patterns replaced whose values are known before the job starts."""
    name = batch.options.get("job-name") or batch.template.path.name
    user = pwd.getpwuid(os.geteuid()).pw_name
    folder = str((base / (batch.options.get(option) or "log")).parent)
    if "\\" in folder:  # Slurm then replaces no pattern in the path
        return Path(folder.replace("\\", ""))
    known = {"%x": name, "%u": user, "%%": "%"}
    return Path(re.sub(r"%[xu%]", lambda pattern: known[pattern[0]], folder))
