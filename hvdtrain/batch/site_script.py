"""Write the site file, a shell script made from a cluster profile, which the templates read first on the nodes."""

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain import settings
from hvdtrain.batch.cluster_profile import Profile
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers.mpirun import INTERFACE
from hvdtrain.launch.tuned_settings import config_folder

# Batch shells are not login shells, so on some clusters the command `module` is not defined in them.
_MODULES = """\
if ! type module >/dev/null 2>&1; then
  for start in /etc/profile.d/*lmod*.sh /etc/profile.d/*modules*.sh /usr/share/lmod/lmod/init/bash; do
    if [[ -r $start ]]; then source "$start"; fi
  done
fi
"""

_CONDA = """\
if ! type conda >/dev/null 2>&1 && [[ -r {start} ]]; then source {start}; fi
type conda >/dev/null 2>&1 || {{ echo "conda is not on PATH on $(hostname): load its module first" >&2; exit 127; }}
eval "$(conda shell.bash hook)"
conda activate {name} || exit
"""


@dataclass(frozen=True)
class Site:
    """A shell file that applies a cluster profile on the nodes; HVDTRAIN_SITE passes its path to the job.

    Its name is a digest of its content: a waiting job keeps the file with which it was submitted, also if the
    profile changes, and jobs with the same profile share a file.
    """

    path: Path
    text: str

    def write(self) -> Path:
        """Write the file and return its path.

        Raises:
            LaunchError: If it cannot be written.
        """
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(os.fsencode(self.text))
            part.replace(self.path)
        except OSError as error:
            raise LaunchError(
                f"The settings for the nodes cannot be written to {self.path}: {error.strerror}."
            ) from error
        return self.path

    def __str__(self) -> str:
        """Return the shell command that writes the file."""
        path, folder = shlex.quote(str(self.path)), shlex.quote(str(self.path.parent))
        return f"mkdir -p {folder} && printf %s {shlex.quote(self.text)} >{path}"


def compose_site(profile: Profile, environ: Mapping[str, str] = os.environ) -> Site | None:
    """Compose the site file of a profile, without writing it; None if the profile needs none.

    Raises:
        LaunchError: If the profile or HVDTRAIN_SITE names a file or folder that is not there.
    """
    named = settings.get("HVDTRAIN_SITE", environ)
    own = Path(named).expanduser()
    if settings.is_set("HVDTRAIN_SITE", environ) and not own.is_file():
        raise LaunchError(
            f"HVDTRAIN_SITE names {named}, which is not there: unset HVDTRAIN_SITE, or write that file."
        )
    lines = [*_environment(profile, environ), *_exports(profile)]
    if not lines:
        return None
    title = "# Written by hvdtrain submit" + (f" from {profile.path}." if profile.path else ".")
    # The user's own site file is read before the profile.
    first = [f"source {shlex.quote(str(own.absolute()))}"] if own.exists() else []
    text = "\n".join([title, *first, *lines, ""])
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return Site(config_folder(environ) / "sites" / f"{digest[:12]}.sh", text)


def _environment(profile: Profile, environ: Mapping[str, str]) -> list[str]:
    """Return the lines for modules, venv, conda and `setup`; only those of `setup` are not quoted."""
    modules = shlex.join(profile.modules)
    lines = [_MODULES + f"module load {modules}"] if modules else []
    if profile.venv and profile.conda:
        raise LaunchError(f"The cluster profile {profile.path} has venv and conda: write one of them.")
    if profile.venv:
        lines.append(f"source {shlex.quote(str(_activate(profile)))}")
    if profile.conda:
        lines.append(_conda(profile, environ))
    lines.extend(profile.setup)
    folder = Path(sys.executable).parent
    # hvdtrain was called by its path, such as .venv/bin/hvdtrain: the nodes need that folder on PATH.
    if not shutil.which("hvdtrain", path=environ.get("PATH")) and (folder / "hvdtrain").exists():
        on_path = "command -v hvdtrain >/dev/null"
        lines.append(f'{on_path} || export PATH={shlex.quote(str(folder.absolute()))}:"$PATH"')
    return lines


def _activate(profile: Profile) -> Path:
    path = Path(profile.venv).expanduser().absolute() / "bin" / "activate"
    if not path.is_file():
        raise LaunchError(
            f"The cluster profile {profile.path} has venv = {profile.venv!r}, and {path} is not there. Variables "
            "are not replaced in it; ~ is."
        )
    return path


def _conda(profile: Profile, environ: Mapping[str, str]) -> str:
    """Return the lines that activate a conda environment; batch shells do not define `conda` by themselves."""
    named = profile.conda
    if "/" in named or named.startswith("~"):
        path = Path(named).expanduser().absolute()
        if not (path / "conda-meta").is_dir():
            raise LaunchError(
                f"The cluster profile {profile.path} has conda = {named!r}, and {path} is not a conda environment: "
                "`conda env list` shows where they are. Variables are not replaced in it; ~ is."
            )
        named = str(path)
    # If the nodes have no conda on PATH, the conda of the submitting user is used, from a shared file system.
    conda = Path(environ.get("CONDA_EXE") or Path("~/miniconda3/bin/conda").expanduser())
    start = shlex.quote(str(conda.parent.parent / "etc" / "profile.d" / "conda.sh"))
    return _CONDA.format(start=start, name=shlex.quote(named))


def _exports(profile: Profile) -> list[str]:
    """Return the lines that export the profile's variables, unless the user has set them."""
    settings = {"SLURM_MPI_TYPE": profile.pmi, "HVDTRAIN_LAUNCHER": profile.launcher}
    settings |= dict.fromkeys(INTERFACE, profile.network)
    return [f"export {name}=${{{name}-{shlex.quote(value)}}}" for name, value in settings.items() if value]
