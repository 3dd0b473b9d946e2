"""Tell the runner of the suite what pytest does on each rank: a line of JSON for each event, into a pipe.

The runner cannot read this from pytest's output: on several ranks only rank 0 prints, and nothing shows that a test
has begun.
"""

import contextlib
import faulthandler
import json
import os
import signal

import pytest

# Names the pipe. Taken out of the environment again, so that no process started by a test writes to it.
PIPE = "HVDTRAIN_TEST_EVENTS"
# With this signal a process prints the stacks of its threads. Neither MPI, hvdtrain nor a test uses it.
STACKS = signal.SIGRTMAX - 6


class Events:
    """A pytest plugin that reports the beginning and the end of every phase of a test.

    Where workers of pytest-xdist run the tests, their controller reports, and they only say that they are there.

    Args:
        path: The pipe.
        rank: This process.
    """

    def __init__(self, path: str, rank: int) -> None:
        self._path, self._pipe, self._rank = path, os.open(path, os.O_WRONLY), rank
        # A copy of standard error from before pytest captures it.
        faulthandler.register(STACKS, file=os.dup(2), all_threads=True)
        self._tell("process", pid=os.getpid())

    def pytest_collection_finish(self, session) -> None:
        self._tell("collected", tests=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput[PIPE] = self._path

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self._tell("collected", tests=len(ids))

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._tell("failed", test=report.nodeid)

    def pytest_runtest_logstart(self, nodeid) -> None:
        self._tell("started", test=nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        self._tell("phase", test=report.nodeid, seconds=report.duration)
        if report.failed:
            self._tell("failed", test=report.nodeid)
        elif report.skipped:
            self._tell("skipped", test=report.nodeid, why=_reason(report))

    def pytest_runtest_logfinish(self, nodeid) -> None:
        self._tell("finished", test=nodeid)

    def pytest_report_teststatus(self, report):
        """Leave out pytest's dots: the runner prints how far the tests are."""
        if report.failed:
            return None
        return report.outcome if report.skipped or report.when == "call" else "", "", ""

    def _tell(self, kind: str, **facts) -> None:
        line = json.dumps({"kind": kind, "rank": self._rank, **facts}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # the runner is gone; the tests may go on
            os.write(self._pipe, line.encode())


def _reason(report) -> str:
    words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return words.removeprefix("Skipped: ")[:500]
