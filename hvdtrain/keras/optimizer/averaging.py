"""Train on each rank by itself and average the weights after some steps: `LocalSGD` and `DiLoCo`."""

import functools
import platform
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.collectives.engine import Engine
from hvdtrain.collectives.single import SingleEngine
from hvdtrain.data.global_batch import outside_of_batches
from hvdtrain.gradients.options import ReduceOptions
from hvdtrain.gradients.reducer import GradientReducer
from hvdtrain.gradients.trained_variables import registry
from hvdtrain.gradients.verification import Policy, Verification
from hvdtrain.keras.optimizer.copying import copy_loss_scale, copy_with
from hvdtrain.keras.optimizer.distributed import DistributedMixin, check_optimizer, make_distributed
from hvdtrain.runtime.process_sets import global_process_set

_BETWEEN = ("ranks", "hosts")


def LocalSGD(  # noqa: N802 - named like an optimizer
    optimizer: keras.optimizers.Optimizer,
    every: int = 8,
    start_after: int = 0,
    between: str = "ranks",
    compression: Any = Compression.none,
) -> keras.optimizers.Optimizer:
    """Return an optimizer with which each rank trains by itself, and the weights are averaged after some steps.

    A step sends nothing; `every` steps send as much as one step of `hvd.DistributedOptimizer`. What the ranks
    learn is no longer what one process learns: the more steps between two averages, the further apart are the
    gradients that are averaged (Stich 2019, arXiv:1805.09767). The optimizer's own state, such as momentum, stays
    on its rank.

    In `model.fit` the weights are also averaged at the end of each epoch, before validation, so that callbacks,
    files and metrics are those of the average, and all ranks end with the same weights. In your own training loop
    call `optimizer.average_weights()` before you evaluate or save.

    Args:
        optimizer: Any `keras.optimizers.Optimizer`; it is copied.
        every: Number of steps after which the weights are averaged.
        start_after: Number of first steps in which the gradients are averaged, as by `hvd.DistributedOptimizer`
            (post- local SGD: Lin et al. 2018, arXiv:1808.07217).
        between: "ranks", or "hosts": then each step averages the gradients of the ranks of a host, and only between
            hosts the weights are averaged.
        compression: How the change of the weights since the last average is sent; see `hvd.DistributedOptimizer`.

    Returns:
        An optimizer for `model.compile`, or for `apply_gradients` and `apply` in your own training loop.

    Raises:
        ValueError: If `hvd.init()` was not called, or an argument has no such value.
        TypeError: If `optimizer` is not a Keras optimizer, or `compression` is not a compressor.
    """
    # The mean of the weights: the last average, changed by the mean of the ranks' changes.
    return _averaged(
        optimizer, keras.optimizers.SGD(1.0), every, start_after, between, compression, "LocalSGD"
    )


def DiLoCo(  # noqa: N802 - the name of the paper
    optimizer: keras.optimizers.Optimizer,
    outer: keras.optimizers.Optimizer | None = None,
    every: int = 64,
    start_after: int = 0,
    between: str = "ranks",
    compression: Any = Compression.none,
) -> keras.optimizers.Optimizer:
    """Return an optimizer that trains as with `LocalSGD`, but changes the common weights by an outer optimizer.

    After `every` steps the mean change of the weights over the ranks is, with its sign reversed, the gradient for
    `outer`, whose momentum lasts from one average to the next (Douillard et al. 2023, arXiv:2311.08105). Beside the
    model a rank holds the last common weights and the state of `outer`.

    Args:
        optimizer: The optimizer of each rank; the paper takes AdamW.
        outer: The optimizer of the common weights; `SGD(0.7, momentum=0.9, nesterov=True)` by default, as in the
            paper.
        every: As for `LocalSGD`, like the other arguments.

    Returns:
        An optimizer like the one that `LocalSGD` returns.

    Raises:
        ValueError: As `LocalSGD`.
        TypeError: As `LocalSGD`, and if `outer` is not a Keras optimizer.
    """
    outer = outer or keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
    check_optimizer(outer, "outer")
    return _averaged(optimizer, outer, every, start_after, between, compression, "DiLoCo")


def _averaged(
    optimizer: Any, outer: Any, every: int, start_after: int, between: str, compression: Any, name: str
) -> Any:
    for argument, value, least in (("every", every, 1), ("start_after", start_after, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name}: {argument} is a number of steps of at least {least}. Received: {argument}={value!r}."
            )
    if between not in _BETWEEN:
        raise ValueError(f'{name}: between must be "ranks" or "hosts". Received: between={between!r}.')
    engine = runtime.engine()
    check_optimizer(optimizer, name)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _averaged(optimizer.inner_optimizer, outer, every, start_after, between, compression, name)
        return copy_loss_scale(optimizer, inner, "register_local_var", "process_set", "average_weights")
    if optimizer.use_ema:
        raise ValueError(
            f"{name}: use_ema=True replaces the weights by moving averages of one rank's weights. Leave it out: "
            "the average over the ranks serves the same purpose."
        )
    # The ranks compare these names, and Horovod's core allows letters, digits and few signs in them.
    arguments = f"every-{every}.start_after-{start_after}.between-{between}"
    options = ReduceOptions(f"{name}{type(optimizer).__name__}.{arguments}", scale_local=False)
    sent = ReduceOptions(f"{name}.{arguments}", compression=compression, subject="changes of the weights")
    attributes = {
        "_hvdtrain_options": options,
        "_hvdtrain_policy": Policy.from_environment(),
        "_hvdtrain_steps_summed": 1,
        "_hvdtrain_every": every,
        "_hvdtrain_start_after": start_after,
        "_hvdtrain_within": _of_this_host(engine) if between == "hosts" else SingleEngine(),
        "_hvdtrain_make_outer": staticmethod(
            lambda: make_distributed(outer, sent, global_process_set, 1, False)
        ),
        "process_set": global_process_set,
    }
    return copy_with(optimizer, _Averaged, attributes)


def _of_this_host(engine: Engine) -> Engine:
    """Return an engine of the ranks on this host; all ranks call this."""
    hosts: dict[str, list[int]] = {}
    for rank, host in enumerate(engine.allgather_object(platform.node())):
        hosts.setdefault(host, []).append(rank)
    if len(hosts) == 1:
        engine.say(
            'between="hosts": all ranks are on one host, so each step averages the gradients of all of them.'
        )
    mine: Engine = SingleEngine()
    for ranks in hosts.values():
        mine = engine.subset(ranks) or mine
    return mine


class _Averaged(DistributedMixin):
    """A mixin for the user's optimizer class that averages the weights after some steps."""

    _hvdtrain_every: int
    _hvdtrain_start_after: int
    _hvdtrain_within: Engine
    _hvdtrain_make_outer: Any
    built: bool
    name: str

    def build(self, variables: Any) -> None:
        """Create the optimizer's variables, and those of the average."""
        if not self.built:
            self._hvdtrain_common.build(variables)
        super().build(variables)  # type: ignore[misc]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Update the variables of this rank, and average them if it is time; see `keras.optimizers.Optimizer`."""
        if len(grads) == 0 or runtime.engine().size == 1:
            return super().apply(grads, trainable_variables)
        if trainable_variables is not None and not self.built:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        common = self._hvdtrain_common
        common.before_step()
        result = super().apply(grads, trainable_variables)
        common.after_step()
        return result

    def average_weights(self) -> None:
        """Average the weights now, unless no step was made since the last time. All ranks call this."""
        if self.built and runtime.engine().size > 1:
            self._hvdtrain_common.finish()

    def register_local_var(self, var: Any) -> None:
        """Let each rank train a variable separately: neither its gradient nor its value is averaged."""
        super().register_local_var(var)
        self._hvdtrain_within_host.keep_local(var)

    @property
    def _hvdtrain_reducers(self) -> list[GradientReducer]:
        return [self._hvdtrain_reducer, self._hvdtrain_common.outer._hvdtrain_reducer]

    @functools.cached_property
    def _hvdtrain_common(self) -> "CommonWeights":
        with tf.init_scope():  # its variables may be created while a graph is traced
            return CommonWeights(
                self._hvdtrain_make_outer(),
                self._hvdtrain_every,
                self._hvdtrain_start_after,
                self._hvdtrain_reducer.is_local,
            )

    @functools.cached_property
    def _hvdtrain_within_host(self) -> GradientReducer:
        engine, options = self._hvdtrain_within, self._hvdtrain_options
        # Which ranks hold the same weights changes with the step; the average is verified.
        return GradientReducer(engine, TensorFlowBridge(), options, Verification(engine, options, Policy(0)))

    def _hvdtrain_reduced(self, grads: Sequence[Any], variables: Sequence[Any], state: Sequence[Any]) -> Any:
        """Average gradients over the ranks of this host, or over all ranks in the first steps."""
        within = functools.partial(self._hvdtrain_within_host, grads, variables, [])
        if not self._hvdtrain_start_after:
            reduced = within()
        else:
            over_all = functools.partial(self._hvdtrain_reducer, grads, variables, state)
            reduced = tf.cond(self._hvdtrain_common.is_local, within, over_all)
        registry.note_averaged(runtime.engine(), TensorFlowBridge().readable(variables))
        return reduced


class CommonWeights:
    """The weights that all ranks had after the last average, and what changes them.

    Args:
        outer: A distributed optimizer, for which the reversed changes of the weights since then are gradients.
        every: Number of steps between two averages.
        start_after: Number of first steps after which the weights of the ranks are the same anyway.
        is_excluded: Returns whether each rank keeps its own values of a variable.
    """

    def __init__(self, outer: Any, every: int, start_after: int, is_excluded: Any) -> None:
        self.outer = outer
        self._every, self._start_after, self._is_excluded = every, start_after, is_excluded
        self._trained: list[Any] = []
        self._common: list[Any] = []
        self._done = tf.Variable(0, trainable=False, dtype=tf.int64, name="steps")
        self._since = tf.Variable(0, trainable=False, dtype=tf.int64, name="steps_since_average")
        # False until the first step that is local, and after the weights may have been set by other means.
        self._is_current = tf.Variable(False, trainable=False, name="common_weights_are_current")

    @property
    def variables(self) -> list[Any]:
        """All variables, as far as they exist; a checkpoint contains them."""
        return [self._done, self._since, self._is_current, *self._common, *self.outer.variables]

    @property
    def is_local(self) -> Any:
        """Bool tensor: whether the current step averages no gradients over all ranks."""
        return self._done >= self._start_after

    def build(self, variables: Sequence[Any]) -> None:
        """Create the common weights of the variables that are trained."""
        self._trained = list(variables)
        for variable in self._trained:
            common = keras.Variable("zeros", variable.shape, variable.dtype, name="common")
            common._path = variable.path  # the name of the weight in messages
            self._common.append(common)
        self.outer.build(self._common)

    def before_step(self) -> None:
        """Record the common weights before the first step that is local."""

        def record() -> Any:
            for common, variable in self._pairs():
                common.assign(variable)
            self._is_current.assign(True)
            return tf.constant(True)

        tf.cond(self.is_local & ~self._is_current, record, lambda: tf.constant(True))

    def after_step(self) -> None:
        """Count the step, and average if it is time."""
        self._since.assign_add(tf.cast(self.is_local, tf.int64))
        self._done.assign_add(1)
        tf.cond(self._since >= self._every, self._average, lambda: tf.constant(True))

    def finish(self) -> None:
        """Average now, eagerly, unless no local step was made since the last average."""
        if self._since.numpy():
            self._average()

    def forget(self) -> None:
        """Take the weights as they are for the common ones: something else may have set them."""
        self._is_current.assign(False)
        self._since.assign(0)

    def _pairs(self) -> list[tuple[Any, Any]]:
        """Return common weights and variables, without those that each rank keeps for itself."""
        both = zip(self._common, self._trained, strict=True)
        return [(common, variable) for common, variable in both if not self._is_excluded(variable)]

    def _average(self) -> Any:
        pairs = self._pairs()
        changes = [common.value - tf.cast(variable.value, common.dtype) for common, variable in pairs]
        with outside_of_batches():  # the number of this rank's samples is in its gradients already
            self.outer.apply(changes, [common for common, _ in pairs])
        for common, variable in pairs:
            variable.assign(common)
        self._since.assign(0)
        return tf.constant(True)


class AverageWeights(keras.callbacks.Callback):
    """Averages the weights before each validation, at the end of each epoch and of training.

    Args:
        common_weights: Those of the model's optimizers.
    """

    def __init__(self, common_weights: Sequence[CommonWeights]) -> None:
        super().__init__()
        self._common_weights = common_weights

    def on_train_begin(self, logs: Any = None) -> None:
        """Start from the weights that the model has now, or that a checkpoint restores after this."""
        for common in self._common_weights:
            common.forget()

    def on_test_begin(self, logs: Any = None) -> None:
        """Average before a validation."""
        self._finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Average at the end of an epoch."""
        self._finish()

    def on_train_end(self, logs: Any = None) -> None:
        """Average at the end of training, which may be within an epoch."""
        self._finish()

    def _finish(self) -> None:
        for common in self._common_weights:
            common.finish()


def common_weights_of(optimizers: Sequence[Any]) -> list[CommonWeights]:
    """List the averages of those optimizers that have one."""
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in optimizers]
    return [optimizer._hvdtrain_common for optimizer in inner if isinstance(optimizer, _Averaged)]
