"""Operations that go on beside the computation, one after the other in a thread that sleeps while it waits."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Beside:
    """Does what it is given, in that order, while the caller goes on.

    After an error nothing more is done until `finish` has raised it: the ranks may no longer be at the same place.

    Attributes:
        is_awaited: True while the caller has nothing else to do than to wait for the end.
    """

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._left = 0
        self.is_awaited = False
        self._done: list[Any] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def is_here(self) -> bool:
        """True in the thread that does the work."""
        return threading.current_thread() is self._thread

    @property
    def is_busy(self) -> bool:
        """True while there is work whose results nobody has fetched."""
        return bool(self._left or self._done or self._error)

    def start(self, work: Callable[[], Any]) -> None:
        """Give it something to do."""
        if self._thread is None:
            # As a daemon, it keeps no process alive whose script has failed meanwhile.
            self._thread = threading.Thread(target=self._work, name="hvdtrain-beside", daemon=True)
            self._thread.start()
        with self._changed:
            self._left += 1
        self._given.put(work)

    def finish(self) -> list[Any]:
        """Wait until all is done.

        Returns:
            What each piece of work has returned, in order.

        Raises:
            BaseException: The first error, as it was raised.
        """
        with self._changed:
            self.is_awaited = True
            self._changed.wait_for(lambda: not self._left)
            self.is_awaited = False
            done, self._done = self._done, []
            error, self._error = self._error, None
        if error is not None:
            raise error
        return done

    def end(self) -> None:
        """Wait until all is done, whatever came of it, and ends the thread."""
        if self._thread is not None:
            self._given.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (work := self._given.get()) is not None:
            result, error = None, self._error
            if error is None:
                try:
                    result = work()
                except BaseException as raised:  # whoever finishes gets it
                    error = raised
            with self._changed:
                self._done.append(result)
                self._error = error
                self._left -= 1
                self._changed.notify_all()
            del work, result, error  # the gradients of a step are not to be held until the next one
