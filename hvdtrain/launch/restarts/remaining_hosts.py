"""Find the hosts that still answer before a restart, and how many ranks they can take."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hvdtrain.launch.hosts import Host, LaunchError, all_local
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.run_options import RunOptions
from hvdtrain.launch.run_program import ask
from hvdtrain.launch.start_plan import find_hosts, in_allocation

TIMEOUT = 30.0  # seconds for a host to start a program that does nothing


@dataclass(frozen=True)
class RemainingHosts:
    """The hosts of a restart.

    Args:
        ranks: The number of ranks to start.
        left: The hosts to start them on; empty for all requested hosts.
        note: A message about hosts that do not answer; may be empty.
    """

    ranks: int
    left: tuple[Host, ...] = ()
    note: str = ""


def find_remaining(options: RunOptions, environ: Mapping[str, str]) -> RemainingHosts:
    """Start a trivial program on every host, in the way the ranks are started, and return the hosts that can.

    A lost host that answers again is used again. If the remaining hosts take fewer ranks than `--min-np`, all hosts
    are returned, because a lost host may be rebooting and answer by the time the ranks start.
    """
    all_hosts = RemainingHosts(options.ranks)
    hosts = _hosts(options, environ)
    if all_local(hosts):
        return all_hosts
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda host: _answers(host, options, environ), hosts))
    left = tuple(host for host, answer in zip(hosts, answers, strict=True) if answer)
    if len(left) == len(hosts):
        return all_hosts
    lost = ", ".join(host.name for host, answer in zip(hosts, answers, strict=True) if not answer)
    fewest = options.min_np or options.ranks
    ranks = min(options.ranks, sum(host.slots for host in left))
    if ranks < fewest:
        few = f"the other hosts have slots for {ranks} ranks, fewer than {fewest} (--min-np)"
        return RemainingHosts(options.ranks, note=f"no answer from {lost}; {few}, so all are tried")
    return RemainingHosts(ranks, left, f"no answer from {lost}")


def _hosts(options: RunOptions, environ: Mapping[str, str]) -> tuple[Host, ...]:
    if in_allocation(options, environ):
        return slurm.nodes(environ)
    return find_hosts(options, environ)


def _answers(host: Host, options: RunOptions, environ: Mapping[str, str]) -> bool:
    """Return whether a host can start a program."""
    try:
        return ask([*_starter(host, options, environ), "true"], environ, TIMEOUT).returncode == 0
    except LaunchError:
        return False


def _starter(host: Host, options: RunOptions, environ: Mapping[str, str]) -> list[str]:
    if in_allocation(options, environ):
        return ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap"]
    found = mpirun.find(environ)
    return found.command(1, [Host(host.name, 1)], ()) if found else []
