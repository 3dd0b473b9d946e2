"""Start all contenders of a benchmark and let one of them run at a time."""

import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from hvdtrain import cores
from hvdtrain.bench.contender_job import Contender, ContenderJob, FailedError
from hvdtrain.launch.hosts import Host, LaunchError, addresses_towards, all_local, read_hosts
from hvdtrain.launch.launchers import slurm

ENGINES = ("mpi", "horovod")
ANSWER_SECONDS = 120.0  # limit for one answer
MIN_REPEATS = 2  # of the work in a turn
OTHER_FILES = 200  # files that this process opens beside its connections to ranks
FAILED = "failed: "  # prefix of the reason why a contender is left out that is installed

Progress = Callable[[str], None]  # called with a line about the current state
Answers = list[dict[str, Any]]
AnyContender = TypeVar("AnyContender", bound=Contender)
Work = Callable[[AnyContender], dict[str, Any] | None]  # returns the request to a contender


@dataclass(frozen=True)
class RankOptions:
    """Options of each command that starts contenders."""

    num_proc: int | None = None  # number of ranks; all tasks of the Slurm job, or 2, if not given
    hosts: str | None = None  # hosts and their slots, as for `hvdtrain run`

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))


def check_engines(engines: Sequence[str]) -> None:
    """Raise a LaunchError unless each engine is one that connects ranks."""
    if not engines or not set(engines) <= set(ENGINES):
        raise LaunchError(f"--engines {','.join(engines)}: expected mpi, horovod or mpi,horovod.")


@final
class Scheduler(Generic[AnyContender]):
    """Measures all contenders under the same conditions: own processes, bound to cores alike, one at a time.

    All processes are stopped (SIGSTOP) until their contender is asked, because threads of a library may use the CPU
    even when idle. A contender that cannot start or that fails is left out, and the others continue.

    Args:
        contenders: The contenders, with unique names.
        ranks: Number of ranks of each contender that does not set its own.
        hosts: Hosts and their slots, "a:1,b:1"; this host if not given.
        progress: Is called with a line about the current state.
        limit: Seconds that a contender may take to answer.

    Raises:
        LaunchError: If the hosts cannot take the ranks, or this process may not open enough files.
    """

    def __init__(
        self,
        contenders: Sequence[AnyContender],
        ranks: int,
        hosts: str | None = None,
        progress: Progress = lambda line: None,
        limit: float = ANSWER_SECONDS,
    ) -> None:
        named = read_hosts(hosts, None, ranks)
        _allow_open_files(sum(contender.ranks or ranks for contender in contenders))
        self._addresses = _addresses(named)
        self._contenders, self._ranks, self._hosts = list(contenders), ranks, hosts
        self._progress, self._limit = progress, limit
        self._jobs: dict[str, ContenderJob] = {}
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> "Scheduler[AnyContender]":
        """Start one contender after the other."""
        try:
            for contender in self._contenders:
                self._start(contender)
        except BaseException:
            self._close(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all jobs."""
        self._close(at_once=error is not None)

    @property
    def present(self) -> list[AnyContender]:
        """The contenders that have started and not failed, in the order given."""
        return [contender for contender in self._contenders if contender.name in self._jobs]

    @property
    def pinned(self) -> bool:
        """Whether no two ranks of a contender may run on the same core."""
        return all(_disjoint(job.rank_infos) for job in self._jobs.values())

    @property
    def hosts(self) -> list[str]:
        """The hosts of the ranks."""
        return sorted({info["host"] for job in self._jobs.values() for info in job.rank_infos})

    def ask(self, contender: Contender, request: dict[str, Any]) -> Answers | None:
        """Send one request to the ranks of a contender, and return their answers; None if it has failed or does."""
        job = self._jobs.get(contender.name)
        if job is None:
            return None
        try:
            return job.ask(request)
        except FailedError as error:
            self._leave_out(contender, error)
            return None

    def measure(
        self, works: Mapping[str, Work[AnyContender]], seconds: float, repeats: tuple[int, int], rounds: int
    ) -> dict[str, dict[str, list[Answers]]]:
        """Let the contenders work in turns, round after round; each round starts with another contender.

        Args:
            works: For each kind of work a function that returns the request to a contender; None to skip it. A
                `seed`, another one in each round, and the number of repetitions, `repeat`, are added. The number
                that it contains already is used in a first turn, which is not counted.
            seconds: Aimed duration of a turn.
            repeats: Minimum and maximum number of repetitions in a turn.
            rounds: Number of rounds.

        Returns:
            The answers by rank, in the order of the rounds, by kind of work and contender.
        """
        counts = {title: self._warm_up(title, work, seconds, repeats) for title, work in works.items()}
        found: dict[str, dict[str, list[Answers]]] = {title: {} for title in works}
        for number in range(rounds):
            for title, work in works.items():
                for contender in self._in_turn(number):
                    name, request = contender.name, work(contender)
                    if request is None:
                        continue
                    self._progress(f"{title}: round {number + 1} of {rounds}, {name}")
                    request |= {"seed": number + 1, "repeat": counts[title][name]}
                    answers = self.ask(contender, request)
                    if answers is not None:
                        found[title].setdefault(name, []).append(answers)
        return found

    def _warm_up(
        self, title: str, work: Work[AnyContender], seconds: float, repeats: tuple[int, int]
    ) -> dict[str, int]:
        """Give each contender a turn that is not counted, and return how often it repeats its work in a turn."""
        counts = {}
        for contender in self.present:
            request = work(contender)
            if request is None:
                continue
            self._progress(f"{title}: {contender.name} warms up")
            answers = self.ask(contender, {"repeat": MIN_REPEATS, **request, "seed": 0})
            if answers is not None:
                fitting = int(seconds / max([*seconds_of(answers), 1e-9]))
                counts[contender.name] = min(max(fitting, repeats[0]), repeats[1])
        return counts

    def _in_turn(self, number: int) -> list[AnyContender]:
        """Return the contenders in their order in a round, of which each starts with another one."""
        present = self.present
        first = number % max(len(present), 1)
        return present[first:] + present[:first]

    def _start(self, contender: AnyContender) -> None:
        missing = contender.missing()
        if missing:
            self.left_out[contender.name] = missing
            return
        self._progress(f"starting {contender.name}")
        ranks = contender.ranks or self._ranks
        # One core a rank, or none if this host has fewer cores than ranks.
        bind = "core" if self._addresses or ranks <= len(cores.physical()) else "none"
        job = ContenderJob(contender, ranks, self._hosts, bind, self._addresses, self._limit)
        self._jobs[contender.name] = job
        try:
            job.start()
        except FailedError as error:
            self._leave_out(contender, error)

    def _leave_out(self, contender: Contender, error: FailedError) -> None:
        self.left_out[contender.name] = f"{FAILED}{error}"
        self._progress(f"{contender.name} is left out: {error}")
        self._jobs.pop(contender.name).close(at_once=True)

    def _close(self, at_once: bool) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.request_end(at_once)
        for job in jobs.values():
            job.close(at_once)


def seconds_of(answers: Answers) -> list[float]:
    """Return the seconds of one repetition on each rank that had a turn."""
    return [answer["seconds"] for answer in answers if "seconds" in answer]


def _addresses(hosts: Sequence[Host]) -> list[str]:
    """Return names of this host for ranks on other hosts; none if all ranks are on this host."""
    if not hosts and slurm.in_allocation(os.environ):
        return addresses_towards(slurm.first_hosts(os.environ))
    return [] if all_local(hosts) else addresses_towards([host.name for host in hosts])


def _allow_open_files(ranks: int) -> None:
    """Raise the limit of open files, so that this process can keep a connection to each rank of each contender."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = ranks + OTHER_FILES
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LaunchError(
            f"{ranks} ranks of all contenders together need {needed} open files, and this process may open {hard} "
            "(`ulimit -Hn`): measure with fewer ranks, or with --no-peers and --engines mpi."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _disjoint(rank_infos: Sequence[dict[str, Any]]) -> bool:
    cores = [(info["host"], cpu) for info in rank_infos for cpu in info["cpus"]]
    return len(set(cores)) == len(cores)
