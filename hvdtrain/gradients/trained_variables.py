"""Remember which variables are trained, and whether anything averages their gradients."""

import collections
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.gradients.naming import compared_name, plain_variable, variable_name

# The warning if a list of variables to broadcast is empty.
NOTHING = (
    "broadcast_variables was given no variables, so nothing was broadcast. A model that is not built has "
    "none: give it a keras.Input, or call it once on a batch, before the broadcast."
)


@dataclass(frozen=True)
class Key:
    """Identity of a variable on all ranks.

    Args:
        ranks: The ranks that should have the same values.
        name: The variable's name, without the numbers that Keras gives to layers.
        shape: Its shape.
        averaged: Whether its gradient is averaged.
        number: Number of this variable among those for which all of this is the same.
    """

    ranks: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    averaged: bool
    number: int


@dataclass
class Trained:
    """A trained variable.

    Args:
        variable: A weak reference to TensorFlow's variable.
        key: Its identity on all ranks.
        name: Its name, for messages.
        optimizer: The class of the optimizer that updates it without averaging, if one does.
        expected: Whether the ranks certainly should have the same values.
        verified: Whether a verification found the same values on the ranks.
    """

    variable: Any
    key: Key
    name: str
    optimizer: str = ""
    expected: bool = True
    verified: bool = False


class Registry:
    """The trained variables of this process, as weak references.

    Only variables whose values can be read later are noted: see `Bridge.readable`.

    Attributes:
        together: Whether anything was averaged or broadcast, so that the ranks are meant to train one model.
        warned: Whether a warning was given about variables that are not averaged.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all variables."""
        self.together = False
        self.warned = False
        self._known: dict[int, Trained] = {}
        self._local: dict[int, Any] = {}
        self._counts: collections.Counter[Key] = collections.Counter()

    def alive(self) -> list[Trained]:
        """List the variables that still exist."""
        return [trained for trained in self._known.values() if trained.variable() is not None]

    def find(self, variable: Any) -> Trained | None:
        """Return the record of a variable; None if it was never noted."""
        plain = plain_variable(variable)
        known = self._known.get(id(plain))
        return known if known is not None and known.variable() is plain else None

    def is_local(self, variable: Any) -> bool:
        """Return whether each rank keeps its own values of a variable."""
        plain = plain_variable(variable)
        local = self._local.get(id(plain))
        return local is not None and local() is plain

    def note_averaged(self, engine: Engine, variables: Iterable[Any]) -> None:
        """Note variables whose gradients are averaged over the ranks of an engine."""
        self.together = True
        for variable in variables:
            known = self.find(variable)
            if known is None or not known.key.averaged or known.key.ranks != engine.ranks:
                self._note(engine, variable, averaged=True)

    def note_plain(
        self, engine: Engine, variables: Iterable[Any], optimizer: str, expected: bool = True
    ) -> None:
        """Note variables that an optimizer updates and that may not be averaged.

        Args:
            engine: The world.
            variables: The variables.
            optimizer: Class of the optimizer.
            expected: Whether the whole world should have the same values.
        """
        for variable in variables:
            known = self.find(variable)
            if known is None or not (known.key.averaged or known.optimizer):
                self._note(engine, variable, averaged=False, optimizer=optimizer, expected=expected)

    def note_broadcast(self, engine: Engine, variables: Iterable[Any]) -> None:
        """Note variables that were broadcast to the ranks of an engine and may be trained later."""
        self.together = True
        for variable in variables:
            trainable = getattr(variable, "trainable", False) and _is_float(variable)
            if trainable and self.find(variable) is None:
                # TensorFlow's own variables are trainable by default, whatever their use.
                from_keras = plain_variable(variable) is not variable
                self._note(engine, variable, averaged=False, expected=from_keras)

    def note_local(self, variable: Any) -> None:
        """Note a variable for which each rank keeps its own values."""
        plain = plain_variable(variable)
        self._local[id(plain)] = weakref.ref(plain)
        self._known.pop(id(plain), None)

    def note_verified(self, variables: Iterable[Any]) -> None:
        """Note that a verification found the same values of these variables on the ranks."""
        for variable in variables:
            known = self.find(variable)
            if known is not None:
                known.verified = True

    def forget(self, variables: Iterable[Any]) -> None:
        """Exclude variables from the comparison at the end."""
        for variable in variables:
            self._known.pop(id(plain_variable(variable)), None)

    def _note(self, engine: Engine, variable: Any, averaged: bool, **facts: Any) -> None:
        plain = plain_variable(variable)
        if self.is_local(variable):
            return
        kind = key_of(engine, variable, averaged)
        self._counts[kind] += 1
        key = key_of(engine, variable, averaged, self._counts[kind])
        self._known[id(plain)] = Trained(weakref.ref(plain), key, variable_name(variable), **facts)


def _is_float(variable: Any) -> bool:
    return "float" in getattr(variable.dtype, "name", variable.dtype)


def key_of(engine: Engine, variable: Any, averaged: bool, number: int = 0) -> Key:
    """Return the identity of a variable among the ranks of an engine."""
    return Key(engine.ranks, compared_name(variable_name(variable)), tuple(variable.shape), averaged, number)


registry = Registry()
