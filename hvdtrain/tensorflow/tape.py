"""Gradient tapes for training loops of your own."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Op
from hvdtrain.gradients.compression import Compression
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.keras.optimizer.distributed import local_variables
from hvdtrain.runtime.process_sets import ProcessSet, global_process_set
from hvdtrain.tensorflow.compatibility import groups_or_num_groups
from hvdtrain.tensorflow.reduction import Reduction


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
    """Make `gradient` return the mean of all ranks' gradients, so that a loop of your own trains one model.

    Broadcast model and optimizer first (`hvd.broadcast_variables`): a tape cannot know whether the variables
    are equal on all ranks. The API is Horovod's.

    Args:
        gradtape: The tape that has watched, or will watch, the forward pass.
        device_dense: Where Horovod's operations on dense gradients are placed, such as "/cpu:0".
        device_sparse: Likewise for sparse gradients.
        compression: `hvd.Compression.none` (default), `fp16` or `bf16`, or a class with the same two methods.
        sparse_as_dense: Sends gradients of embeddings as dense tensors instead of gathering their rows.
        op: `hvd.Average` (default), `hvd.Sum` or `hvd.Adasum`.
        gradient_predivide_factor: Divides a mean in two steps: gradients by this before they are summed, the
            sum by size over this afterwards.
        num_groups: Deprecated: as an integer in `groups`.
        groups: Into how many groups gradients are divided that travel as one, or a list of lists of the variables
            of each. By default the engine fuses what fits.
        process_set: The ranks that train together. On other ranks gradients stay their own.
        scale_local_gradients: Divides gradients of local sources by the number of ranks, as the mean does with
            those of the others.

    Returns:
        A tape of the same class that shares the state of `gradtape`. It also has
        `register_local_source(source)`, whose gradient then stays on its rank, and
        `get_local_and_global_gradients(target, sources)`.

    Raises:
        ValueError: If `hvd.init()` was not called, or `gradtape` is distributed already, or arguments do not fit
            each other.
        TypeError: If `gradtape` is no `tf.GradientTape`, or `compression` no compressor.
        NotImplementedError: For Adasum on a number of ranks that is no power of two.
    """
    _check(gradtape)
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
    # On the class, as the state in __dict__ is shared with the plain tape.
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
    """Average the gradients of all layers but some, which each rank trains by itself.

    Args:
        gradtape: As for `DistributedGradientTape`, and so are the arguments not named here.
        local_layers: A Keras layer or several, built, whose gradients stay on their rank.

    Returns:
        A tape like that of `DistributedGradientTape`.

    Raises:
        ValueError: As `DistributedGradientTape`, and if `local_layers` holds something else than built layers.
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
    """Reduces what `gradient` returns. Mixed into the tape's own class."""

    _hvdtrain_reduction: Reduction

    def register_local_source(self, source: Any) -> None:
        """Leave the gradient of a source on its rank, which then trains it by itself."""
        self._hvdtrain_reduction.keep_local(source)

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Differentiate as `tf.GradientTape.gradient` does, and combines the gradients of all ranks.

        Args:
            target: What to differentiate.
            sources: Variables or tensors, in any nest, the same on all ranks.
            output_gradients: Gradients of the targets, if they are not ones.
            use_generic_names: Accepted for Horovod's sake.
            unconnected_gradients: What stands for a gradient that there is not; None by default.

        Returns:
            Gradients in the nest of `sources`: tensors, `tf.IndexedSlices` or None.

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
        """Tells local from combined gradients.

        Args:
            target: As for `gradient`, and so are the other arguments.
            sources: A flat list.

        Returns:
            Two lists of pairs of source and gradient: those of local sources, and the others.
        """
        gradients = self.gradient(target, sources, output_gradients, use_generic_names)
        pairs = list(zip(sources, gradients, strict=True))
        is_local = self._hvdtrain_reduction.is_local
        return [each for each in pairs if is_local(each[0])], [
            each for each in pairs if not is_local(each[0])
        ]


def _check(gradtape: Any) -> None:
    if not isinstance(gradtape, tf.GradientTape):
        raise TypeError(
            "DistributedGradientTape takes the tape itself: hvd.DistributedGradientTape(tape). Received: "
            f"{gradtape!r} of type {type(gradtape).__name__}."
        )
    if isinstance(gradtape, _Distributed):
        raise ValueError("This tape is distributed already. Wrapping it twice would reduce twice.")
