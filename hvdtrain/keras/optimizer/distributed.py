"""`DistributedOptimizer`: the one place where a reduced gradient enters Keras."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import Op
from hvdtrain.data.global_batch import weighted
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.keras.optimizer import saving
from hvdtrain.keras.optimizer.accumulation import Window
from hvdtrain.keras.optimizer.copying import copied
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
    """Make an optimizer train one model on all ranks: each step applies the mean of all ranks' gradients.

    N ranks with batch b then learn what one process learns with batch N*b. The mean is taken before
    clipping, weight decay and the update, and with `gradient_accumulation_steps=k` once every k steps.
    The first applied step is verified (see HVDTRAIN_VERIFY): all ranks hold the same weights, and what is
    applied is the mean.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/keras.html). The optimizer that is returned
    has the method `register_local_var(variable)`: each rank then trains that variable by itself.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`. It is copied, with its state if it has been built; the
            copy has a class of the same name, so a saved model loads without hvdtrain. Of a
            `LossScaleOptimizer` the inner optimizer is made distributed, and whether a gradient is finite
            is decided for all ranks together.
        name: Names the operations on the wire; by default made from the class.
        device_dense: Where Horovod's operations on dense gradients are placed, such as "/cpu:0"; the mpi
            engine works in host memory.
        device_sparse: Likewise for sparse gradients.
        compression: `hvd.Compression.none` (default), `fp16` or `bf16`, which halve what travels of float32, or
            a class with the static methods `compress(tensor)` and `decompress(tensor, ctx)`. Beyond 65504 fp16
            overflows; bf16 does not.
        sparse_as_dense: Sends gradients of embeddings as dense tensors. By default their rows are gathered
            from all ranks, which is cheaper while batches touch few rows.
        gradient_predivide_factor: Divides a mean in two steps: gradients by this before they are summed, the
            sum by size over this afterwards.
        op: `hvd.Average` (default), `hvd.Sum`, or `hvd.Adasum`, which combines gradients by their angles.
        backward_passes_per_step: Gradients of so many steps are added up on each rank, then reduced once
            and applied once; in graphs as well. It becomes Keras' `gradient_accumulation_steps`.
        average_aggregated_gradients: Divides what was added up by `backward_passes_per_step`.
        num_groups: As an integer in `groups`.
        groups: Into how many groups gradients are divided that travel as one, or a list of lists of the variables
            of each. By default the engine fuses what fits.
        process_set: The ranks that train together. On other ranks the optimizer trains by itself.
        scale_local_gradients: Divides gradients of local variables by the number of ranks, as the mean does
            with those of the others.

    Returns:
        An optimizer for `model.compile`, or for `apply_gradients` and `apply` in a loop of your own.

    Raises:
        ValueError: If `hvd.init()` was not called, or `optimizer` is distributed already, or arguments do not fit
            each other, or HVDTRAIN_VERIFY is not one of its values.
        TypeError: If `optimizer` is not a Keras optimizer, or `compression` no compressor.
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
    _check(optimizer)
    window = Window.of(optimizer, backward_passes_per_step, average_aggregated_gradients)
    return _made(optimizer, options, window, process_set)


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
    """Trains most of a model on all ranks together, and some layers on each rank by itself.

    Local layers serve parts of a model that differ between ranks on purpose, such as the shards of an embedding.
    Give their variables to `BroadcastGlobalVariablesCallback(local_variables=...)` too.

    Args:
        optimizer: As for `DistributedOptimizer`, and so are the arguments not named here.
        local_layers: A layer or several, built, whose trainable weights stay local.

    Returns:
        An optimizer like that of `DistributedOptimizer`.

    Raises:
        ValueError: As `DistributedOptimizer`, and if a local layer has no weights yet.
        TypeError: If `local_layers` holds something else than layers.
    """
    made = DistributedOptimizer(
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
        made.register_local_var(variable)
    return made


def local_variables(local_layers: Any) -> list[Any]:
    """List the trainable variables of layers that are to stay local.

    Args:
        local_layers: None, a layer, or several.

    Raises:
        ValueError: If a layer is not built, so that nobody knows its variables.
        TypeError: If something else than a layer is among them.
    """
    layers = [local_layers] if isinstance(local_layers, keras.layers.Layer) else list(local_layers or ())
    for each in layers:
        if not isinstance(each, keras.layers.Layer):
            raise TypeError(
                f"local_layers takes Keras layers. Received: {each!r} of type {type(each).__name__}."
            )
        if not each.built:
            raise ValueError(
                f"The local layer {each.name} has no weights yet. Build the model first: give it a keras.Input or "
                "call it on a batch."
            )
    for each in layers:
        for variable in each.weights:  # those that are frozen now as well
            registry.note_local(variable)
    return [variable for each in layers for variable in each.trainable_variables]


def _made(optimizer: Any, options: ReduceOptions, window: Window, process_set: ProcessSet) -> Any:
    """Return the distributed copy; of a `LossScaleOptimizer`, a copy with a distributed optimizer inside."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _made(optimizer.inner_optimizer, options, window, process_set)
        copy = copied(optimizer, type(optimizer), inner_optimizer=inner)
        for name in ("register_local_var", "process_set"):
            object.__setattr__(copy, name, getattr(inner, name))
        return copy
    base = type(optimizer)
    chosen = {
        "_hvdtrain_options": options,
        "_hvdtrain_policy": Policy.from_environment(),
        "_hvdtrain_window": window,
        "process_set": process_set,
    }
    distributed = type(base.__name__, (_Distributed, base), chosen)
    saving.save_as(distributed, base)
    return copied(optimizer, distributed, **window.arguments)


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one inside a `LossScaleOptimizer`, averages over the ranks."""
    return isinstance(getattr(optimizer, "inner_optimizer", optimizer), _Distributed)


class _Distributed:
    """Reduces exactly the gradients that are about to be applied. Mixed into the user's own class."""

    process_set: ProcessSet
    _hvdtrain_options: ReduceOptions
    _hvdtrain_policy: Policy
    _hvdtrain_window: Window
    _hvdtrain_variables: Sequence[Any] | None = ()

    def register_local_var(self, var: Any) -> None:
        """Let each rank train a variable by itself: its gradient is not reduced.

        Args:
            var: One of the variables about to be trained.
        """
        self._hvdtrain_reducer.keep_local(var)

    @functools.cached_property
    def _hvdtrain_reducer(self) -> GradientReducer:
        engine, options = engine_or_alone(self.process_set), self._hvdtrain_options
        verification = Verification(engine, options.op, self._hvdtrain_policy)
        return GradientReducer(engine, TensorFlowBridge(), options, verification)

    def apply_gradients(self, grads_and_vars: Any, **options: Any) -> Any:
        """Update the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        with self._hvdtrain_passed_through("apply_gradients"):
            return super().apply_gradients(grads_and_vars, **options)  # type: ignore[misc]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Update the variables with the mean of all ranks' gradients; see `keras.optimizers.Optimizer`."""
        if len(grads) == 0:
            return super().apply(grads, trainable_variables)  # type: ignore[misc]
        with self._hvdtrain_passed_through("apply"):
            # Before Keras accumulates gradients: each step of a window has numbers of samples of its own.
            return super().apply(weighted(grads), trainable_variables)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied(self, type(self))

    @contextlib.contextmanager
    def _hvdtrain_passed_through(self, method: str) -> Iterator[None]:
        """Make sure that the user's own class leads through Keras' update, where gradients are reduced."""
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
        added_up = self._hvdtrain_window.added_up(grads)
        reduced = self._hvdtrain_reducer(added_up, self._hvdtrain_variables or (), state)
        return super()._clip_gradients(reduced)  # type: ignore[misc]


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "DistributedOptimizer takes an instance of keras.optimizers.Optimizer, such as "
            f"keras.optimizers.Adam(1e-3). Received: {optimizer!r} of type {type(optimizer).__name__}."
        )
    if is_distributed(optimizer):
        raise ValueError(
            "This optimizer is distributed already. Wrapping it twice would average twice; pass the plain one."
        )
