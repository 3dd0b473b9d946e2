"""`hvdtrain bench allreduce`: what a sum over ranks costs with each engine and with whatever else sums."""

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
from hvdtrain.bench.scheduler import Answers, Field
from hvdtrain.launch.hosts import Host, LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm

WORK = "hvdtrain.bench.work."

SECONDS = 0.2  # what one contender's round shall take
MOST, FEWEST = 5000, 2  # sums a round
SMALL = 1 << 20  # below this many bytes a first sum says little about the next
MIB = 1 << 20
COPIES = 4  # arrays that a rank holds at a time: in, out, and what a framework makes of them

# Open MPI's ring in segments that stay in the cache (coll_tuned, algorithm 5).
_RING = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "5",
    "OMPI_MCA_coll_tuned_allreduce_algorithm_segmentsize": "262144",
    "OMPI_MCA_btl_sm_eager_limit": "32768",
}

# Who has no sum of which dtype.
_LACKING = {
    "float16": (f"{WORK}mpi_allreduce", "MPI has no sum of float16"),
    "bfloat16": (f"{WORK}mpi_allreduce", "MPI has no sum of bfloat16"),
}


@dataclass(frozen=True)
class Options:
    """What was asked of `hvdtrain bench allreduce`.

    Args:
        num_proc: How many ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        sizes: Sizes in bytes: "4K:256M", "64K,16M".
        dtype: What is summed.
        rounds: How often each contender's turn comes, for each size.
        engines: Which engines of hvdtrain take part.
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
        """How many ranks sum."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))

    @property
    def bytes(self) -> list[int]:
        """The sizes of the arrays, in bytes."""
        return sizes.parse(self.sizes)


def allreduce(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measures, and shows, prints or writes what was found.

    Args:
        options: What was asked for.
        as_json: Whether to print JSON in place of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if a sum was wrong or an engine of hvdtrain failed; 2 if nothing could be measured; 128 plus the
        number of a signal that ended it.
    """
    return run(lambda say: measure(options, say), allreduce_table.render, as_json, save)


def measure(options: Options, say: Callable[[str], None]) -> Report:
    """Lets all contenders sum arrays of all sizes, by turns.

    Args:
        options: What was asked for.
        say: Takes a line of progress.

    Returns:
        The report; `values` are `latency_us`, `algorithm_gb_s` and `bus_gb_s`.

    Raises:
        LaunchError: If what was asked for cannot be measured here.
    """
    check(options)
    asked = list(contenders(options))
    lacking = {each.name: why for each in asked if (why := _lacking(each, options.dtype))}
    with Field(
        [each for each in asked if each.name not in lacking], options.ranks, options.hosts, say
    ) as field:
        rows = [row for size in options.bytes for row in _rows(field, options, size, say)]
        described = machine.describe(field)
    return Report("allreduce", options.ranks, described, asdict(options), rows, {**lacking, **field.left_out})


def contenders(options: Options) -> Iterator[Contender]:
    """Lists everything that sums over ranks, and what bounds it."""
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
    for name in (COPY, ADD):
        yield Contender(name, f"{WORK}one_core", {"what": name.removeprefix("one core ")}, ranks=1)
    if _several_hosts(options):
        yield Contender(LINK, f"{WORK}mpi_link", stock=True)


def check(options: Options) -> None:
    """Refuses what cannot be measured, before anything is started.

    Raises:
        LaunchError: If something is wrong; the message says what to type.
    """
    if options.ranks < 2:
        raise LaunchError(
            f"-np {options.ranks} leaves nothing to sum over; bench allreduce wants 2 ranks or more."
        )
    if options.rounds < 1:
        raise LaunchError(f"--rounds {options.rounds} measures nothing; it must be 1 or more.")
    if not set(options.engines) <= {"mpi", "horovod"}:
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    try:
        wanted = options.bytes
    except ValueError as error:
        raise LaunchError(str(error)) from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = -(-options.ranks // slurm.node_count())  # ranks of this host
    if not options.hosts and COPIES * max(wanted) * here > memory:
        raise LaunchError(
            f"--sizes: {here} ranks need {COPIES} arrays of {sizes.shown(max(wanted))} each, and this "
            f"host has {memory / 2**30:.0f} GiB of memory; type smaller sizes."
        )
    width = 2 if options.dtype == "bfloat16" else np.dtype(options.dtype).itemsize
    odd = [size for size in wanted if size % width]
    if odd:
        raise LaunchError(
            f"--sizes: {odd[0]} bytes are no whole number of {options.dtype}; expected multiples of {width}."
        )


def _raw_mpi() -> Iterator[Contender]:
    """MPI called from Python with its default settings, and the other ways of calling it."""
    yield Contender(RAW, f"{WORK}mpi_allreduce", stock=True)
    for mib in (1, 4, 16):
        yield Contender(f"MPI, {mib} MiB pieces", f"{WORK}mpi_allreduce", {"piece": mib * MIB}, stock=True)
    launcher = mpirun.find()
    if launcher and launcher.mpi.name.startswith("Open MPI"):
        yield Contender("MPI, segmented ring", f"{WORK}mpi_allreduce", environ=_RING, stock=True)


def _lacking(contender: Contender, dtype: str) -> str:
    module, why = _LACKING.get(dtype, ("", ""))
    if contender.module == module:
        return why
    if dtype == "bfloat16" and contender.module.endswith(("horovod_allreduce", "gloo_allreduce")):
        return f"it does not take {dtype} from NumPy"
    return ""


def _several_hosts(options: Options) -> bool:
    if options.hosts:
        used = _filled(read_hosts(options.hosts, None, options.ranks), options.ranks)
        return len({host.name for host in used}) > 1 and not all_local(used)
    return slurm.node_count() > 1


def _filled(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """Returns the hosts that get ranks, where each is filled before the next."""
    before = itertools.accumulate((host.slots for host in hosts), initial=0)
    return [host for host, taken in zip(hosts, before, strict=False) if taken < ranks]


def _rows(field: Field, options: Options, size: int, say: Callable[[str], None]) -> list[Row]:
    """Measures one size: each contender warms up, then the rounds."""
    work = {"bytes": size, "dtype": options.dtype}
    repeat, seconds, right = dict[str, int](), dict[str, list[float]](), dict[str, bool]()
    say(f"{sizes.shown(size)}: warming up")
    for contender in field.present:
        if contender.settings.get("piece", 0) >= size:
            continue
        answers = field.ask(contender, {**work, "seed": 0, "repeat": 20 if size < SMALL else 1})
        if answers is not None:
            repeat[contender.name] = _repeat(_slowest(answers))

    def request(contender: Contender, number: int) -> dict[str, Any] | None:
        times = repeat.get(contender.name)
        return {**work, "seed": 1 + number, "repeat": times} if times else None

    for number, contender, answers in field.rounds(request, options.rounds):
        say(f"{sizes.shown(size)}: round {number + 1} of {options.rounds}, {contender.name}")
        seconds.setdefault(contender.name, []).append(_slowest(answers))
        right[contender.name] = right.get(contender.name, True) and all(each["right"] for each in answers)
    return [
        Row({"bytes": size}, name, _values(size, options.ranks, name, times), right[name])
        for name, times in seconds.items()
    ]


def _repeat(seconds: float) -> int:
    return int(min(max(SECONDS / max(seconds, 1e-9), FEWEST), MOST))


def _slowest(answers: Answers) -> float:
    return max(each["seconds"] for each in answers)


def _values(size: int, ranks: int, name: str, seconds: Sequence[float]) -> dict[str, Spread]:
    # What crosses a bus a rank in a ring; a copy crosses it once.
    moved = size if name in LIMITS else 2 * (ranks - 1) / ranks * size
    return {
        "latency_us": Spread.of([1e6 * each for each in seconds]),
        "algorithm_gb_s": Spread.of([size / each / 1e9 for each in seconds]),
        "bus_gb_s": Spread.of([moved / each / 1e9 for each in seconds]),
    }
