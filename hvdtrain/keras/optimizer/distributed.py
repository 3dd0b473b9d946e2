"""Reduce the gradients of a Keras optimizer over ranks before they are applied: `DistributedOptimizer`."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import Op
from hvdtrain.data.global_batch import weighted
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.schemes import State
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.keras.optimizer.copying import copy_loss_scale, copy_optimizer, copy_with
from hvdtrain.runtime.process_sets import ProcessSet, engine_or_alone, global_process_set


def DistributedOptimizer(  # noqa: N802 - the name is Horovod's
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Op | int | str = Op.AVERAGE,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Return an optimizer that trains one model on all ranks: each step applies the mean of all ranks' gradients.

    N ranks with batch b then learn what one process learns with batch N*b. The mean is taken before
    clipping, weight decay and the update, and with `gradient_accumulation_steps=k` once every k steps.
    The first applied step is verified (see HVDTRAIN_VERIFY): all ranks hold the same weights, and the applied
    gradient is the mean.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/keras.html). The returned optimizer
    has the method `register_local_var(variable)`, after which each rank trains that variable separately.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`. It is copied, with its state if it has been built; the
            copy has a class of the same name, so a saved model loads without hvdtrain. In a
            `LossScaleOptimizer` the inner optimizer is made distributed, and all ranks decide together
            whether the gradients are finite.
        name: Name of the operations, for messages and the timeline; by default derived from the class.
        device_dense: Device of Horovod's operations on dense gradients, such as "/cpu:0"; the mpi engine
            always works in host memory.
        device_sparse: Device of Horovod's operations on sparse gradients.
        compression: `hvd.Compression.none` (default), `fp16` or `bf16`, which halve the data sent for float32, or
            a class with the static methods `compress(tensor)` and `decompress(tensor, ctx)`. Beyond 65504 fp16
            overflows; bf16 does not. For slow networks: `hvd.Compression.int8()`, `int4()`, `signsgd()`,
            `topk(0.01)`, `randomk(0.05)` or `powersgd(4)`; or a `hvdtrain.gradients.schemes.Scheme` of your own.
        sparse_as_dense: Whether to send gradients of embeddings as dense tensors. By default their rows are
            gathered from all ranks, which is cheaper if batches use few rows.
        gradient_predivide_factor: Factor that splits the division of the mean: gradients are divided by it
            before they are summed, and the sum by size / factor afterwards.
        op: `hvd.Average` (default), `hvd.Sum`, or `hvd.Adasum`, which combines gradients by their angles.
        backward_passes_per_step: Number of steps whose gradients are summed on each rank, then reduced once
            and applied once, also in graphs. It becomes Keras' `gradient_accumulation_steps`.
        average_aggregated_gradients: Whether to divide that sum by `backward_passes_per_step`.
        num_groups: The same as an integer in `groups`.
        groups: Number of groups of gradients, where those of a group are sent together, or a list of lists of
            variables, one list per group. By default the engine chooses the groups by size.
        process_set: The ranks that train together. On other ranks the optimizer trains without reduction.
        scale_local_gradients: Whether to divide gradients of local variables by the number of ranks, as the
            mean does with the other gradients.

    Returns:
        An optimizer for `model.compile`, or for `apply_gradients` and `apply` in your own loop.

    Raises:
        ValueError: If `hvd.init()` was not called, or `optimizer` is distributed already, or arguments contradict
            each other, or HVDTRAIN_VERIFY has an unknown value.
        TypeError: If `optimizer` is not a Keras optimizer, or `compression` is not a compressor.
    """
    options = ReduceOptions(
        name or f"Distributed{type(optimizer).__name__}",
        Op.of(op),
        sparse_as_dense,
        compression,
        gradient_predivide_factor,
        groups if groups is not None else num_groups,
        scale_local_gradients,
        device_dense,
        device_sparse,
    )
    runtime.engine()
    check_optimizer(optimizer, "DistributedOptimizer")
    _check_steps(optimizer, backward_passes_per_step)
    return make_distributed(
        optimizer, options, process_set, backward_passes_per_step, average_aggregated_gradients
    )


def PartialDistributedOptimizer(  # noqa: N802 - the name is Horovod's
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Op | int | str = Op.AVERAGE,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
) -> keras.optimizers.Optimizer:
    """Return an optimizer that trains some layers on each rank separately, and the others on all ranks together.

    Local layers are for parts of a model that are different on each rank on purpose, such as the shards of an
    embedding. Pass their variables to `BroadcastGlobalVariablesCallback(local_variables=...)` too.

    Args:
        optimizer: As for `DistributedOptimizer`, like all arguments that are not described here.
        local_layers: A layer, or several, whose trainable weights stay local. They must be built.

    Returns:
        An optimizer like the one that `DistributedOptimizer` returns.

    Raises:
        ValueError: As `DistributedOptimizer`, and if a local layer has no weights yet.
        TypeError: If `local_layers` contains an object that is not a layer.
    """
    distributed = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        backward_passes_per_step,
        average_aggregated_gradients,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    for variable in local_variables(local_layers):
        distributed.register_local_var(variable)
    return distributed


def local_variables(local_layers: Any) -> list[Any]:
    """Return the trainable variables of layers, and register all their variables as local.

    Args:
        local_layers: None, a layer, or several.

    Raises:
        ValueError: If a layer is not built, so that it has no variables yet.
        TypeError: If one of them is not a layer.
    """
    layers = [local_layers] if isinstance(local_layers, keras.layers.Layer) else list(local_layers or ())
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(
                f"local_layers takes Keras layers. Received: {layer!r} of type {type(layer).__name__}."
            )
        if not layer.built:
            raise ValueError(
                f"The local layer {layer.name} has no weights yet. Build the model first: give it a keras.Input or "
                "call it on a batch."
            )
    variables = []
    for layer in layers:
        for variable in layer.weights:  # also those that are frozen now
            registry.note_local(variable)
        variables += layer.trainable_variables
    return variables


def make_distributed(
    optimizer: Any, options: ReduceOptions, process_set: ProcessSet, steps: int, average: bool
) -> Any:
    """Return a distributed copy; for a `LossScaleOptimizer`, a copy with a distributed inner optimizer."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = make_distributed(optimizer.inner_optimizer, options, process_set, steps, average)
        return copy_loss_scale(optimizer, inner, "register_local_var", "process_set")
    attributes = {
        "_hvdtrain_options": options,
        "_hvdtrain_policy": Policy.from_environment(),
        "_hvdtrain_steps_summed": 1 if average else steps,
        "process_set": process_set,
    }
    changes = {"gradient_accumulation_steps": steps} if steps > 1 else {}
    return copy_with(optimizer, DistributedMixin, attributes, **changes)


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one inside a `LossScaleOptimizer`, averages over the ranks."""
    return isinstance(getattr(optimizer, "inner_optimizer", optimizer), DistributedMixin)


def trains_on_several_ranks(optimizer: Any) -> bool:
    """Return whether an optimizer is distributed and `hvd.init()` has joined several ranks."""
    return is_distributed(optimizer) and runtime.is_initialized() and runtime.engine().size > 1


def scheme_states(optimizers: Sequence[Any]) -> list[State]:
    """Return what the schemes of distributed optimizers remember; see `hvdtrain.gradients.schemes.State`."""
    return [reducer.scheme_state for reducer in reducers_of(optimizers)]


def reducers_of(optimizers: Sequence[Any]) -> list[GradientReducer]:
    """List the reducers of distributed optimizers."""
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers]
    return [
        reducer
        for optimizer in inner
        if isinstance(optimizer, DistributedMixin)
        for reducer in optimizer._hvdtrain_reducers
    ]


class DistributedMixin:
    """A mixin for the user's optimizer class that reduces the gradients immediately before they are applied."""

    process_set: ProcessSet
    _hvdtrain_options: ReduceOptions
    _hvdtrain_policy: Policy
    _hvdtrain_steps_summed: int
    _hvdtrain_variables: Sequence[Any] | None = ()

    def register_local_var(self, var: Any) -> None:
        """Let each rank train a variable separately: its gradient is not reduced.

        Args:
            var: One of the variables that the optimizer trains.
        """
        self._hvdtrain_reducer.keep_local(var)

    @functools.cached_property
    def _hvdtrain_reducer(self) -> GradientReducer:
        engine, options = engine_or_alone(self.process_set), self._hvdtrain_options
        verification = Verification(engine, options, self._hvdtrain_policy)
        return GradientReducer(engine, TensorFlowBridge(), options, verification)

    @property
    def _hvdtrain_reducers(self) -> list[GradientReducer]:
        return [self._hvdtrain_reducer]

    def apply_gradients(self, grads_and_vars: Any, **options: Any) -> Any:
        """Update the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        with self._hvdtrain_require_reduction("apply_gradients"):
            return super().apply_gradients(grads_and_vars, **options)  # type: ignore[misc]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Update the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        if len(grads) == 0:
            return super().apply(grads, trainable_variables)  # type: ignore[misc]
        with self._hvdtrain_require_reduction("apply"):
            # Before Keras accumulates gradients, because the number of samples differs between the steps.
            return super().apply(weighted(grads), trainable_variables)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_optimizer(self, type(self))

    @contextlib.contextmanager
    def _hvdtrain_require_reduction(self, method: str) -> Iterator[None]:
        """Raise an error if the user's class does not call Keras' update, where gradients are reduced."""
        object.__setattr__(self, "_hvdtrain_variables", None)
        yield
        if self._hvdtrain_variables is None and engine_or_alone(self.process_set).size > 1:
            raise NotImplementedError(
                f"{type(self).__name__}.{method} updates variables by itself, not through Keras' "
                "Optimizer.apply, so its gradients were not averaged over the ranks. Make it call "
                "super().apply, or give hvd.DistributedOptimizer the optimizer inside it."
            )

    def _filter_empty_gradients(self, grads: Any, trainable_variables: Any) -> tuple[Any, Any]:
        grads, variables = super()._filter_empty_gradients(grads, trainable_variables)  # type: ignore[misc]
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise NotImplementedError(
                    f"{variable.path} is a float8 scale, which Keras overwrites with a different value on each "
                    "rank. hvdtrain does not train float8 layers; use the policy mixed_bfloat16."
                )
        # Set so that Keras does not track them: they belong to the model, not to the optimizer.
        object.__setattr__(self, "_hvdtrain_variables", tuple(variables))
        return grads, variables

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        # Keras calls this once per update, after its gradient accumulation and before clipping.
        accumulators = {id(variable) for variable in getattr(self, "_accumulated_gradients", ())}
        variables = self.variables  # type: ignore[attr-defined]
        state = [variable for variable in variables if id(variable) not in accumulators]
        if self._hvdtrain_steps_summed > 1:  # Keras has averaged over the steps
            grads = [_times(grad, self._hvdtrain_steps_summed) for grad in grads]
        reduced = self._hvdtrain_reduced(grads, self._hvdtrain_variables or (), state)
        return super()._clip_gradients(reduced)  # type: ignore[misc]

    def _hvdtrain_reduced(self, grads: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> Any:
        self._hvdtrain_reducer.number(self._trainable_variables)  # type: ignore[attr-defined]
        return self._hvdtrain_reducer(grads, variables, state)


def check_optimizer(optimizer: Any, taker: str) -> None:
    """Raise TypeError unless an optimizer is one of Keras, or ValueError if it is distributed already.

    Args:
        optimizer: The optimizer.
        taker: What takes it, for the message.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"{taker} takes an instance of keras.optimizers.Optimizer, such as "
            f"keras.optimizers.Adam(1e-3). Received: {optimizer!r} of type {type(optimizer).__name__}."
        )
    if is_distributed(optimizer):
        raise ValueError(
            "This optimizer is distributed already. Wrapping it twice would average twice. Pass the "
            "original optimizer."
        )


def _check_steps(optimizer: keras.optimizers.Optimizer, steps: Any) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"backward_passes_per_step must be an integer of at least 1. Received: {steps!r}.")
    own = getattr(optimizer, "inner_optimizer", optimizer).gradient_accumulation_steps
    if steps > 1 and own:
        raise ValueError(
            f"This optimizer already accumulates gradients over {own} steps. Give either "
            f"gradient_accumulation_steps={own} to Keras or backward_passes_per_step={steps}, not both."
        )


def _times(grad: Any, factor: int) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values * factor, grad.indices, grad.dense_shape)
    return grad * factor
