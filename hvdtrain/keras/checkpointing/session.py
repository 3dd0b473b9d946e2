"""Run one `fit` with checkpoints: resume it, write when due, and stop on request."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from hvdtrain import heartbeat
from hvdtrain.data.shard import Sharded
from hvdtrain.keras.checkpointing.checkpoint_files import Place, Saved, Store
from hvdtrain.keras.checkpointing.restoring import RestoreState, flat, in_order, keep_history
from hvdtrain.keras.checkpointing.stop_agreement import NOTHING, STOP, StopAgreement
from hvdtrain.keras.checkpointing.training_state import TrainingState
from hvdtrain.keras.membership import engine_of
from hvdtrain.stop_request import Preempted


@dataclass(frozen=True)
class Settings:
    """The arguments of `hvd.callbacks.Checkpoint`."""

    directory: Path
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 3


class CheckpointedFit:
    """One `fit` with checkpoints.

    Args:
        settings: The arguments of `Checkpoint`.
        callback: The user's `Checkpoint`, which forwards events to this object.
        model: The model.
        given: The arguments of `fit`; its callbacks are put in order.
    """

    def __init__(
        self,
        settings: Settings,
        callback: keras.callbacks.Callback,
        model: keras.Model,
        given: dict[str, Any],
    ) -> None:
        keep_history(given)
        self._settings, self._callback, self._model, self._given = settings, callback, model, given
        self._engine = engine_of(model)
        # A CallbackList that the script uses again contains the RestoreState of the fit before.
        own = (RestoreState, type(callback))
        with_state = [other for other in flat(given) if not isinstance(other, own)]
        self._state = TrainingState(model, self._engine, with_state)
        self._agreement = StopAgreement(self._engine, settings.every_minutes)
        self._restoring = RestoreState(self._state)
        self._store = Store(settings.directory, settings.keep, self._engine)
        self._by_epochs = settings.every_steps is None and settings.every_minutes is None
        self._epoch = self._step = self._total = 0
        self._due = NOTHING

    def open(self, again: bool) -> None:
        """Prepare to resume; `again` if this process has finished a `fit` with the same directory before."""
        saved = self._restoring.saved = self._store.open()
        if saved is not None:
            self._resume(saved, again)
        self._given["callbacks"] = in_order(
            self._model, self._given["callbacks"], self._restoring, self._callback
        )

    def close(self) -> None:
        """Finish writing, and restore the model, signal handlers and folder lock."""
        self._agreement.end()
        self._restoring.leave(self._model)
        self._model._initial_epoch = None
        self._store.close()

    def begin(self) -> None:
        """Check that a partly trained epoch has as many steps as before, and start listening for signals."""
        saved, now = self._restoring.saved, self._model_steps
        if saved and saved.place.step and None not in (saved.place.steps, now) and saved.place.steps != now:
            raise ValueError(
                f"{self._settings.directory} has a checkpoint from within an epoch of {saved.place.steps} steps, "
                f"and now an epoch has {now}. Resume with the same data and the same global batch, or start from "
                "the beginning in another directory."
            )
        self._agreement.begin()

    def begin_epoch(self, epoch: int) -> None:
        """Start counting the steps of an epoch."""
        self._epoch, self._step = epoch, 0

    def after_step(self, step: int) -> None:
        """Count steps, and write or stop if due; after the last step of an epoch, writing waits for its end."""
        if self._restoring.replaying:
            self._step = step
            self._restoring.replayed(step)
            return
        before = self._total
        self._total += step - self._step
        self._step = step
        every = self._settings.every_steps
        counted = every is not None and before // every != self._total // every
        self._due = max(self._due, self._agreement.after_step(), int(counted))
        if self._due and (step != self._model_steps or self._due == STOP):
            self._act(Place(self._epoch, step, self._total, self._model_steps))

    def after_epoch(self, epochs: int) -> None:
        """Write or stop, if due, at the end of an epoch."""
        self._due = max(self._due, self._agreement.ask(), int(self._by_epochs))
        self._epoch, self._step = epochs, 0
        ends = epochs >= self._given.get("epochs", 1) or self._model.stop_training
        if self._due and not ends:
            self._act(Place(epochs, 0, self._total, self._model_steps))

    def finish(self) -> None:
        """Write the last checkpoint, unless nothing was trained since the restored one."""
        saved = self._restoring.saved
        if saved is not None and saved.place.finished and self._total == saved.place.total:
            return
        stopped = bool(self._model.stop_training) and self._epoch < self._given.get("epochs", 1)
        self._save(Place(self._epoch, 0, self._total, self._model_steps, finished=True, stopped=stopped))

    @property
    def _model_steps(self) -> int | None:
        return (self._callback.params or {}).get("steps")

    def _resume(self, saved: Saved, again: bool) -> None:
        place, epochs = saved.place, self._given.get("epochs", 1)
        done = place.stopped or place.epoch >= epochs
        if done and again and self._given.get("initial_epoch", 0) < epochs:
            raise ValueError(
                f"{saved.entry} holds the end of an earlier model.fit of this script, so this one would train "
                "nothing. Give each fit its own directory, or count on: model.fit(initial_epoch=…, epochs=…)."
            )
        if place.step % self._model.steps_per_execution:
            raise ValueError(
                f"{saved.entry} was written after step {place.step} of its epoch, which is not a multiple of "
                f"steps_per_execution={self._model.steps_per_execution}. Compile the model as before."
            )
        self._total, self._epoch = place.total, place.epoch
        self._model._initial_epoch = max(place.epoch, epochs) if done else place.epoch
        self._state.callbacks.prepare()
        data, moved = self._given.get("x"), saved.facts["data"]
        if isinstance(data, Sharded) and moved:
            data.go_on(**moved, read=place.total - place.step)
        self._report(saved, done)

    def _report(self, saved: Saved, done: bool) -> None:
        place = saved.place
        if done:
            reason = "it ended early" if place.stopped else f"all {place.epoch} epochs are done"
            self._engine.say(
                f"nothing is left to train: {reason}, according to {saved.entry}. To train from the beginning, "
                "give another directory."
            )
            return
        ranks = saved.facts["ranks"]
        other = "" if ranks == self._engine.size else f", written by {ranks} ranks"
        self._engine.say(f"resuming from {saved.entry}{other}: {place}.")

    def _act(self, place: Place) -> None:
        """Write a checkpoint, and stop the training if a rank has asked for it."""
        stops = self._due == STOP
        self._due = NOTHING
        self._save(place)
        if stops:
            self._stop(place)

    def _save(self, place: Place) -> None:
        started = time.monotonic()
        data = self._given.get("x")
        facts = {"data": data.position.origin() if isinstance(data, Sharded) else None}
        self._store.submit(place.total, self._state.capture(place, facts))
        self._agreement.saved(time.monotonic() - started)

    def _stop(self, place: Place) -> None:
        newest, failure = self._store.settle()
        found = (
            f"but {failure}" if failure else f"and {newest} is written. The same command goes on from there."
        )
        message = f"training stopped at {place}, because {self._agreement.reasons()}, {found}"
        if not heartbeat.is_watched():  # else the launcher prints it at the end
            self._engine.say(message)
        raise Preempted(message)
