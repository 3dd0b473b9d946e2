"""Define states that can be committed, restored, and synchronised over all ranks."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hvdtrain.collectives.errors import HostsUpdatedInterrupt

_REMOVED = 1  # Horovod's HostUpdateResult: hosts were removed and none added


class State:
    """The state with which a training resumes from a commit; subclasses define `save`, `restore` and `sync`.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/elastic_include.html).

    Args:
        bcast_object: Returns rank 0's object on every rank, such as `hvd.broadcast_object`.
        get_rank: Returns this process's rank, such as `hvd.rank`.
    """

    def __init__(self, bcast_object: Callable[..., Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: list[tuple[float, int]] = []
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: list[Callable[[], Any]] = []
        self._on_commit: Callable[[], None] | None = (
            None  # under `elastic.run`, writes the saved state to disk
        )

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Add functions without arguments that are called before the training function runs again."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Prepare for another run: discard messages, call `reset` and then the registered functions."""
        self._host_messages = []
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Record a change of hosts, for which `check_host_updates` raises an interrupt.

        Args:
            timestamp: Time of the change; changes before the last one handled are ignored.
            update_res: 1 if hosts were removed, 2 if hosts were added, 3 for both.
        """
        self._host_messages.append((timestamp, update_res))

    def commit(self) -> None:
        """Save the present state as the one that `restore` and a restarted job return to.

        All ranks call this. It copies the whole state and, under `elastic.run`, writes it to disk.

        Raises:
            HostsUpdatedInterrupt: On every rank, if rank 0 has recorded a change of hosts.
        """
        self.save()
        if self._on_commit is not None:
            self._on_commit()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raise an interrupt if rank 0 has recorded a change of hosts; all ranks call this.

        Raises:
            HostsUpdatedInterrupt: On every rank, if it has.
        """
        messages, self._host_messages = self._host_messages, []
        before = latest = self._last_updated_timestamp
        changes = 0
        for timestamp, change in messages:
            if timestamp > latest:
                latest, changes = timestamp, changes | change
        before, latest, changes = self._bcast_object((before, latest, changes))
        self._last_updated_timestamp = latest
        if latest > before:
            raise HostsUpdatedInterrupt(changes == _REMOVED)

    def save(self) -> None:
        """Copy the present state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Restore the last saved state."""
        raise NotImplementedError

    def sync(self) -> None:
        """Set all ranks to the state of rank 0, and save it."""
        raise NotImplementedError

    def reset(self) -> None:
        """Prepare a subclass for another run; here, do nothing."""


class ObjectState(State):
    """A state of Python objects, each an attribute.

    Args:
        bcast_object: Returns rank 0's object on every rank.
        get_rank: Returns this process's rank.
        kwargs: Names of attributes and their initial values, which must be picklable.

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
        self._saved_state = copy.deepcopy(kwargs)
        self._set(kwargs)

    def save(self) -> None:
        """Copy the attributes."""
        self._saved_state = copy.deepcopy(self._values())

    def restore(self) -> None:
        """Set the attributes to the last saved values."""
        self._set(copy.deepcopy(self._saved_state))

    def sync(self) -> None:
        """Set the attributes of all ranks to those of rank 0, and save them."""
        if self._saved_state:
            self._saved_state = self._bcast_object(self._values())
            self._set(copy.deepcopy(self._saved_state))

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._saved_state}

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    # What `elastic.run` writes to disk and loads.

    def _described(self) -> tuple[str, ...]:
        """Return a line for each variable that all ranks share."""
        return ()

    def _saved_values(self) -> tuple[list[np.ndarray], Any]:
        """Return the values of the variables that all ranks share, and what belongs to this rank alone."""
        return [], None

    def _load(self, values: dict[str, Any], shared: list[np.ndarray]) -> None:
        """Load a commit on rank 0; `sync` sends it to the other ranks."""
        self._set(values)

    def _load_own(self, own: Any) -> None:
        """Load what belongs to this rank alone."""
