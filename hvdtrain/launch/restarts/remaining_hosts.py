"""Where a restart finds the hosts that are left, and how many ranks they take."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hvdtrain.launch.hosts import Host, LaunchError, all_local
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.run_options import RunOptions
from hvdtrain.launch.run_program import ask
from hvdtrain.launch.start_plan import find_hosts, in_allocation

PATIENCE = 30.0  # seconds for a host to start a program that does nothing


@dataclass(frozen=True)
class World:
    """The ranks of a start.

    Args:
        ranks: How many.
        left: On which hosts; empty if on all that were asked for.
        note: What there is to say about hosts that are lost.
    """

    ranks: int
    left: tuple[Host, ...] = ()
    note: str = ""


def world(options: RunOptions, environ: Mapping[str, str]) -> World:
    """Ask every host to start something, as the ranks will be started, and counts on those that do.

    A host that is back takes part again. Where those that are left take fewer ranks than `--min-np` allows, all are
    tried, since one that is starting up may be back by then.
    """
    whole = World(options.ranks)
    hosts = _hosts(options, environ)
    if all_local(hosts):
        return whole
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda host: _answers(host, options, environ), hosts))
    left = tuple(host for host, answer in zip(hosts, answers, strict=True) if answer)
    if len(left) == len(hosts):
        return whole
    lost = ", ".join(host.name for host, answer in zip(hosts, answers, strict=True) if not answer)
    fewest = options.min_np or options.ranks
    ranks = min(options.ranks, sum(host.slots for host in left))
    if ranks < fewest:
        few = f"the other hosts take {ranks} ranks, fewer than {fewest} (--min-np)"
        return World(options.ranks, note=f"no answer from {lost}; {few}, so all are tried")
    return World(ranks, left, f"no answer from {lost}")


def _hosts(options: RunOptions, environ: Mapping[str, str]) -> tuple[Host, ...]:
    if in_allocation(options, environ):
        return slurm.nodes(environ)
    return find_hosts(options, environ)


def _answers(host: Host, options: RunOptions, environ: Mapping[str, str]) -> bool:
    """Return whether a host can start a program."""
    try:
        return ask([*_starter(host, options, environ), "true"], environ, PATIENCE).returncode == 0
    except LaunchError:
        return False


def _starter(host: Host, options: RunOptions, environ: Mapping[str, str]) -> list[str]:
    if in_allocation(options, environ):
        return ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap"]
    found = mpirun.find(environ)
    return found.command(1, [Host(host.name, 1)], ()) if found else []
