"""State that can be committed, restored, and made the same on all ranks."""

import copy
import queue
from collections.abc import Callable, Iterable
from typing import Any

from hvdtrain.keras.elastic.events import HostsUpdatedInterrupt
from hvdtrain.keras.elastic.store import Snapshot, Store

_REMOVED = 1  # Horovod's HostUpdateResult: hosts only went away


class State:
    """What a training needs to go on from a commit; `save`, `restore` and `sync` are a subclass's own.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/elastic_include.html).

    Args:
        bcast_object: Returns rank 0's object on every rank, such as `hvd.broadcast_object`.
        get_rank: Returns this process's rank, such as `hvd.rank`.
    """

    def __init__(self, bcast_object: Callable[..., Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: queue.Queue[tuple[float, int]] = queue.Queue()
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: list[Callable[[], Any]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Add functions without arguments that are called whenever the training is about to be run again."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Prepare for another run: forgets messages, calls `reset` and then the registered functions."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Take note of a change of hosts, which `check_host_updates` turns into an interrupt.

        Args:
            timestamp: When; of several, those later than the last one seen count.
            update_res: 1 if hosts went, 2 if hosts came, 3 for both.
        """
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Make the present state the one that `restore`, and a restarted job, come back to.

        All ranks call it. It costs a copy of everything and, under `elastic.run`, writing it to disk.

        Raises:
            HostsUpdatedInterrupt: On every rank, if rank 0 was told of a change of hosts.
        """
        self.save()
        self._keep()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Ask rank 0 whether it was told of a change of hosts; all ranks call it.

        Raises:
            HostsUpdatedInterrupt: On every rank, if it was.
        """
        before = latest = self._last_updated_timestamp
        changes = 0
        while not self._host_messages.empty():
            timestamp, change = self._host_messages.get()
            if timestamp > latest:
                latest, changes = timestamp, changes | change
        before, latest, changes = self._bcast_object((before, latest, changes))
        self._last_updated_timestamp = latest
        if latest > before:
            raise HostsUpdatedInterrupt(changes == _REMOVED)

    def save(self) -> None:
        """Remember the present state, in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was last saved."""
        raise NotImplementedError

    def sync(self) -> None:
        """Give all ranks the state of rank 0, and saves it."""
        raise NotImplementedError

    def reset(self) -> None:
        """Do what a subclass needs before it is run again; here, nothing."""

    def _keep(self) -> None:
        """Write what was saved to disk, where a subclass can."""


class ObjectState(State):
    """State made of Python objects, each an attribute.

    Args:
        bcast_object: Returns rank 0's object on every rank.
        get_rank: Returns this process's rank.
        kwargs: Names of attributes, and their values to begin with; whatever can be pickled.

    Raises:
        ValueError: If an attribute would hide a method.
    """

    def __init__(self, bcast_object: Callable[..., Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        hidden = [name for name in kwargs if hasattr(type(self), name)]
        if hidden:
            raise ValueError(
                f"{type(self).__name__} has a method {hidden[0]!r}; give the attribute another name."
            )
        self._store: Store | None = None
        self._saved_state = copy.deepcopy(kwargs)
        self._set(kwargs)

    def save(self) -> None:
        """Remember copies of the attributes."""
        self._saved_state = copy.deepcopy(self._values())

    def restore(self) -> None:
        """Set the attributes to what was last saved."""
        self._set(copy.deepcopy(self._saved_state))

    def sync(self) -> None:
        """Set the attributes of all ranks to those of rank 0, and saves them."""
        if self._saved_state:
            self._saved_state = self._bcast_object(self._values())
            self._set(copy.deepcopy(self._saved_state))

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._saved_state}

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def _keep(self) -> None:
        if self._store is not None:
            snapshot = self._snapshot()
            if self._rank() == 0:
                self._store.write(snapshot)

    def _snapshot(self) -> Snapshot:
        """Return what was last saved, on rank 0 with what belongs to the other ranks."""
        return Snapshot(self._saved_state)

    def _difference(self, snapshot: Snapshot) -> str | None:
        """Return in what a commit does not fit this state, or returns None if it does."""
        ours, theirs = set(self._saved_state), set(snapshot.values)
        if ours == theirs:
            return None
        return f"it has the attributes {sorted(theirs)}, the state has {sorted(ours)}"

    def _adopt(self, snapshot: Snapshot) -> None:
        """Take a commit from disk, on rank 0; `sync` gives it to the others."""
        self._set(snapshot.values)

    def _adopt_own(self, own: Any) -> None:
        """Take what belongs to this rank alone."""
