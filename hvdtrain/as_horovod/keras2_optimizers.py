"""Restore arguments, attributes and methods of optimizers of Keras 2."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.patching import definer, replace

_COMPUTE = (
    "Write `with tf.GradientTape() as tape:` around the loss, `tape = hvd.DistributedGradientTape(tape)` after it, "
    "and give tape.gradient(loss, variables) to apply_gradients of the plain optimizer."
)


def install() -> None:
    """Add the arguments, attributes and methods to all optimizers."""
    base = definer(keras.optimizers.Optimizer, "variables")
    replace(base, "__init__", _taking_lr)
    replace(base, "apply_gradients", _rejecting_changed_gradients)
    base.lr = property(
        lambda self: self.learning_rate, lambda self, rate: setattr(self, "learning_rate", rate)
    )
    base.minimize, base._compute_gradients = _minimize, _compute_gradients
    base.get_scaled_loss = lambda self, loss: self.scale_loss(loss)
    base.get_unscaled_gradients = lambda self, grads: grads  # Keras 3 unscales gradients when it applies them
    base.get_gradients = base.get_updates = _symbolic
    base.weights = property(_weights)
    # What `set_weights` of Keras 3 accepts.
    base.get_weights = lambda self: [variable.numpy() for variable in self.variables]
    for kind in _with_subclasses(base):
        if isinstance(vars(kind).get("variables"), property):
            kind.variables = property(_callable(vars(kind)["variables"].fget))
        if "__init__" in vars(kind) and "epsilon" in inspect.signature(kind.__init__).parameters:
            replace(kind, "__init__", _without_epsilon)


def _taking_lr(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, learning_rate: Any = None, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        rate = kwargs.pop("lr", learning_rate)
        decay = kwargs.pop("decay", None)
        if decay:
            raise ValueError(
                f"{type(self).__name__}(decay={decay!r}): optimizers of Keras 3 have no decay of the learning "
                f"rate. Write learning_rate=keras.optimizers.schedules.InverseTimeDecay({rate!r}, decay_steps=1, "
                f"decay_rate={decay!r}), which means the same."
            )
        if rate is None or isinstance(rate, str) or hasattr(type(self), "_resource_apply_dense"):
            raise TypeError(
                f"{type(self).__name__} is written for optimizers of Keras 2. In Keras 3 write "
                "super().__init__(learning_rate=..., name=...) with the rate first, create variables in "
                "build(self, variables), and update one in update_step(self, gradient, variable, learning_rate) "
                "instead of _resource_apply_dense."
            )
        init(self, rate, *args, **kwargs)

    return __init__


def _without_epsilon(init: Callable[..., None]) -> Callable[..., None]:
    """Omit epsilon=None, which in Keras 2 meant the default, 1e-7. Keras 3 has the same default."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if kwargs.get("epsilon", 0) is None:
            del kwargs["epsilon"]
        init(self, *args, **kwargs)

    return __init__


def _minimize(
    self: Any, loss: Any, var_list: Any, grad_loss: Any = None, name: str | None = None, tape: Any = None
) -> Any:
    return self.apply_gradients(self._compute_gradients(loss, var_list, grad_loss, tape))


def _compute_gradients(
    self: Any, loss: Any, var_list: Any, grad_loss: Any = None, tape: Any = None
) -> list[tuple[Any, Any]]:
    """Return the gradients of this rank. A distributed optimizer combines them in `apply_gradients`."""
    if not callable(loss) and tape is None:
        raise ValueError(
            f"{type(self).__name__}: a loss that is a tensor needs the tape that recorded it: "
            "minimize(loss, variables, tape=tape)."
        )
    tape = tape or tf.GradientTape()
    if callable(loss):
        with tape:
            loss = loss()
    variables = list(var_list() if callable(var_list) else var_list)
    gradients = tape.gradient(loss, variables, grad_loss)
    # Not with setattr, because Keras would track the tensors as state of the optimizer.
    object.__setattr__(self, "_hvdtrain_computed", gradients)
    return list(zip(gradients, variables, strict=True))


def _rejecting_changed_gradients(apply_gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Reject gradients changed before the ranks combine them: with Horovod they were combined before the change."""

    def apply(self: Any, grads_and_vars: Any) -> Any:
        from hvdtrain.keras.optimizer.distributed import is_distributed

        pairs = list(grads_and_vars)
        computed = vars(self).pop("_hvdtrain_computed", None)
        known = {id(gradient) for gradient in computed or ()}
        unchanged = all(id(gradient) in known for gradient, _ in pairs)
        if computed is not None and is_distributed(self) and not unchanged:
            raise NotImplementedError(
                f"{type(self).__name__}: the gradients of _compute_gradients were changed before apply_gradients, "
                f"which is where the ranks combine them. {_COMPUTE}"
            )
        return apply_gradients(self, pairs)

    return apply


def _symbolic(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        f"{type(self).__name__}: get_gradients and get_updates belong to graphs of Keras 2. {_COMPUTE}"
    )


def _weights(optimizer: Any) -> list[Any]:
    """Return the variables without the learning rate, as Keras 2 listed them."""
    rate = getattr(optimizer, "_learning_rate", None)
    return [variable for variable in optimizer.variables if variable is not rate]


class _Callable(list):
    """A list of variables that can be called, because old scripts write `optimizer.variables()`."""

    def __call__(self) -> list[Any]:
        return self


def _callable(variables: Any) -> Callable[[Any], _Callable]:
    return lambda self: _Callable(variables(self))


def _with_subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)
