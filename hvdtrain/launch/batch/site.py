"""What the templates read on the nodes before anything else, written from a cluster's profile."""

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.launch.batch.profile import Profile, config_folder
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.mpirun import INTERFACE

# Batch shells are not login shells, so on some clusters nothing has defined `module` there.
_MODULES = """\
if ! type module >/dev/null 2>&1; then
  for start in /etc/profile.d/*lmod*.sh /etc/profile.d/*modules*.sh /usr/share/lmod/lmod/init/bash; do
    if [[ -r $start ]]; then source "$start"; fi
  done
fi
"""


def write_site(profile: Profile, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Writes what makes a profile true on the nodes into a shell file that the templates read.

    Its name is made of its content: a job that waits keeps the file it was submitted with, whatever becomes of the
    profile, and two jobs with one profile share a file.

    Args:
        profile: The profile.
        environ: The environment of the submission.

    Returns:
        The file, for HVDTRAIN_SITE; None where there is nothing to say.

    Raises:
        LaunchError: If it cannot be written.
    """
    named = environ.get("HVDTRAIN_SITE")
    if named and not Path(named).expanduser().is_file():
        raise LaunchError(
            f"HVDTRAIN_SITE names {named}, which is not there: unset HVDTRAIN_SITE, or write it."
        )
    lines = [*_environment(profile, environ), *_exports(profile)]
    if not lines:
        return None
    source = f" from {profile.path}" if profile.path else ""
    text = "\n".join([f"# Written by hvdtrain submit{source}.", *_own(environ), *lines, ""])
    folder = config_folder(environ) / "sites"
    path = folder / f"{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:12]}.sh"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{path.name}.{os.getpid()}"
        beside.write_bytes(os.fsencode(text))
        beside.replace(path)
    except OSError as error:
        raise LaunchError(f"What the nodes need cannot be written to {path}: {error.strerror}.") from error
    return path


def own_site(environ: Mapping[str, str]) -> Path:
    """Returns the user's own file of this kind, which holds besides any profile."""
    return Path(environ.get("HVDTRAIN_SITE") or Path.home() / ".config/hvdtrain/site.sh").expanduser()


def _own(environ: Mapping[str, str]) -> list[str]:
    path = own_site(environ)
    return [f"source {shlex.quote(str(path.absolute()))}"] if path.exists() else []


def _environment(profile: Profile, environ: Mapping[str, str]) -> list[str]:
    """Modules, virtual environment, and the user's own lines, which alone are taken as shell."""
    modules = shlex.join(profile.modules)
    lines = [_MODULES + f"module load {modules}"] if modules else []
    if profile.venv:
        lines.append(f"source {shlex.quote(str(_activate(profile)))}")
    lines.extend(profile.setup)
    beside = Path(sys.executable).parent
    # Typed as .venv/bin/hvdtrain: the nodes shall find the same one.
    if not shutil.which("hvdtrain", path=environ.get("PATH")) and (beside / "hvdtrain").exists():
        missing = "command -v hvdtrain >/dev/null"
        lines.append(f'{missing} || export PATH={shlex.quote(str(beside.absolute()))}:"$PATH"')
    return lines


def _activate(profile: Profile) -> Path:
    path = Path(profile.venv).expanduser().absolute() / "bin" / "activate"
    if not path.is_file():
        raise LaunchError(
            f"The cluster profile {profile.path} has venv = {profile.venv!r}, and {path} is not there. Variables "
            "are not replaced in it; ~ is."
        )
    return path


def _exports(profile: Profile) -> list[str]:
    """The user's own variables go before the profile's."""
    settings = {"SLURM_MPI_TYPE": profile.pmi, "HVDTRAIN_LAUNCHER": profile.launcher}
    settings |= dict.fromkeys(INTERFACE, profile.network)
    return [f"export {name}=${{{name}-{shlex.quote(value)}}}" for name, value in settings.items() if value]
