"""Store the options of `hvdtrain bench step`, and reject those that cannot be measured."""

import os
from dataclasses import dataclass

from hvdtrain.bench.models.workloads import WORKLOADS, Workload
from hvdtrain.launch.hosts import LaunchError

ENGINES = ("mpi", "horovod")


@dataclass(frozen=True)
class Options:
    """Options of `hvdtrain bench step`.

    Args:
        num_proc: Number of ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: The model to train, one of `WORKLOADS`.
        batch: Samples for each rank and step; the model's default if not given.
        rounds: Number of turns of each contender.
        steps: Steps in a turn; as many as take about a second if not given.
        engines: The engines of hvdtrain that take part.
        peers: Whether torch and tf_keras take part.
        xla: Whether hvdtrain and Keras alone take part with `jit_compile=True` too.
        fit: Steps of an epoch, if a turn is a whole epoch of `fit`; None if a turn is steps without `fit`.
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
        """Number of ranks."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))

    @property
    def steps_per_turn(self) -> int | None:
        """Steps in a turn; None for as many as take about a second."""
        return self.fit or self.steps

    @property
    def workload(self) -> Workload:
        """The data and the optimizer of the model."""
        return WORKLOADS[self.model]

    @property
    def weak_batch(self) -> int:
        """Samples for each rank and step in weak scaling, where each rank has its own batch."""
        return self.batch if self.batch is not None else self.workload.batch

    @property
    def strong_batch(self) -> int:
        """Samples for each rank and step in strong scaling, where ranks share one batch; 0 if there are too few."""
        return self.weak_batch // self.ranks


def check(options: Options) -> None:
    """Reject options that cannot be measured, before anything is started.

    Raises:
        LaunchError: If an option is wrong; the message says what to type.
    """
    if options.model not in WORKLOADS:
        raise LaunchError(f"--model {options.model} is not known; expected one of {', '.join(WORKLOADS)}.")
    if not set(options.engines) <= set(ENGINES):
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    for name, number in (
        ("-np", options.ranks),
        ("--batch", options.weak_batch),
        ("--rounds", options.rounds),
        ("--steps", options.steps if options.steps is not None else 1),
        ("--fit", options.fit if options.fit is not None else 1),
    ):
        if number < 1:
            raise LaunchError(f"{name} {number} measures nothing; it must be 1 or more.")
    if options.fit is not None and options.steps is not None:
        raise LaunchError(
            "--fit sets how many steps an epoch has, and a turn is one epoch: leave out --steps."
        )
