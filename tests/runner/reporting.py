"""Print how far the suite is, and at its end what took longest, what was skipped, and how it went."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from runner.launches import ROOT, Launch

# What each test took when it last ran here, so that the time left can be told from the first minute on.
RECORD = ROOT / ".cache" / "test_seconds.json"
EVERY = 30  # seconds between two lines where standard output is no terminal


class Report:
    """What is known of a run of the suite.

    Args:
        launches: What will run, in this order.
        record: The file with the seconds of earlier runs; None where this run says nothing of the next.
    """

    def __init__(self, launches: list[Launch], record: Path | None = RECORD) -> None:
        self._launches, self._record = launches, record
        self._known = _read(record) if record else {}
        self._begun = self._launch_begun = self._last_line = time.monotonic()
        self._phase = -1
        self._expected = 0  # tests of this launch
        self._test = ""
        self._outcome: dict[str, str] = {}  # of the tests of this launch
        self._seconds: dict[str, dict[str, float]] = {}
        self._totals, self._reasons = Counter(), Counter()
        self._live = sys.stdout.isatty()

    def begin(self, launch: Launch) -> None:
        self._phase += 1
        self._launch_begun = self._last_line = time.monotonic()
        self._expected, self._test, self._outcome = 0, "", {}
        self._seconds[str(launch)] = {}
        print(f"\n== {self._phase + 1} of {len(self._launches)}: {launch}", flush=True)

    def hear(self, event: dict) -> None:
        """Note an event of a rank. Rank 0 stands for all, except where a test fails."""
        kind = event["kind"]
        if kind == "tick":
            self._show_progress()
        elif kind == "failed":
            self._outcome[event["test"]] = "failed"
        elif event["rank"]:
            return
        elif kind == "collected":
            self._expected = event["tests"]
        elif kind == "started":
            self._test = event["test"]
        elif kind == "phase":
            seconds = self._seconds[str(self._launches[self._phase])]
            seconds[event["test"]] = seconds.get(event["test"], 0.0) + event["seconds"]
        elif kind == "skipped":
            self._outcome[event["test"]] = "skipped"
            self._reasons[event["why"]] += 1
        elif kind == "finished":
            self._outcome.setdefault(event["test"], "passed")

    def show(self, text: str) -> None:
        """Print what a launch prints."""
        sys.stdout.write(("\r\x1b[2K" if self._live else "") + text)
        sys.stdout.flush()

    def end(self, launch: Launch, code: int) -> None:
        """Count a launch that has ended by itself. A test in which it ended has failed."""
        if code and (self._test not in self._outcome or "failed" not in self._outcome.values()):
            self._outcome[self._test or str(launch)] = "failed"
            self.show(f"{launch} ended with exit code {code} in {self._test or 'no test'}.\n")
        self.count(launch)
        if not code:
            self._known[_key(launch)] = self._seconds[str(launch)]

    def count(self, launch: Launch) -> None:
        """Add the tests of a launch to the totals."""
        counts = Counter(self._outcome.values())
        if missing := max(self._expected - len(self._outcome), 0):
            counts["not run"] = missing
        self._totals += counts
        self.show(f"{launch}: {_words(counts)} in {_clock(time.monotonic() - self._launch_begun)}\n")

    def close(self) -> None:
        """Print the ten slowest tests, the reasons of what was skipped, and the closing line."""
        took = [
            (seconds, test, name) for name, tests in self._seconds.items() for test, seconds in tests.items()
        ]
        print("\nSlowest:")
        for seconds, test, name in sorted(took, reverse=True)[:10]:
            print(f"{seconds:7.1f} s  {test} ({name})")
        for why, count in sorted(self._reasons.items()):
            print(f"skipped {count}: {why}")
        if self._record:
            self._record.parent.mkdir(exist_ok=True)
            self._record.write_text(json.dumps(self._known))
        print(f"\n{_words(self._totals)} in {_clock(time.monotonic() - self._begun)}", flush=True)

    def _show_progress(self) -> None:
        if not self._live and time.monotonic() - self._last_line < EVERY:
            return
        self._last_line = time.monotonic()
        line = (
            f"{self._launches[self._phase]} ({self._phase + 1}/{len(self._launches)}) | "
            f"{len(self._outcome)}/{self._expected or '?'} tests | {_clock(self._last_line - self._begun)}"
            f"{self._left()} | {self._test}"
        )
        self.show(line[:110] if self._live else line + "\n")

    def _left(self) -> str:
        """Tell the time left: what the tests took when they last ran, at the pace of those that ran today."""
        elapsed = time.monotonic() - self._launch_begun
        known = self._known.get(_key(self._launches[self._phase]), {})
        done = sum(known.get(test, 0.0) for test in self._outcome)
        if done > 5:
            pace = elapsed / done
            later = [_key(launch) for launch in self._launches[self._phase + 1 :]]
            ahead = [sum(known.values()) - done, *(sum(self._known.get(key, {}).values()) for key in later)]
            unknown = sum(key not in self._known for key in later)
        elif self._outcome and self._expected:
            pace, unknown = elapsed / len(self._outcome), len(self._launches) - self._phase - 1
            ahead = [self._expected - len(self._outcome)]
        else:
            return ""
        more = f" and {unknown} more" if unknown else ""
        return f" | about {_clock(max(pace * sum(ahead), 0.0))} left{more}"


def _key(launch: Launch) -> str:
    return f"{launch}: {launch.marks}"


def _read(record: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _words(counts: Counter) -> str:
    always = f"{counts['passed']} passed, {counts['failed']} failed"
    return always + "".join(f", {counts[kind]} {kind}" for kind in ("skipped", "not run") if counts[kind])
