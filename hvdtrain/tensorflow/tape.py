"""Provide gradient tapes for custom training loops."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.keras.optimizer.distributed import local_variables
from hvdtrain.runtime.process_sets import ProcessSet, global_process_set
from hvdtrain.tensorflow.gradient_aggregation import Reduction
from hvdtrain.tensorflow.util import groups_or_num_groups


def DistributedGradientTape(  # noqa: N802 - the name is Horovod's
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Op | int | str = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Return a tape whose `gradient` returns the mean of the gradients of all ranks.

    Broadcast model and optimizer first (`hvd.broadcast_variables`): a tape cannot know whether the variables
    are equal on all ranks. The API is that of Horovod.

    Args:
        gradtape: The tape that has recorded, or will record, the forward pass.
        device_dense: Device of the operations on dense gradients, such as "/cpu:0".
        device_sparse: Device of the operations on sparse gradients.
        compression: `hvd.Compression.none` (default), `fp16` or `bf16`, or a class with the same two methods.
        sparse_as_dense: Whether to send gradients of embeddings as dense tensors instead of gathering their rows.
        op: `hvd.Average` (default), `hvd.Sum` or `hvd.Adasum`.
        gradient_predivide_factor: Divides a mean in two steps: gradients by this factor before the sum, and the sum
            by size / factor.
        num_groups: Deprecated: pass an integer as `groups`.
        groups: Number of groups of gradients, each reduced in one operation, or a list of lists of the variables
            of each group. By default the engine fuses gradients up to its fusion threshold.
        process_set: The ranks that train together. On other ranks gradients stay unchanged.
        scale_local_gradients: Whether to divide gradients of local sources by the number of ranks, as the mean
            does with other gradients.

    Returns:
        A tape of the same class that shares the state of `gradtape`. It also has
        `register_local_source(source)`, after which the gradient of the source stays on its rank, and
        `get_local_and_global_gradients(target, sources)`.

    Raises:
        ValueError: If `hvd.init()` was not called, or `gradtape` is distributed already, or arguments
            contradict each other.
        TypeError: If `gradtape` is not a `tf.GradientTape`, or `compression` not a compressor.
        NotImplementedError: For Adasum on a number of ranks that is not a power of two.
    """
    if not isinstance(gradtape, tf.GradientTape):
        raise TypeError(
            "DistributedGradientTape takes the tape itself: hvd.DistributedGradientTape(tape). Received: "
            f"{gradtape!r} of type {type(gradtape).__name__}."
        )
    if isinstance(gradtape, _Distributed):
        raise ValueError("This tape is distributed already. Wrapping it twice would reduce twice.")
    options = ReduceOptions(
        "DistributedGradientTape",
        Op.of(op),
        sparse_as_dense,
        compression,
        gradient_predivide_factor,
        groups_or_num_groups(groups, num_groups),
        scale_local_gradients,
        device_dense,
        device_sparse,
    )
    base = type(gradtape)
    # An attribute of the class, because both tapes share the state in __dict__.
    reduced = {"_hvdtrain_reduction": Reduction(options, process_set)}
    tape: Any = object.__new__(type(base.__name__, (_Distributed, base), reduced))
    tape.__dict__ = gradtape.__dict__
    return tape


def PartialDistributedGradientTape(  # noqa: N802 - the name is Horovod's
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Op | int | str = Op.AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Return a tape that averages the gradients of all layers except local ones, which each rank trains alone.

    Args:
        gradtape: As in `DistributedGradientTape`, like all arguments not listed here.
        local_layers: One or several built Keras layers whose gradients stay on their rank.

    Returns:
        A tape like that of `DistributedGradientTape`.

    Raises:
        ValueError: As in `DistributedGradientTape`, and if `local_layers` contains anything except built layers.
    """
    try:
        local = local_variables(local_layers)
    except TypeError as error:
        raise ValueError(str(error)) from None
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for variable in local:
        tape.register_local_source(variable)
    return tape


class _Distributed:
    """A mixin for the class of the tape that reduces the result of `gradient`."""

    _hvdtrain_reduction: Reduction

    def register_local_source(self, source: Any) -> None:
        """Exclude the gradient of a source from the reduction: each rank trains it alone."""
        self._hvdtrain_reduction.keep_local(source)

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Differentiate as `tf.GradientTape.gradient` does, and combine the gradients of all ranks.

        Args:
            target: As in `tf.GradientTape.gradient`, like the other arguments.
            sources: A nested structure of variables or tensors, the same on all ranks.
            use_generic_names: Ignored; accepted for compatibility with Horovod.

        Returns:
            Gradients in the structure of `sources`: tensors, `tf.IndexedSlices` or None.

        Raises:
            MismatchError: On every rank, if the ranks do not have gradients of the same sources.
        """
        gradients = super().gradient(  # type: ignore[misc]
            target, sources, output_gradients, unconnected_gradients=unconnected_gradients
        )
        reduced = self._hvdtrain_reduction(tf.nest.flatten(gradients), tf.nest.flatten(sources))
        return tf.nest.pack_sequence_as(sources, reduced)

    def get_local_and_global_gradients(
        self,
        target: Any,
        sources: Sequence[Any],
        output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Call `gradient` with a flat list of sources, and return local and combined gradients separately.

        Returns:
            Two lists of pairs of source and gradient: those of local sources, and the others.
        """
        gradients = self.gradient(target, sources, output_gradients, use_generic_names)
        local: list[tuple[Any, Any]] = []
        combined: list[tuple[Any, Any]] = []
        for source, gradient in zip(sources, gradients, strict=True):
            pairs = local if self._hvdtrain_reduction.is_local(source) else combined
            pairs.append((source, gradient))
        return local, combined
