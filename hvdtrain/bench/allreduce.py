"""Measure allreduce with each engine, plain MPI, stock Horovod and torch (`hvdtrain bench allreduce`)."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hvdtrain.bench import output, sizes, tables
from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.report import Report, Row, Spread, describe_machine
from hvdtrain.bench.scheduler import ENGINES, Progress, RankOptions, Scheduler, check_engines, seconds_of
from hvdtrain.bench.tables import ADD, COPY, LIMITS, LINK, OURS, RAW, VARIANT
from hvdtrain.launch.hosts import LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm

WORK = "hvdtrain.bench.allreduce_workers:"

TURN_SECONDS = 0.2  # aimed duration of one contender's turn
REPEATS = (2, 5000)  # allreduces in one turn
SMALL_BYTES = 1 << 20
COPIES = 4  # arrays that a rank holds at the same time: input, output, and copies of the framework

# Open MPI's ring (coll_tuned, algorithm 5) in segments that fit into the cache.
_RING = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "5",
    "OMPI_MCA_coll_tuned_allreduce_algorithm_segmentsize": "262144",
    "OMPI_MCA_btl_sm_eager_limit": "32768",
}


@dataclass(frozen=True)
class Options(RankOptions):
    """Options of `hvdtrain bench allreduce`."""

    sizes: str = "4K:256M"  # in bytes; see `sizes.parse`
    dtype: str = "float32"
    rounds: int = 5  # number of turns of each contender, for each size
    engines: tuple[str, ...] = ENGINES  # of hvdtrain
    peers: bool = True  # stock Horovod and torch.distributed take part


def allreduce(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measure, and show, print or write the report; `output.run` describes the arguments and the exit code."""
    return output.run(lambda progress: measure(options, progress), tables.render_allreduce, as_json, save)


def measure(options: Options, progress: Progress) -> Report:
    """Let all contenders reduce arrays of all sizes, one contender at a time.

    The `values` of the report are `latency_us`, `algorithm_gb_s` and `bus_gb_s`.
    """
    array_sizes = check(options)
    left_out, supported = dict[str, str](), list[Contender]()
    for contender in contenders(options):
        reason = _unsupported(contender, options.dtype)
        if reason:
            left_out[contender.name] = reason
        else:
            supported.append(contender)
    with Scheduler(supported, options.ranks, options.hosts, progress) as scheduler:
        rows = [row for size in array_sizes for row in _rows(scheduler, options, size)]
        machine = describe_machine(scheduler.hosts, scheduler.pinned)
    left_out |= scheduler.left_out
    return Report("allreduce", options.ranks, machine, asdict(options), rows, left_out)


def contenders(options: Options) -> Iterator[Contender]:
    """Yield all ways of reducing an array over ranks, and the limits of the machine."""
    for engine in options.engines:
        environ = {"HVDTRAIN_ENGINE": engine}
        if engine == "mpi":
            yield Contender(OURS, f"{WORK}engine", environ=environ)
        needs = ("horovod", "tensorflow") if engine == "horovod" else ("tensorflow",)
        yield Contender(f"hvdtrain {engine}, graph", f"{WORK}engine_in_graph", environ=environ, needs=needs)
    yield Contender(RAW, f"{WORK}mpi", stock=True)
    for mib in (1, 4, 16):
        yield Contender(f"{VARIANT}{mib} MiB pieces", f"{WORK}mpi", {"piece": mib << 20}, stock=True)
    launcher = mpirun.find()
    if launcher and launcher.mpi.name.startswith("Open MPI"):
        yield Contender(f"{VARIANT}segmented ring", f"{WORK}mpi", environ=_RING, stock=True)
    if options.peers:
        yield Contender("stock Horovod", f"{WORK}horovod", needs=("horovod", "tensorflow"), stock=True)
        yield Contender("torch Gloo", f"{WORK}gloo", needs=("torch",))
    for name, operation in ((COPY, "copy"), (ADD, "add")):
        yield Contender(name, f"{WORK}one_core", {"operation": operation}, ranks=1)
    if _several_hosts(options):
        yield Contender(LINK, f"{WORK}link", stock=True)


def check(options: Options) -> list[int]:
    """Return the sizes of the arrays in bytes; raise a LaunchError if an option cannot be measured."""
    if options.ranks < 2:
        raise LaunchError(f"-np {options.ranks}: bench allreduce needs 2 ranks or more.")
    if options.rounds < 1:
        raise LaunchError(f"--rounds {options.rounds} measures nothing; it must be 1 or more.")
    check_engines(options.engines)
    try:
        array_sizes = sizes.parse(options.sizes)
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
    return array_sizes


def _unsupported(contender: Contender, dtype: str) -> str:
    """Return why a contender cannot reduce a dtype; an empty string if it can."""
    if dtype in ("float16", "bfloat16") and contender.work == f"{WORK}mpi":
        return f"MPI has no sum of {dtype}"
    if dtype == "bfloat16" and contender.work in (f"{WORK}horovod", f"{WORK}gloo"):
        return f"it does not take {dtype} from NumPy"
    return ""


def _several_hosts(options: Options) -> bool:
    if options.hosts:
        hosts = read_hosts(options.hosts, None, options.ranks)
        # Each host is filled before the next.
        slots_before = itertools.accumulate((host.slots for host in hosts), initial=0)
        used = [host for host, before in zip(hosts, slots_before, strict=False) if before < options.ranks]
        return len({host.name for host in used}) > 1 and not all_local(used)
    return slurm.node_count() > 1


def _rows(scheduler: Scheduler[Contender], options: Options, size: int) -> Iterator[Row]:
    title = sizes.format_size(size)

    def work(contender: Contender) -> dict[str, Any] | None:
        if contender.settings.get("piece", 0) >= size:
            return None
        # The first allreduce of a small array alone says little about the next.
        return {"bytes": size, "dtype": options.dtype, "repeat": 20 if size < SMALL_BYTES else 1}

    measured = scheduler.measure({title: work}, TURN_SECONDS, REPEATS, options.rounds)[title]
    for name, turns in measured.items():
        seconds = [max(seconds_of(answers)) for answers in turns]
        right = all(answer["right"] for answers in turns for answer in answers)
        yield Row({"bytes": size}, name, _values(size, options.ranks, name, seconds), right)


def _values(size: int, ranks: int, name: str, seconds: Sequence[float]) -> dict[str, Spread]:
    # Bytes that each rank must send and receive in a ring; a copy moves the array once.
    moved = size if name in LIMITS else 2 * (ranks - 1) / ranks * size
    return {
        "latency_us": Spread.of([1e6 * time for time in seconds]),
        "algorithm_gb_s": Spread.of([size / time / 1e9 for time in seconds]),
        "bus_gb_s": Spread.of([moved / time / 1e9 for time in seconds]),
    }
