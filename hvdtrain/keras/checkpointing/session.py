"""One `fit` with checkpoints: what it goes on from, when it writes, how it stops."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from hvdtrain import heartbeat
from hvdtrain.data.collective_errors import together
from hvdtrain.data.shard import Sharded
from hvdtrain.keras.callbacks.membership import engine_of
from hvdtrain.keras.checkpointing import saved_state as saving
from hvdtrain.keras.checkpointing.callback_order import in_order, keep_history, whose_state_counts
from hvdtrain.keras.checkpointing.restoring import Opening
from hvdtrain.keras.checkpointing.saved_state import Place, Saved
from hvdtrain.keras.checkpointing.stop_agreement import NOTHING, STOP, Wishes
from hvdtrain.keras.checkpointing.store import Store
from hvdtrain.keras.checkpointing.training_state import TrainingState
from hvdtrain.stop_request import Preempted


@dataclass(frozen=True)
class Plan:
    """What a user asks of checkpoints; see `hvd.callbacks.Checkpoint`."""

    directory: Path
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 3

    @property
    def by_epochs(self) -> bool:
        """Whether each epoch ends with a checkpoint."""
        return self.every_steps is None and self.every_minutes is None


class Run:
    """One `fit` with checkpoints.

    Args:
        plan: What the user asked for.
        callback: The user's callback, which hands events on to this.
        model: The model.
        given: The arguments of `fit`, among which the callbacks are put in order.
    """

    def __init__(
        self, plan: Plan, callback: keras.callbacks.Callback, model: keras.Model, given: dict[str, Any]
    ) -> None:
        keep_history(given)
        self._plan, self._callback, self._model, self._given = plan, callback, model, given
        self._engine = engine_of(model)
        self._state = TrainingState(model, self._engine, whose_state_counts(given, callback))
        self.wishes = Wishes(self._engine, plan.every_minutes)
        self._opening = Opening(self._state, None)
        self._store = Store(plan.directory, plan.keep, self._engine)
        self._saved: Saved | None = None
        self._epoch = self._step = self._total = 0
        self._due = NOTHING

    def open(self, again: bool) -> None:
        """Find the newest whole checkpoint, and prepares to go on from it.

        Args:
            again: Whether this process has come to the end of a `fit` with the same directory before.
        """
        entry = together(self._engine, "Checkpoint", self._store.open)
        self._saved = saving.read(entry, self._engine)
        if self._saved is not None:
            self._go_on_from(self._saved, again)
        self._opening = Opening(self._state, self._saved)
        self._given["callbacks"] = in_order(self._model, self._given, self._opening, self._callback)

    def close(self) -> None:
        """End the writing, and gives everything back."""
        self.wishes.end()
        heartbeat.ask_patience(0)
        self._opening.leave(self._model)
        self._model._initial_epoch = None
        self._store.close()

    def begin(self) -> None:
        """Make sure that an epoch which was cut in two has as many steps as before, and listens for signals."""
        before, now = (self._saved.place if self._saved else Place()), self._model_steps
        if before.step and None not in (before.steps, now) and before.steps != now:
            raise ValueError(
                f"{self._plan.directory} has a checkpoint from within an epoch of {before.steps} steps, and now an "
                f"epoch has {now}. Go on with the same data and the same global batch, or begin anew in another "
                "directory."
            )
        self.wishes.begin()
        heartbeat.ask_patience(self.wishes.patience)

    def begin_epoch(self, epoch: int) -> None:
        """Begin to count steps."""
        self._epoch, self._step = epoch, 0

    def after_step(self, step: int) -> None:
        """Count, and writes or stops if it is time; to write at an epoch's last step waits for its end."""
        if self._opening.replaying:
            self._step = step
            self._opening.replayed(step)
            return
        before = self._total
        self._total += step - self._step
        self._step = step
        every = self._plan.every_steps
        counted = every is not None and before // every != self._total // every
        self._due = max(self._due, self.wishes.after_step(), int(counted))
        if self._due and (step != self._model_steps or self._due == STOP):
            self._act(Place(self._epoch, step, self._total, self._model_steps))

    def after_epoch(self, epochs: int) -> None:
        """Write or stops at the end of an epoch."""
        self._due = max(self._due, self.wishes.ask(), int(self._plan.by_epochs))
        self._epoch, self._step = epochs, 0
        ends = epochs >= self._given.get("epochs", 1) or self._model.stop_training
        if self._due and not ends:
            self._act(Place(epochs, 0, self._total, self._model_steps))

    def finish(self) -> None:
        """Write the last checkpoint, unless nothing was trained since it was written."""
        if self._saved is not None and self._saved.place.finished and self._total == self._saved.place.total:
            return
        stopped = bool(self._model.stop_training) and self._epoch < self._given.get("epochs", 1)
        self._save(Place(self._epoch, 0, self._total, self._model_steps, finished=True, stopped=stopped))

    @property
    def _model_steps(self) -> int | None:
        return (self._callback.params or {}).get("steps")

    def _go_on_from(self, saved: Saved, again: bool) -> None:
        place, epochs = saved.place, self._given.get("epochs", 1)
        done = place.stopped or place.epoch >= epochs
        if done and again and self._given.get("initial_epoch", 0) < epochs:
            raise ValueError(
                f"{saved.entry} holds the end of an earlier model.fit of this script, so this one would train "
                "nothing. Give each fit a directory of its own, or count on: model.fit(initial_epoch=…, epochs=…)."
            )
        if place.step % self._model.steps_per_execution:
            raise ValueError(
                f"{saved.entry} was written after step {place.step} of its epoch, which steps_per_execution="
                f"{self._model.steps_per_execution} does not divide. Compile as before."
            )
        self._total = place.total
        self._epoch = place.epoch
        self._model._initial_epoch = max(place.epoch, epochs) if done else place.epoch
        self._state.callbacks.prepare()
        self._move_data(saved)
        self._tell(saved, done)

    def _move_data(self, saved: Saved) -> None:
        data, moved = self._given.get("x"), saved.facts["data"]
        if isinstance(data, Sharded) and moved:
            data.go_on(**moved, read=saved.place.total - saved.place.step)

    def _tell(self, saved: Saved, done: bool) -> None:
        place = saved.place
        if done:
            why = "it had ended early" if place.stopped else f"all {place.epoch} epochs are done"
            self._engine.say(
                f"nothing is left to train: {why}, says {saved.entry}. In another directory training begins anew."
            )
            return
        ranks = saved.facts["ranks"]
        other = "" if ranks == self._engine.size else f", written by {ranks} ranks"
        self._engine.say(f"going on from {saved.entry}{other}: {place}.")

    def _act(self, place: Place) -> None:
        """Write a checkpoint; and ends the training where that is wanted."""
        stops = self._due == STOP
        self._due = NOTHING
        self._save(place)
        if stops:
            self._stop(place)

    def _save(self, place: Place) -> None:
        started = time.monotonic()
        data = self._given.get("x")
        facts = {"data": data.position.origin() if isinstance(data, Sharded) else None}
        make = self._state.capture(place, facts)
        self._store.submit(place.total, make)
        self.wishes.saved(time.monotonic() - started)
        heartbeat.ask_patience(self.wishes.patience)

    def _stop(self, place: Place) -> None:
        newest, failure = self._store.settle()
        found = (
            f"but {failure}" if failure else f"and {newest} is written. The same command goes on from there."
        )
        sentence = f"training stopped at {place}, because {self.wishes.reasons()}, {found}"
        if not heartbeat.is_watched():  # else the launcher says it, as its last word
            self._engine.say(sentence)
        raise Preempted(sentence)
