"""Change the learning rate during training, equally on all ranks."""

from collections.abc import Callable
from typing import Any

import keras

from hvdtrain import runtime
from hvdtrain.keras.membership import engine_of

# The optimizers whose velocity holds the learning rate: v = momentum * v - rate * gradient.
_RATE_IN_VELOCITY = (keras.optimizers.SGD, keras.optimizers.RMSprop)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Multiplies the learning rate from one epoch to another, in steps or smoothly.

    From `start_epoch` up to, but not including, `end_epoch` the rate is `initial_lr * multiplier`; before and
    after, it is not changed. Several such callbacks, one per interval, make a schedule. Training resumed with
    `model.fit(initial_epoch=3)` gets the rates from epoch 3 on. At the end of each epoch `logs["lr"]` is the rate.

    Momentum correction keeps the effect of the velocity when the rate changes: the velocity is multiplied by
    new rate / old rate (Goyal et al. 2017, arXiv:1706.02677, section 3, remark 2). Keras' SGD
    and RMSprop keep the rate inside their velocity and need it; other optimizers do not and are not changed.

    The API is Horovod's (https://horovod.readthedocs.io/en/stable/keras.html).

    Args:
        initial_lr: The rate that is multiplied; None for the optimizer's when the first epoch begins.
        multiplier: A number, or a function of the epoch that returns one.
        start_epoch: The first epoch of the interval, counted from 0.
        end_epoch: The first epoch after the interval; None for no end.
        staircase: True to set the rate at the start of each epoch, for which `multiplier` gets an integer; False
            to set it before each batch, for which it gets `epoch + batch / steps_per_epoch`.
        momentum_correction: Whether to correct the velocity.
        steps_per_epoch: Batches per epoch, for `staircase=False`; by default the number that `model.fit` has
            determined.

    Raises:
        ValueError: When training starts: if the optimizer's rate cannot be set, if the number of batches is not
            known, or if `initial_lr` is None and the optimizer has been trained before.
    """

    def __init__(
        self,
        initial_lr: float | None,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.initial_lr: Any = initial_lr
        self.multiplier = multiplier if callable(multiplier) else lambda epoch: multiplier
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch: Any = steps_per_epoch
        self._steps_given = steps_per_epoch
        self.current_epoch = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that the rate can be set and that the number of batches per epoch is known."""
        self._check_optimizer()
        if self.initial_lr is None:
            self.initial_lr = self._rate_of_first_step()
        if not self.staircase:
            self.steps_per_epoch = self._steps_given or self._known_steps()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Record the epoch, to which each batch adds a fraction."""
        self.current_epoch = epoch

    def on_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the rate, before the first batch of an epoch or before each batch."""
        if not self._applies(self.current_epoch):
            return
        if not self.staircase:
            self._set(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set(self.current_epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Report the rate as `logs["lr"]`."""
        if logs is not None:
            logs["lr"] = float(self._optimizer.learning_rate)

    @property
    def _optimizer(self) -> Any:
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    def _applies(self, epoch: int) -> bool:
        return self.start_epoch <= epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def _set(self, epoch: float) -> None:
        old = float(self._optimizer.learning_rate)
        self._optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = float(self._optimizer.learning_rate)
        if self.momentum_correction and old not in (0.0, new):
            for velocity in _velocities(self._optimizer):
                velocity.assign(velocity * (new / old))

    def _rate_of_first_step(self) -> float:
        # After some steps the rate may be one that a callback of this class has set.
        if int(self._optimizer.iterations):
            raise ValueError(
                f"{type(self).__name__}: initial_lr is missing, and the optimizer has done "
                f"{int(self._optimizer.iterations)} steps, so its rate may no longer be the initial one. Give the "
                f"rate: {type(self).__name__}(initial_lr=...)."
            )
        return float(self._optimizer.learning_rate)

    def _known_steps(self) -> int:
        steps = (self.params or {}).get("steps")
        if not steps:
            raise ValueError(
                f"{type(self).__name__} changes the rate within an epoch, but model.fit does not know how many "
                f"batches an epoch has. Give the number: {type(self).__name__}(..., steps_per_epoch=N)."
            )
        return steps

    def _check_optimizer(self) -> None:
        rate = getattr(self._optimizer, "_learning_rate", None)
        if callable(rate) and not isinstance(rate, keras.Variable):
            raise ValueError(
                f"{type(self).__name__} sets the learning rate, but that of this {type(self._optimizer).__name__} "
                f"comes from {type(rate).__name__}, which cannot be set. Give the optimizer a number, or leave "
                "this callback out."
            )
        if self.momentum_correction and _unknown_velocity(self._optimizer):
            runtime.engine().say(
                f"{type(self).__name__} does not know how {type(self._optimizer).__name__} uses its momentum, and "
                "leaves it uncorrected. momentum_correction=False silences this."
            )


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Warms up the learning rate for large batches, from `initial_lr / size` to `initial_lr`, batch by batch.

    N ranks have a batch N times as large, for which the rate of one process is usually multiplied by N; at the
    start this is too much. With `size` the number of ranks that train the model, the rate before each batch is
    (Goyal et al. 2017, arXiv:1706.02677, section 2.2)

        epoch     = full epochs + batch / steps_per_epoch
        lr(epoch) = initial_lr / size * ((size - 1) / warmup_epochs * epoch + 1)

    and at the end of each epoch the rate of the next is set, so that the final rate is exactly `initial_lr`.

    Args:
        initial_lr: The rate after the warm-up, usually that of one process times `hvd.size()`; None for the
            optimizer's.
        warmup_epochs: Number of epochs that the warm-up takes.
        momentum_correction: See `LearningRateScheduleCallback`.
        steps_per_epoch: Batches per epoch; by default the number that `model.fit` has determined.
        verbose: 1 to print, on rank 0, when the warm-up is over.

    Raises:
        ValueError: See `LearningRateScheduleCallback`.
    """

    def __init__(
        self,
        initial_lr: float | None = None,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            initial_lr,
            self._share,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the rate with which the next epoch starts, and report it."""
        if self._applies(epoch):
            self._set(epoch + 1)
        super().on_epoch_end(epoch, logs)
        finished = self._applies(epoch) and not self._applies(epoch + 1)
        if finished and self.verbose and engine_of(self.model).rank == 0:
            rate = float(self._optimizer.learning_rate)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.", flush=True)

    def _share(self, epoch: float) -> float:
        """Return the fraction of the full rate at an epoch, at most 1."""
        size = engine_of(self.model).size
        return min(1.0, ((size - 1) / self.warmup_epochs * epoch + 1) / size)


def _velocities(optimizer: Any) -> list[Any]:
    if not isinstance(optimizer, _RATE_IN_VELOCITY) or not optimizer.momentum:
        return []
    return getattr(optimizer, "momentums", None) or getattr(optimizer, "_momentums", [])


def _unknown_velocity(optimizer: Any) -> bool:
    known = (*_RATE_IN_VELOCITY, getattr(keras.optimizers, "Muon", keras.optimizers.SGD))
    return bool(getattr(optimizer, "momentum", 0)) and not isinstance(optimizer, known)
