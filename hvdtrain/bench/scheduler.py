"""All contenders of a measurement: each is at work only while all others stand still."""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, final

from hvdtrain.bench.contender import Contender
from hvdtrain.bench.contender_job import Crew, FailedError
from hvdtrain.launch.hosts import Host, LaunchError, addresses_towards, all_local, read_hosts
from hvdtrain.launch.launchers import binding, slurm

LIMIT = 120.0  # seconds for one answer
SPARE = 200  # files that this process opens beside its lines to ranks
FAILED = "failed: "  # opens the reason why somebody is left out who was there

Answers = list[dict[str, Any]]


@final
class Field:
    """Measures contenders alike: processes of their own, pinned alike, at work by turns.

    What was started is stopped (SIGSTOP) until it is asked, because a library's threads may turn even when idle.
    One that cannot start or fails is left out, and the others go on.

    Args:
        contenders: Who takes part; names are unique.
        ranks: How many ranks each has that does not say otherwise.
        hosts: Hosts and their slots, "a:1,b:1"; this host if not given.
        say: Takes a line of progress.
        limit: How many seconds a contender may take to answer.

    Raises:
        LaunchError: If the hosts are not there or have too few slots, or this process may not open enough files.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        ranks: int,
        hosts: str | None = None,
        say: Callable[[str], None] = lambda line: None,
        limit: float = LIMIT,
    ) -> None:
        named = read_hosts(hosts, None, ranks)
        _make_room(sum(each.ranks or ranks for each in contenders))
        self._addresses = _addresses(named)
        self._asked, self._ranks, self._hosts = list(contenders), ranks, hosts
        self._say, self._limit = say, limit
        self._crews: dict[str, Crew] = {}
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> "Field":
        """Starts one contender after the other."""
        try:
            for contender in self._asked:
                self._start(contender)
        except BaseException:
            self.close(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all that was started."""
        self.close(at_once=error is not None)

    @property
    def present(self) -> list[Contender]:
        """Those who started and have not failed, in the order given."""
        return [each for each in self._asked if each.name in self._crews]

    @property
    def pinned(self) -> bool:
        """Whether every rank has cores that no other rank of its contender has."""
        return all(_disjoint(crew.hellos) for crew in self._crews.values())

    @property
    def hosts(self) -> list[str]:
        """On which hosts the ranks are."""
        return sorted({hello["host"] for crew in self._crews.values() for hello in crew.hellos})

    def ask(self, contender: Contender, request: dict[str, Any]) -> Answers | None:
        """Gives one contender the floor, for one request to all its ranks.

        Args:
            contender: Whom to ask.
            request: What each of its workers is asked.

        Returns:
            The answers by rank, or None where it has failed, now or before; `left_out` then says why.
        """
        crew = self._crews.get(contender.name)
        if crew is None:
            return None
        try:
            return crew.ask(request)
        except FailedError as error:
            self._leave_out(crew, error)
            return None

    def rounds(
        self, request: Callable[[Contender, int], dict[str, Any] | None], count: int
    ) -> Iterator[tuple[int, Contender, Answers]]:
        """Asks all contenders in turn, round after round; who is first changes with each.

        Args:
            request: Says what a contender is asked in a round; None leaves it out of that round.
            count: How many rounds.

        Yields:
            The round, the contender and its answers by rank.
        """
        for number in range(count):
            present = self.present
            first = number % max(len(present), 1)
            for contender in present[first:] + present[:first]:
                asked = request(contender, number)
                answers = self.ask(contender, asked) if asked is not None else None
                if answers is not None:
                    yield number, contender, answers

    def close(self, at_once: bool = False) -> None:
        """Ends all that was started.

        Args:
            at_once: Whether to do so without the workers' help.
        """
        crews, self._crews = self._crews, {}
        for crew in crews.values():
            crew.leave(at_once)
        for crew in crews.values():
            crew.close(at_once)

    def _start(self, contender: Contender) -> None:
        missing = contender.missing()
        if missing:
            self.left_out[contender.name] = missing
            return
        self._say(f"starting {contender.name}")
        ranks = contender.ranks or self._ranks
        crew = Crew(contender, ranks, self._hosts, self._bind(ranks), self._addresses, self._limit)
        self._crews[contender.name] = crew
        try:
            crew.start()
        except FailedError as error:
            self._leave_out(crew, error)

    def _bind(self, ranks: int) -> str:
        """One core a rank; where this host has fewer, ranks roam."""
        return "core" if self._addresses or ranks <= len(binding.cores()) else "none"

    def _leave_out(self, crew: Crew, error: FailedError) -> None:
        self.left_out[crew.contender.name] = f"{FAILED}{error}"
        self._say(f"{crew.contender.name} is left out: {error}")
        del self._crews[crew.contender.name]
        crew.close(at_once=True)


def _addresses(named: Sequence[Host]) -> list[str]:
    """Lists names of this host for ranks on others; none where all ranks are here."""
    if not named and slurm.in_allocation(os.environ):
        return addresses_towards(slurm.first_hosts(os.environ))
    return [] if all_local(named) else addresses_towards([host.name for host in named])


def _make_room(lines: int) -> None:
    """Lets this process keep a line open to each rank of each contender."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = lines + SPARE
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LaunchError(
            f"{lines} ranks of all contenders together need {needed} open files, and this process may open {hard} "
            "(`ulimit -Hn`): measure with fewer ranks, or with --no-peers and --engines mpi."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _disjoint(hellos: Sequence[dict[str, Any]]) -> bool:
    taken = [(hello["host"], cpu) for hello in hellos for cpu in hello["cpus"]]
    return len(set(taken)) == len(taken)
