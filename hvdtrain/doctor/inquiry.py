"""Everything doctor asks of other programs: each question put once, the slow ones early and side by side."""

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
from hvdtrain.doctor.question import Answer, Question, ask
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.topology import launcher_variables

# Seconds for a program that only prints, and for one that reads TensorFlow from a slow disk.
QUICK, SLOW = 10, 45

# What a failed program says about why, the most telling first.
_REASONS = (
    r"^(?:\[\d+\] ?)?[\w.]*(?:Error|Exception)\b: .*",
    r"exited on signal \d+ .*",
    r"An error occurred in MPI_\w+",
    r".*\bERROR\b.*",
)


class NoAnswerError(Exception):
    """A program ended without the answer it was asked for; the text says why."""


@final
class Inquiry:
    """What is known of this environment through the programs that were asked.

    Args:
        environ: The environment of the training to come; the process's own by default.
        engines: The engines over which two ranks shall sum.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, engines: Sequence[str] = ("mpi",)):
        self.environ = fresh(environ)
        self._running: list[Question] = []
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
        self._mpi = self._start([*(self.start_of_ranks(1) or []), *_probe("mpi")])
        self._stack = self._start(_probe("stack"))
        self._sums = {engine: self._start_sum(engine) for engine in engines if self.start_of_ranks(2)}

    def __enter__(self) -> "Inquiry":
        return self

    def __exit__(self, *exception: object) -> None:
        for question in self._running:
            question.close()

    @cached_property
    def stack(self) -> dict[str, Any]:
        """TensorFlow, Keras, backend and GPUs, as a training script would see them."""
        return read_json(self._stack.answer())

    @cached_property
    def mpi(self) -> dict[str, Any]:
        """mpi4py's version and its MPI library, loaded under the launcher as a rank would load it."""
        return read_json(self._mpi.answer())

    def start_of_ranks(self, ranks: int) -> list[str] | None:
        """Writes what starts ranks here as `hvdtrain run` would; None where nothing can."""
        command = slurm.srun_command(ranks, "none", self.environ) if self._tasks >= ranks else None
        if command is not None:
            return command
        return self.launcher.command(ranks, (), ()) if self.launcher else None

    def allreduce(self, engine: str) -> dict[str, Any]:
        """Lets two ranks sum known numbers over one engine and tells what rank 0 saw.

        Args:
            engine: One of those that were to be asked.

        Raises:
            NoAnswerError: The ranks failed or hung.
        """
        return read_json(self._sums[engine].answer())

    def ask(self, *command: str) -> Answer:
        """Asks a program that answers quickly."""
        return ask(command, self.environ, QUICK)

    def _start_sum(self, engine: str) -> Question:
        command = [*(self.start_of_ranks(2) or []), *_probe("allreduce", str(SLOW))]
        return self._start(command, {"HVDTRAIN_ENGINE": engine})

    def _start(self, command: list[str], settings: Mapping[str, str] | None = None) -> Question:
        question = Question(command, {**self.environ, **(settings or {})}, SLOW)
        self._running.append(question)
        return question


def fresh(environ: Mapping[str, str]) -> dict[str, str]:
    """Makes the environment in which new ranks can start, also when doctor itself is one of some ranks.

    Args:
        environ: What doctor was started with.

    Returns:
        The same without a launcher's traces, with hvdtrain importable and MPI willing to serve root.
    """
    # srun must still know when it starts a step within a step.
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


def read_json(answer: Answer) -> dict[str, Any]:
    """Finds a probe's answer among whatever else came with it.

    Raises:
        NoAnswerError: There is none; the text is the reason, as far as the program gave one.
    """
    lines = [line for line in answer.out.splitlines() if line.startswith("{")]
    if answer.code != 0 or not lines:
        raise NoAnswerError(reason(answer))
    return json.loads(lines[-1])


def reason(answer: Answer) -> str:
    """Says in one line why a program failed: an exception if it named one, else the last thing it said."""
    if answer.code is None:
        return f"it was still running after {answer.seconds:.0f} s"
    for pattern in _REASONS:
        named = re.findall(pattern, answer.err, re.MULTILINE)
        if named:
            return named[-1].strip().rstrip(".")
    if answer.code < 0:
        return f"it was killed by {signal.Signals(-answer.code).name}"
    return answer.last_line.rstrip(".") or f"it ended with exit code {answer.code}"


def _probe(name: str, *args: str) -> list[str]:
    return [sys.executable, *safe_path.main_of(f"hvdtrain.doctor.probes.{name}"), *args]
