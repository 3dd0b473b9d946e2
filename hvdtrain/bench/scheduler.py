"""Start all contenders of a benchmark and let one of them run at a time."""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, final

from hvdtrain import cores
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.contender_job import ContenderJob, FailedError
from hvdtrain.launch.hosts import Host, LaunchError, addresses_towards, all_local, read_hosts
from hvdtrain.launch.launchers import slurm

ANSWER_SECONDS = 120.0  # limit for one answer
OTHER_FILES = 200  # files that this process opens beside its connections to ranks
FAILED = "failed: "  # prefix of the reason why a contender is left out that is installed

Answers = list[dict[str, Any]]


@final
class Scheduler:
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
        LaunchError: If the hosts do not exist or have too few slots, or this process may not open enough files.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        ranks: int,
        hosts: str | None = None,
        progress: Callable[[str], None] = lambda line: None,
        limit: float = ANSWER_SECONDS,
    ) -> None:
        named = read_hosts(hosts, None, ranks)
        _allow_open_files(sum(contender.ranks or ranks for contender in contenders))
        self._addresses = _addresses(named)
        self._contenders, self._ranks, self._hosts = list(contenders), ranks, hosts
        self._progress, self._limit = progress, limit
        self._jobs: dict[str, ContenderJob] = {}
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> "Scheduler":
        """Start one contender after the other."""
        try:
            for contender in self._contenders:
                self._start(contender)
        except BaseException:
            self.close(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all jobs."""
        self.close(at_once=error is not None)

    @property
    def present(self) -> list[Contender]:
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
        """Let one contender run for one request to all its ranks.

        Args:
            contender: The contender.
            request: The request to each of its workers.

        Returns:
            The answers by rank, or None if the contender has failed, now or before; `left_out` holds the reason.
        """
        job = self._jobs.get(contender.name)
        if job is None:
            return None
        try:
            return job.ask(request)
        except FailedError as error:
            self._leave_out(job, error)
            return None

    def rounds(
        self, request: Callable[[Contender, int], dict[str, Any] | None], count: int
    ) -> Iterator[tuple[int, Contender, Answers]]:
        """Ask all contenders, round after round; each round starts with another contender.

        Args:
            request: Returns the request to a contender in a round; None to skip it in that round.
            count: Number of rounds.

        Yields:
            The round, the contender and its answers by rank.
        """
        for number in range(count):
            for contender in self.in_turn(number):
                message = request(contender, number)
                answers = self.ask(contender, message) if message is not None else None
                if answers is not None:
                    yield number, contender, answers

    def in_turn(self, number: int) -> list[Contender]:
        """Return the contenders in their order in a round, of which each starts with another one."""
        present = self.present
        first = number % max(len(present), 1)
        return present[first:] + present[:first]

    def close(self, at_once: bool = False) -> None:
        """End all jobs.

        Args:
            at_once: Whether to kill the workers instead of letting them end by themselves.
        """
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.request_end(at_once)
        for job in jobs.values():
            job.close(at_once)

    def _start(self, contender: Contender) -> None:
        missing = contender.missing()
        if missing:
            self.left_out[contender.name] = missing
            return
        self._progress(f"starting {contender.name}")
        ranks = contender.ranks or self._ranks
        job = ContenderJob(contender, ranks, self._hosts, self._bind(ranks), self._addresses, self._limit)
        self._jobs[contender.name] = job
        try:
            job.start()
        except FailedError as error:
            self._leave_out(job, error)

    def _bind(self, ranks: int) -> str:
        """Return the binding: one core a rank, or none if this host has fewer cores than ranks."""
        return "core" if self._addresses or ranks <= len(cores.physical()) else "none"

    def _leave_out(self, job: ContenderJob, error: FailedError) -> None:
        self.left_out[job.contender.name] = f"{FAILED}{error}"
        self._progress(f"{job.contender.name} is left out: {error}")
        del self._jobs[job.contender.name]
        job.close(at_once=True)


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
