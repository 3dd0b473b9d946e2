"""What was asked of `hvdtrain bench step`, and what of it cannot be done."""

import os
from dataclasses import dataclass

from hvdtrain.bench.models.workloads import WORKLOADS, Workload
from hvdtrain.launch.hosts import LaunchError

ENGINES = ("mpi", "horovod")


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Args:
        num_proc: How many ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: What is trained, one of `WORKLOADS`.
        batch: Samples a rank and step; the model's own if not given.
        rounds: How often each contender's turn comes.
        steps: How many steps a turn has; as many as take about a second if not given.
        engines: Which engines of hvdtrain take part.
        peers: Whether torch and tf_keras take part.
        xla: Whether hvdtrain and Keras alone take part with `jit_compile=True` too.
        fit: Steps of an epoch, where a turn is a whole epoch of `fit`; None where it is steps without `fit`.
    """

    num_proc: int | None = None
    hosts: str | None = None
    model: str = "cnn"
    batch: int | None = None
    rounds: int = 6
    steps: int | None = None
    engines: tuple[str, ...] = ENGINES
    peers: bool = True
    xla: bool = False
    fit: int | None = None

    @property
    def ranks(self) -> int:
        """How many ranks train."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))

    @property
    def turn(self) -> int | None:
        """How many steps a turn has; None for as many as take about a second."""
        return self.fit or self.steps

    @property
    def workload(self) -> Workload:
        """What the model is fed with."""
        return WORKLOADS[self.model]

    @property
    def own(self) -> int:
        """How many samples a rank takes at a step where each has a batch of its own."""
        return self.batch if self.batch is not None else self.workload.batch

    @property
    def part(self) -> int:
        """How many samples a rank takes where all ranks share the batch of one; 0 if there are too few."""
        return self.own // self.ranks


def check(options: Options) -> None:
    """Refuses what cannot be measured, before anything is started.

    Raises:
        LaunchError: If something is wrong; the message says what to type.
    """
    if options.model not in WORKLOADS:
        raise LaunchError(f"--model {options.model} is not known; expected one of {', '.join(WORKLOADS)}.")
    if not set(options.engines) <= set(ENGINES):
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    for name, number in (
        ("-np", options.ranks),
        ("--batch", options.own),
        ("--rounds", options.rounds),
        ("--steps", options.steps if options.steps is not None else 1),
        ("--fit", options.fit if options.fit is not None else 1),
    ):
        if number < 1:
            raise LaunchError(f"{name} {number} measures nothing; it must be 1 or more.")
    if options.fit is not None and options.steps is not None:
        raise LaunchError(
            "--fit says how many steps an epoch has, and a turn is one epoch: leave out --steps."
        )
