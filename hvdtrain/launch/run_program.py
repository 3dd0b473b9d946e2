"""Run another program and return its output, for example `mpirun --version` or an srun step."""

import subprocess
from collections.abc import Mapping, Sequence

from hvdtrain.launch.hosts import LaunchError


def ask(
    command: Sequence[str], environ: Mapping[str, str], seconds: float | None
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its output and exit code.

    Args:
        command: The program and its arguments.
        environ: Its environment.
        seconds: Time limit; None for no limit, for example while copying data.

    Returns:
        Its exit code, standard output and standard error, as text.

    Raises:
        LaunchError: If it cannot be started or does not end in time.
    """
    try:
        return subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} was found but does not run: {error}.") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} was found but has not ended within {seconds:g} s.") from error
