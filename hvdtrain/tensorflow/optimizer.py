"""Provide `DistributedOptimizer` for custom training loops, for optimizers of Keras and of TensorFlow 1."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.keras.optimizer.distributed import DistributedOptimizer as _KerasDistributedOptimizer
from hvdtrain.keras.world import rank
from hvdtrain.runtime.process_sets import ProcessSet, global_process_set
from hvdtrain.tensorflow.gradient_aggregation import LocalGradientAggregationHelper, Reduction
from hvdtrain.tensorflow.ops import grouped_allreduce
from hvdtrain.tensorflow.util import groups_or_num_groups


def DistributedOptimizer(  # noqa: N802 - the name is Horovod's
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Op | int | str = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Make an optimizer train one model on all ranks: each step applies the mean of all ranks' gradients.

    Args:
        optimizer: A Keras optimizer, which is passed to `hvdtrain.keras.DistributedOptimizer`; or one of
            `tf.compat.v1.train`, whose `compute_gradients` and `minimize` then reduce.
        name: As in `hvdtrain.keras.DistributedOptimizer`, like all arguments not listed here.
        use_locking: As in the optimizers of `tf.compat.v1.train`.
        op: `hvd.Average` (default), `hvd.Sum` or `hvd.Adasum`. With an optimizer of `tf.compat.v1.train`,
            Adasum combines the changes that the update of each rank has made, not the gradients.

    Returns:
        An optimizer of the same kind, with the method `register_local_var(variable)`.

    Raises:
        ValueError: If `hvd.init()` was not called, or arguments contradict each other.
        TypeError: If `optimizer` is neither of these.
    """
    common = {
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "groups": groups_or_num_groups(groups, num_groups),
    }
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        return _KerasDistributedOptimizer(
            optimizer,
            name,
            op=op,
            gradient_predivide_factor=gradient_predivide_factor,
            backward_passes_per_step=backward_passes_per_step,
            average_aggregated_gradients=average_aggregated_gradients,
            process_set=process_set,
            scale_local_gradients=scale_local_gradients,
            **common,
        )
    options = ReduceOptions(
        name or f"Distributed{type(optimizer).__name__}",
        Op.of(op),
        predivide_factor=gradient_predivide_factor,
        scale_local=scale_local_gradients,
        **common,
    )
    distributed = _DistributedOptimizer(optimizer, options, use_locking, process_set)
    if backward_passes_per_step != 1:
        distributed.accumulate(backward_passes_per_step, average_aggregated_gradients)
    return distributed


class _DistributedOptimizer(tf.compat.v1.train.Optimizer):
    """An optimizer of TensorFlow 1 that reduces gradients after it has computed them and before it applies them."""

    def __init__(
        self, optimizer: Any, options: ReduceOptions, use_locking: bool, process_set: ProcessSet
    ) -> None:
        super().__init__(use_locking, options.name)
        self._optimizer = optimizer
        self._options = options
        self._reduction = Reduction(options, process_set)
        self._window: LocalGradientAggregationHelper | None = None
        self.process_set = process_set
        self.get_slot = optimizer.get_slot
        self.get_slot_names = optimizer.get_slot_names
        self.variables = optimizer.variables

    def accumulate(self, passes: int, average: bool) -> None:
        """Reduce and apply the sum or the mean of the gradients once after a number of backward passes."""
        if self._options.op is Op.ADASUM:
            raise ValueError(
                "Adasum combines the changes of each update, so backward_passes_per_step must be 1."
            )
        self._window = LocalGradientAggregationHelper(
            passes,
            self._reduction,
            self._options.sparse_as_dense,
            average,
            rank(),
            LocalGradientAggregationHelper._OPTIMIZER_TYPE_LEGACY,
            self.process_set,
            self._options.scale_local,
        )

    def register_local_var(self, var: Any) -> None:
        """Exclude the gradient of a variable from the reduction: it stays on its rank."""
        self._reduction.keep_local(var)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """Compute gradients as the inner optimizer does, and combine those of all ranks."""
        pairs = self._optimizer.compute_gradients(*args, **kwargs)
        if self._options.op is Op.ADASUM:
            return pairs
        gradients, variables = zip(*pairs, strict=True)
        combine = self._window.compute_gradients if self._window else self._reduction
        return list(zip(combine(gradients, variables), variables, strict=True))

    def apply_gradients(self, grads_and_vars: Any, global_step: Any = None, name: str | None = None) -> Any:
        """Apply gradients as the inner optimizer does."""
        pairs = list(grads_and_vars)
        if self._options.op is Op.ADASUM:
            return self._apply_adasum(pairs, global_step, name)

        def apply() -> Any:
            return self._optimizer.apply_gradients(pairs, global_step=global_step, name=name)

        return self._window.apply_gradients(apply, self._optimizer) if self._window else apply()

    def _apply_adasum(self, pairs: Sequence[tuple[Any, Any]], global_step: Any, name: str | None) -> Any:
        """Update the variables on each rank alone, and combine the changes by Adasum."""
        variables = [variable for gradient, variable in pairs if gradient is not None]
        before = [tf.identity(variable) for variable in variables]
        with tf.control_dependencies(before):
            updated = self._optimizer.apply_gradients(pairs, global_step=global_step, name=name)
        with tf.control_dependencies([] if updated is None else [updated]):
            changes = [variable.read_value() - old for variable, old in zip(variables, before, strict=True)]
        combined = grouped_allreduce(
            changes, op=Op.ADASUM, compression=self._options.compression, process_set=self.process_set
        )
        changed = zip(variables, before, combined, strict=True)
        assigned = [variable.assign(old + change) for variable, old, change in changed]
        return None if tf.executing_eagerly() else tf.group(*assigned)
