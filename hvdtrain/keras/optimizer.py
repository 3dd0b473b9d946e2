"""`DistributedOptimizer`: the one place where a reduced gradient enters Keras."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.collectives.base import Op
from hvdtrain.gradients.reducer import GradientReducer, ReduceOptions
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.keras import saving, seams
from hvdtrain.keras.copying import copied


def DistributedOptimizer(  # noqa: N802 - the name is Horovod's
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    *,
    sparse_as_dense: bool = False,
    op: Op | int | str = Op.AVERAGE,
) -> keras.optimizers.Optimizer:
    """Makes an optimizer train one model on all ranks: each step applies the mean of all ranks' gradients.

    N ranks with batch b then learn what one process learns with batch N*b. The mean is taken before
    clipping, weight decay and the update, and with `gradient_accumulation_steps=k` once every k steps.
    The first applied step is verified (see HVDTRAIN_VERIFY): all ranks hold the same weights, and what is
    applied is the mean.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/keras.html).

    Args:
        optimizer: Any `keras.optimizers.Optimizer`. It is copied, with its state if it has been built; the
            copy has a class of the same name, so a saved model loads without hvdtrain. Of a
            `LossScaleOptimizer` the inner optimizer is made distributed, and whether a gradient is finite
            is decided for all ranks together.
        name: Names the operations on the wire; by default made from the class.
        sparse_as_dense: Sends gradients of embeddings as dense tensors. By default their rows are gathered
            from all ranks, which is cheaper while batches touch few rows.
        op: `hvd.Average` (default) or `hvd.Sum`.

    Returns:
        An optimizer for `model.compile`, or for `apply_gradients` and `apply` in a loop of your own.

    Raises:
        ValueError: If `hvd.init()` was not called, or `optimizer` is distributed already, or `op` is
            another reduction, or HVDTRAIN_VERIFY is not one of its values.
        TypeError: If `optimizer` is not a Keras optimizer.
    """
    runtime.engine()
    _check(optimizer, Op.of(op))
    seams.install()
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = DistributedOptimizer(optimizer.inner_optimizer, name, sparse_as_dense=sparse_as_dense, op=op)
        return copied(optimizer, type(optimizer), inner_optimizer=inner)
    base = type(optimizer)
    options = ReduceOptions(name or f"Distributed{base.__name__}", Op.of(op), sparse_as_dense)
    chosen = {"_hvdtrain_options": options, "_hvdtrain_policy": Policy.from_environment()}
    distributed = type(base.__name__, (_Distributed, base), chosen)
    saving.save_as(distributed, base)
    return copied(optimizer, distributed)


def is_distributed(optimizer: Any) -> bool:
    """Tells whether an optimizer, or the one inside a `LossScaleOptimizer`, averages over the ranks."""
    return isinstance(getattr(optimizer, "inner_optimizer", optimizer), _Distributed)


class _Distributed:
    """Reduces exactly the gradients that are about to be applied. Mixed into the user's own class."""

    _hvdtrain_options: ReduceOptions
    _hvdtrain_policy: Policy
    _hvdtrain_variables: Sequence[Any] | None = ()

    @functools.cached_property
    def _hvdtrain_reducer(self) -> GradientReducer:
        engine, options = runtime.engine(), self._hvdtrain_options
        return GradientReducer(engine, options, Verification(engine, options.op, self._hvdtrain_policy))

    def apply_gradients(self, grads_and_vars: Any, **options: Any) -> Any:
        """Updates the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        with self._hvdtrain_passed_through("apply_gradients"):
            return super().apply_gradients(grads_and_vars, **options)  # type: ignore[misc]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Updates the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        if len(grads) == 0:
            return super().apply(grads, trainable_variables)  # type: ignore[misc]
        with self._hvdtrain_passed_through("apply"):
            return super().apply(grads, trainable_variables)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied(self, type(self))

    @contextlib.contextmanager
    def _hvdtrain_passed_through(self, method: str) -> Iterator[None]:
        """Makes sure that the user's own class leads through Keras' update, where gradients are reduced."""
        object.__setattr__(self, "_hvdtrain_variables", None)
        yield
        if self._hvdtrain_variables is None and runtime.engine().size > 1:
            raise NotImplementedError(
                f"{type(self).__name__}.{method} updates variables by itself, not through Keras' "
                "Optimizer.apply, so its gradients were not averaged over the ranks. Make it call "
                "super().apply, or give hvd.DistributedOptimizer the optimizer inside it."
            )

    def _filter_empty_gradients(self, grads: Any, trainable_variables: Any) -> tuple[Any, Any]:
        grads, variables = super()._filter_empty_gradients(grads, trainable_variables)  # type: ignore[misc]
        overwritten = [each.path for each in variables if getattr(each, "overwrite_with_gradient", False)]
        if overwritten:
            raise NotImplementedError(
                f"{overwritten[0]} is a float8 scale, which Keras overwrites on each rank with a value of its "
                "own. hvdtrain does not train float8 layers; use the policy mixed_bfloat16."
            )
        # Not tracked by Keras: these belong to the model, not to the optimizer.
        object.__setattr__(self, "_hvdtrain_variables", tuple(variables))
        return grads, variables

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        # Keras calls this once for each update, after its gradient accumulation and before clipping.
        accumulated = {id(each) for each in getattr(self, "_accumulated_gradients", ())}
        state = [each for each in self.variables if id(each) not in accumulated]  # type: ignore[attr-defined]
        reduced = self._hvdtrain_reducer(grads, self._hvdtrain_variables or (), state)
        return super()._clip_gradients(reduced)  # type: ignore[misc]


def _check(optimizer: Any, op: Op) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "DistributedOptimizer takes an instance of keras.optimizers.Optimizer, such as "
            f"keras.optimizers.Adam(1e-3). Received: {optimizer!r} of type {type(optimizer).__name__}."
        )
    if is_distributed(optimizer):
        raise ValueError(
            "This optimizer is distributed already. Wrapping it twice would average twice; pass the plain one."
        )
    if op not in (Op.AVERAGE, Op.SUM):
        raise ValueError(f"Gradients are combined by hvd.Average or hvd.Sum. Received: op={op.name.lower()}.")
