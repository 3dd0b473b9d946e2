"""Run operations during the computation, one after the other, in a thread that sleeps while it waits."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class BackgroundThread:
    """A thread that runs functions in the order in which they were added, while the caller continues.

    After an error no function runs until `finish` has raised it: the ranks may no longer be at the same operation.

    Attributes:
        is_awaited: True while the caller waits in `finish`.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unfinished = 0
        self.is_awaited = False
        self._results: list[Any] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def is_current(self) -> bool:
        """True in the thread that runs the functions."""
        return threading.current_thread() is self._thread

    @property
    def is_busy(self) -> bool:
        """True while there are functions whose results or errors were not fetched by `finish`."""
        return bool(self._unfinished or self._results or self._error)

    def start(self, function: Callable[[], Any]) -> None:
        """Add a function, which runs after all earlier ones."""
        if self._thread is None:
            # A daemon thread does not keep a process alive whose script has failed.
            self._thread = threading.Thread(target=self._run, name="hvdtrain-background", daemon=True)
            self._thread.start()
        with self._changed:
            self._unfinished += 1
        self._queue.put(function)

    def finish(self) -> list[Any]:
        """Wait until all functions have run.

        Returns:
            The results of the functions, in order.

        Raises:
            BaseException: The first error, unmodified.
        """
        with self._changed:
            self.is_awaited = True
            self._changed.wait_for(lambda: not self._unfinished)
            self.is_awaited = False
            results, self._results = self._results, []
            error, self._error = self._error, None
        if error is not None:
            raise error
        return results

    def end(self) -> None:
        """Wait until all functions have run, with or without an error, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            result, error = None, self._error
            if error is None:
                try:
                    result = function()
                except BaseException as raised:  # raised by `finish`
                    error = raised
            with self._changed:
                self._results.append(result)
                self._error = error
                self._unfinished -= 1
                self._changed.notify_all()
            # Without this, the gradients of a step stay in memory until the next step.
            del function, result, error
