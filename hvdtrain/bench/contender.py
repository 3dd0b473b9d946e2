"""Describe a contender of a benchmark as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

# The command that installs a module; modules that are not listed are installed with the peers.
_INSTALL = {
    "horovod": "hvdtrain build-horovod",
    "tensorflow": "pip install 'tensorflow-cpu>=2.16'",
    "keras": "pip install 'keras>=3.5'",
}
_PEERS = "pip install 'hvdtrain[peers]'"


@dataclass(frozen=True)
class Contender:
    """One way of doing the work, executed by its own ranks.

    Args:
        name: The name in tables; unique within its scheduler.
        module: The module with `prepare(settings) -> Callable[[dict], dict]`, which its workers import.
        settings: The argument of `prepare`; it must be serializable as JSON. The worker adds `rank`, `size` and
            `addresses`, one free `host:port` for each rank.
        environ: Environment variables of its workers; None removes a variable.
        needs: Modules that must be installed; otherwise the contender is left out.
        independent: Whether its workers are independent processes, without the variables of an MPI launcher.
        stock: Whether it runs with default settings, without those that `hvdtrain run` or the user sets to make
            MPI and Horovod faster.
        ranks: Its number of ranks; None for the number of the scheduler.
    """

    name: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str | None] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    independent: bool = False
    stock: bool = False
    ranks: int | None = None

    def missing(self) -> str:
        """Return which modules are not installed and what to type; an empty string if all are installed."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if not absent:
            return ""
        commands = dict.fromkeys(_INSTALL.get(name, _PEERS) for name in absent)
        return f"{' and '.join(absent)} not installed; type {' and '.join(commands)}"
