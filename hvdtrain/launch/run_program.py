"""Another program, asked for what it prints: `mpirun --version`, a step of Slurm's."""

import subprocess
from collections.abc import Mapping, Sequence

from hvdtrain.launch.hosts import LaunchError


def ask(
    command: Sequence[str], environ: Mapping[str, str], seconds: float | None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and gives what it said and how it ended.

    Args:
        command: The program and its arguments.
        environ: The environment it sees.
        seconds: How long it may take; None where that depends on the size of somebody's data.

    Returns:
        Its exit code and its two streams, as text.

    Raises:
        LaunchError: If it cannot be started, or has not ended in time.
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
