"""Run the programs whose output the checks of doctor judge: each one once, and the slow ones at the same time."""

import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import hvdtrain
from hvdtrain import safe_path
from hvdtrain.doctor.program import Program, Result, run_program
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.topology import launcher_variables

# Time limits in seconds: of a program that only prints, and of one that loads TensorFlow from a slow disk.
QUICK, SLOW = 10, 45

# Lines in which a failed program names the reason, the most informative pattern first.
_REASONS = (
    r"^(?:\[\d+\] ?)?[\w.]*(?:Error|Exception)\b: .*",
    r"exited on signal \d+ .*",
    r"An error occurred in MPI_\w+",
    r".*\bERROR\b.*",
)


class ProbeError(Exception):
    """A probe ended without printing its result; the text gives the reason."""


@final
class ProbeRunner:
    """The results of the programs that examine this environment.

    The slow programs start at once, in the constructor; their results are read when a check needs them.

    Args:
        environ: The environment variables of the future training; by default those of this process.
        engines: The engines for which two ranks run an allreduce.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, engines: Sequence[str] = ("mpi",)):
        self.environ = rank_environment(environ)
        self.launcher: mpirun.Launcher | None = None
        self.launcher_problem = ""
        try:
            self.launcher = mpirun.find(self.environ)
        except LaunchError as error:
            self.launcher_problem = str(error)
        tasks = self.environ.get("SLURM_NTASKS", "1")  # srun refuses to start more than were allocated
        self._tasks = int(tasks) if slurm.in_allocation(self.environ) and tasks.isdigit() else 0
        if self._tasks:
            mpi = self.launcher.mpi if self.launcher else None
            self.environ |= slurm.settle(self._tasks, mpi, self.environ)
        commands = {"mpi": [*self.launch_command(1), *probe_command("mpi")], "stack": probe_command("stack")}
        self._probes = {name: Program(command, self.environ, SLOW) for name, command in commands.items()}
        two_ranks = self.launch_command(2)
        for engine in engines if two_ranks else ():
            command = [*two_ranks, *probe_command("allreduce", str(SLOW))]
            settings = self.environ | {"HVDTRAIN_ENGINE": engine}
            self._probes[f"allreduce {engine}"] = Program(command, settings, SLOW)

    def __enter__(self) -> "ProbeRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        for program in self._probes.values():
            program.close()

    @cached_property
    def stack(self) -> dict[str, Any]:
        """TensorFlow, Keras, backend and GPUs, as a training script would see them."""
        return read_json(self._probes["stack"].result())

    @cached_property
    def mpi(self) -> dict[str, Any]:
        """The version of mpi4py and its MPI library, loaded under the launcher as a rank would load it."""
        return read_json(self._probes["mpi"].result())

    def allreduce(self, engine: str) -> dict[str, Any]:
        """Return the result on rank 0 of an allreduce of known numbers over two ranks, on one of the engines.

        Raises:
            ProbeError: The ranks failed or hung.
        """
        return read_json(self._probes[f"allreduce {engine}"].result())

    def launch_command(self, ranks: int) -> list[str]:
        """Return the command with which `hvdtrain run` would start ranks here; empty if there is no launcher."""
        command = slurm.srun_command(ranks, "none", self.environ) if self._tasks >= ranks else None
        if command is None and self.launcher:
            return self.launcher.command(ranks, (), ())
        return command or []

    def run(self, *command: str) -> Result:
        """Run a program that takes a few seconds at most."""
        return run_program(command, self.environ, QUICK)


def probe_command(*words: str) -> list[str]:
    """Return the command that runs a probe, given its name and arguments."""
    return [sys.executable, *safe_path.main_of("hvdtrain.doctor.probes"), *words]


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which new ranks can start, also if doctor itself runs as a rank of a job.

    It has no variables of a launcher, hvdtrain can be imported, and MPI may run as root.
    """
    # srun must still know that it starts a step within a step.
    inherited = launcher_variables() - {"SLURM_STEP_ID"}
    kept = {
        name: value
        for name, value in environ.items()
        if name not in inherited and not name.startswith(("PMIX_", "PMI_"))
    }
    home = str(Path(hvdtrain.__file__).parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), home)))
    kept["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for mpi in mpirun.KNOWN:
        kept |= mpi.as_root
    return kept


def read_json(result: Result) -> dict[str, Any]:
    """Return the JSON object that a probe printed, whatever other lines surround it.

    Raises:
        ProbeError: There is no JSON object, or the probe failed; the text is the reason, if one was printed.
    """
    lines = [line for line in result.out.splitlines() if line.startswith("{")]
    if result.code != 0 or not lines:
        raise ProbeError(failure_reason(result))
    return json.loads(lines[-1])


def failure_reason(result: Result) -> str:
    """Return in one line why a program failed: the exception it named, else the last line it printed."""
    if result.code is None:
        return f"it was still running after {result.seconds:.0f} s"
    for pattern in _REASONS:
        named = re.findall(pattern, result.err, re.MULTILINE)
        if named:
            return named[-1].strip().rstrip(".")
    if result.code < 0:
        return f"it was killed by {signal.Signals(-result.code).name}"
    return result.last_line.rstrip(".") or f"it ended with exit code {result.code}"
