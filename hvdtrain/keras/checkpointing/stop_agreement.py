"""Agree on saving or stopping: any rank may request it, and all ranks do it after the same step."""

import math
import signal
import time
from contextlib import ExitStack

from hvdtrain import heartbeat, settings, stop_request
from hvdtrain.collectives.engine import Call, Engine

NOTHING, SAVE, STOP = 0, 1, 2

_MEASURED = 8  # number of agreements after which their cost is known
_SHARE = 0.01  # fraction of the step time that agreements may take
_LONGEST = 1.0  # seconds between two agreements, if steps are short
_SLACK = 15.0  # seconds for the end of the process, in addition to measured times


class StopAgreement:
    """Agreement of all ranks after a step whether one of them requests to save or to stop.

    An agreement takes tens of microseconds. If that is more than 1 % of a step, the ranks agree only after every
    n-th step, so that the total cost stays below 1 %. Every `every_minutes` the first rank requests a checkpoint.
    """

    def __init__(self, engine: Engine, every_minutes: float | None) -> None:
        self._engine = engine
        self._every = None if every_minutes is None else every_minutes * 60
        self._deadline = _deadline()
        self._interval, self._steps, self._asked = 1, 0, 0
        self._saved_at = self._last_step = time.monotonic()
        self._asked_at: float | None = None
        self._cheapest, self._longest_gap, self._longest_save = math.inf, 0.0, 0.0
        self._times: list[float] = []
        self._listening = ExitStack()

    def begin(self) -> None:
        """Start listening for signals."""
        self._listening.enter_context(stop_request.hearing(signal.SIGUSR1, signal.SIGTERM))
        self._saved_at = self._last_step = time.monotonic()
        heartbeat.ask_patience(self._patience)

    def end(self) -> None:
        """Restore the earlier signal handlers."""
        self._listening.close()
        heartbeat.ask_patience(0)

    def saved(self, seconds: float) -> None:
        """Record that a checkpoint was made, and for how many seconds it stopped the training."""
        self._saved_at = self._last_step = time.monotonic()
        self._asked_at = None
        self._longest_save = max(self._longest_save, seconds)
        heartbeat.ask_patience(self._patience)

    def after_step(self) -> int:
        """Return the request of the ranks; called after each step, agrees only after some steps."""
        self._steps += 1
        now = time.monotonic()
        self._times.append(now - self._last_step)
        self._last_step = now
        return NOTHING if self._steps % self._interval else self.ask()

    def ask(self) -> int:
        """Agree with all ranks, and return NOTHING, SAVE or STOP."""
        before = time.monotonic()
        if self._asked_at is not None:  # not for the first step, which includes compilation
            self._longest_gap = max(self._longest_gap, before - self._asked_at)
        request = self._engine.agree(Call("a step's end"), self._own_request())
        self._asked_at = time.monotonic()
        self._cheapest = min(self._cheapest, self._asked_at - before)
        self._asked += 1
        if self._asked == _MEASURED:
            self._choose_interval()
        return request

    def reasons(self) -> str:
        """Return why the training stops; all ranks call this and get the same text."""
        told = self._engine.allgather_object(self._reason())
        for rank, reason in zip(self._engine.ranks, told, strict=True):
            if reason:
                return reason if told.count(reason) == len(told) else f"{reason} (on rank {rank})"
        return "it was asked to"

    @property
    def _patience(self) -> float:
        """Seconds that stopping may take at most."""
        return _SLACK + 3 * self._longest_save + 1.5 * self._longest_gap

    def _own_request(self) -> int:
        if self._reason():
            return STOP
        due = self._every is not None and time.monotonic() - self._saved_at >= self._every
        return SAVE if due and self._engine.rank == self._engine.ranks[0] else NOTHING

    def _reason(self) -> str | None:
        if stop_request.asked():
            return f"{stop_request.asked()} asked it to"
        if self._deadline is not None and time.time() + self._patience > self._deadline:
            return f"its time ends in {max(0, round(self._deadline - time.time()))} s"
        return None

    def _choose_interval(self) -> None:
        times = sorted(self._times)
        step = times[len(times) // 2] if times else _LONGEST
        wanted = math.ceil(self._cheapest / (_SHARE * max(step, 1e-6)))
        most = max(1, int(_LONGEST / max(step, 1e-6)))
        self._interval = self._engine.broadcast_object(max(1, min(wanted, most)), self._engine.ranks[0])


def _deadline() -> float | None:
    text = settings.get("HVDTRAIN_DEADLINE")
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(
            f"HVDTRAIN_DEADLINE must be a time in seconds since 1970, as `date +%s` prints it. Received: {text!r}."
        ) from None
