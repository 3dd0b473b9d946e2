"""Who takes part in a measurement, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

# What brings a module that is missing; all others come with the peers.
_INSTALL = {
    "horovod": "hvdtrain build-horovod",
    "tensorflow": "pip install 'tensorflow-cpu>=2.16'",
    "keras": "pip install 'keras>=3.5'",
}
_PEERS = "pip install 'hvdtrain[peers]'"


@dataclass(frozen=True)
class Contender:
    """One way of doing the work, run by ranks of its own.

    Args:
        name: What tables call it; unique in its field.
        module: The module with `prepare(settings) -> Callable[[dict], dict]`, which its workers import.
        settings: What `prepare` is given, as JSON can carry it. The worker adds `rank`, `size` and
            `addresses`, one free `host:port` a rank.
        environ: What its workers find in their environment; None takes a variable out.
        needs: Modules without which it is left out.
        alone: Whether its workers are independent processes that no launcher seems to have started.
        stock: Whether it runs as its makers ship it, without what `hvdtrain run` or the user tunes in MPI and
            Horovod.
        ranks: How many ranks it has; None for as many as its field.
    """

    name: str
    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str | None] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    alone: bool = False
    stock: bool = False
    ranks: int | None = None

    def missing(self) -> str:
        """Says what is not installed here and what to type; nothing where all is there."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if not absent:
            return ""
        lines = dict.fromkeys(_INSTALL.get(name, _PEERS) for name in absent)
        return f"{' and '.join(absent)} not installed; type {' and '.join(lines)}"
