"""Measure allreduce with each engine, plain MPI, stock Horovod and torch (`hvdtrain bench allreduce`)."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hvdtrain.bench import allreduce_table, machine, sizes
from hvdtrain.bench.allreduce_table import ADD, COPY, LIMITS, LINK, OURS, RAW
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.output import run
from hvdtrain.bench.report import Report, Row, Spread
from hvdtrain.bench.scheduler import Answers, Scheduler
from hvdtrain.launch.hosts import Host, LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm

WORK = "hvdtrain.bench.work."

TURN_SECONDS = 0.2  # aimed duration of one contender's turn
MIN_REPEATS, MAX_REPEATS = 2, 5000  # allreduces in one turn
SMALL_BYTES = 1 << 20  # for smaller arrays the first allreduce alone says little about the next
MIB = 1 << 20
COPIES = 4  # arrays that a rank holds at the same time: input, output, and copies of the framework

# Open MPI's ring (coll_tuned, algorithm 5) in segments that fit into the cache.
_RING = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "5",
    "OMPI_MCA_coll_tuned_allreduce_algorithm_segmentsize": "262144",
    "OMPI_MCA_btl_sm_eager_limit": "32768",
}


@dataclass(frozen=True)
class Options:
    """Options of `hvdtrain bench allreduce`.

    Args:
        num_proc: Number of ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        sizes: Sizes in bytes: "4K:256M", "64K,16M".
        dtype: Data type of the arrays.
        rounds: Number of turns of each contender, for each size.
        engines: The engines of hvdtrain that take part.
        peers: Whether stock Horovod and torch.distributed take part.
    """

    num_proc: int | None = None
    hosts: str | None = None
    sizes: str = "4K:256M"
    dtype: str = "float32"
    rounds: int = 5
    engines: tuple[str, ...] = ("mpi", "horovod")
    peers: bool = True

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))

    @property
    def bytes(self) -> list[int]:
        """The sizes of the arrays, in bytes."""
        return sizes.parse(self.sizes)


def allreduce(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measure, and show, print or write the report.

    Args:
        options: The options of the command.
        as_json: Whether to print JSON instead of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if a sum was wrong or an engine of hvdtrain failed; 2 if nothing could be measured; 128 plus the
        number of the signal that ended the measurement.
    """
    return run(lambda progress: measure(options, progress), allreduce_table.render, as_json, save)


def measure(options: Options, progress: Callable[[str], None]) -> Report:
    """Let all contenders reduce arrays of all sizes, one contender at a time.

    Args:
        options: The options of the command.
        progress: Is called with a line about the current state.

    Returns:
        The report; `values` are `latency_us`, `algorithm_gb_s` and `bus_gb_s`.

    Raises:
        LaunchError: If the options cannot be measured on this machine.
    """
    check(options)
    left_out, supported = dict[str, str](), list[Contender]()
    for contender in contenders(options):
        reason = _unsupported(contender, options.dtype)
        if reason:
            left_out[contender.name] = reason
        else:
            supported.append(contender)
    with Scheduler(supported, options.ranks, options.hosts, progress) as scheduler:
        rows = [row for size in options.bytes for row in _rows(scheduler, options, size, progress)]
        description = machine.describe(scheduler)
    left_out |= scheduler.left_out
    return Report("allreduce", options.ranks, description, asdict(options), rows, left_out)


def contenders(options: Options) -> Iterator[Contender]:
    """Yield all ways of reducing an array over ranks, and the limits of the machine."""
    for engine in options.engines:
        environ = {"HVDTRAIN_ENGINE": engine}
        ours, needs = f"{WORK}engine_allreduce", ("horovod",) if engine == "horovod" else ()
        if engine == "mpi":
            yield Contender(OURS, ours, environ=environ)
        name = f"hvdtrain {engine}, graph"
        yield Contender(name, ours, {"graph": True}, environ, (*needs, "tensorflow"))
    yield from _raw_mpi()
    if options.peers:
        yield Contender(
            "stock Horovod", f"{WORK}horovod_allreduce", needs=("horovod", "tensorflow"), stock=True
        )
        yield Contender("torch Gloo", f"{WORK}gloo_allreduce", needs=("torch",))
    for name, operation in ((COPY, "copy"), (ADD, "add")):
        yield Contender(name, f"{WORK}one_core", {"operation": operation}, ranks=1)
    if _several_hosts(options):
        yield Contender(LINK, f"{WORK}mpi_link", stock=True)


def check(options: Options) -> None:
    """Reject options that cannot be measured, before anything is started.

    Raises:
        LaunchError: If an option is wrong; the message says what to type.
    """
    if options.ranks < 2:
        raise LaunchError(f"-np {options.ranks}: bench allreduce needs 2 ranks or more.")
    if options.rounds < 1:
        raise LaunchError(f"--rounds {options.rounds} measures nothing; it must be 1 or more.")
    if not set(options.engines) <= {"mpi", "horovod"}:
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    try:
        array_sizes = options.bytes
    except ValueError as error:
        raise LaunchError(str(error)) from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    local_ranks = -(-options.ranks // slurm.node_count())
    if not options.hosts and COPIES * max(array_sizes) * local_ranks > memory:
        raise LaunchError(
            f"--sizes: {local_ranks} ranks need {COPIES} arrays of {sizes.format_size(max(array_sizes))} each, "
            f"and this host has {memory / 2**30:.0f} GiB of memory; type smaller sizes."
        )
    width = 2 if options.dtype == "bfloat16" else np.dtype(options.dtype).itemsize
    odd = [size for size in array_sizes if size % width]
    if odd:
        raise LaunchError(
            f"--sizes: {odd[0]} bytes are not a whole number of {options.dtype}; expected multiples of {width}."
        )


def _raw_mpi() -> Iterator[Contender]:
    """Yield MPI called from Python with its default settings, and other ways of calling it."""
    yield Contender(RAW, f"{WORK}mpi_allreduce", stock=True)
    for mib in (1, 4, 16):
        yield Contender(f"MPI, {mib} MiB pieces", f"{WORK}mpi_allreduce", {"piece": mib * MIB}, stock=True)
    launcher = mpirun.find()
    if launcher and launcher.mpi.name.startswith("Open MPI"):
        yield Contender("MPI, segmented ring", f"{WORK}mpi_allreduce", environ=_RING, stock=True)


def _unsupported(contender: Contender, dtype: str) -> str:
    """Return why a contender cannot reduce a dtype; an empty string if it can."""
    if dtype in ("float16", "bfloat16") and contender.module == f"{WORK}mpi_allreduce":
        return f"MPI has no sum of {dtype}"
    if dtype == "bfloat16" and contender.module.endswith(("horovod_allreduce", "gloo_allreduce")):
        return f"it does not take {dtype} from NumPy"
    return ""


def _several_hosts(options: Options) -> bool:
    if options.hosts:
        used = _used(read_hosts(options.hosts, None, options.ranks), options.ranks)
        return len({host.name for host in used}) > 1 and not all_local(used)
    return slurm.node_count() > 1


def _used(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """Return the hosts that get ranks, if each host is filled before the next."""
    slots_before = itertools.accumulate((host.slots for host in hosts), initial=0)
    return [host for host, before in zip(hosts, slots_before, strict=False) if before < ranks]


def _rows(scheduler: Scheduler, options: Options, size: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure one size: each contender warms up, then the rounds follow."""
    work = {"bytes": size, "dtype": options.dtype}
    repeats, seconds, right = dict[str, int](), dict[str, list[float]](), dict[str, bool]()
    progress(f"{sizes.format_size(size)}: warming up")
    for contender in scheduler.present:
        if contender.settings.get("piece", 0) >= size:
            continue
        answers = scheduler.ask(contender, {**work, "seed": 0, "repeat": 20 if size < SMALL_BYTES else 1})
        if answers is not None:
            repeats[contender.name] = _repeats(_slowest(answers))

    def request(contender: Contender, number: int) -> dict[str, Any] | None:
        count = repeats.get(contender.name)
        return {**work, "seed": 1 + number, "repeat": count} if count else None

    for number, contender, answers in scheduler.rounds(request, options.rounds):
        name = contender.name
        progress(f"{sizes.format_size(size)}: round {number + 1} of {options.rounds}, {name}")
        seconds.setdefault(name, []).append(_slowest(answers))
        right[name] = right.get(name, True) and all(answer["right"] for answer in answers)
    return [
        Row({"bytes": size}, name, _values(size, options.ranks, name, times), right[name])
        for name, times in seconds.items()
    ]


def _repeats(seconds: float) -> int:
    return int(min(max(TURN_SECONDS / max(seconds, 1e-9), MIN_REPEATS), MAX_REPEATS))


def _slowest(answers: Answers) -> float:
    return max(answer["seconds"] for answer in answers)


def _values(size: int, ranks: int, name: str, seconds: Sequence[float]) -> dict[str, Spread]:
    # Bytes that each rank must send and receive in a ring; a copy moves the array once.
    moved = size if name in LIMITS else 2 * (ranks - 1) / ranks * size
    return {
        "latency_us": Spread.of([1e6 * time for time in seconds]),
        "algorithm_gb_s": Spread.of([size / time / 1e9 for time in seconds]),
        "bus_gb_s": Spread.of([moved / time / 1e9 for time in seconds]),
    }
