"""The whole suite: once in one process, then on every engine and number of ranks. `make test` runs it.

    python tests/run_all.py --quick                          `make test`: all areas, without tests that start jobs
    python tests/run_all.py                                  `make test-all`: each test once, and what depends on
                                                             engine and size on all of them
    python tests/run_all.py --full                           everything on every engine and number of ranks
    python tests/run_all.py --cluster                        `make test-cluster`: on a real Slurm
    python tests/run_all.py --one tests/keras/test_contract.py --sizes 2 --engines mpi     `make one`
    python tests/run_all.py --engines mpi --sizes 2 -- -k allreduce

TensorFlow takes seconds to import on each rank, so one launch runs all tests of an engine and a size.
"""

import argparse
import signal
import sys

from runner import descendants, following, launches
from runner.reporting import Report

WITHOUT = (
    "Left out: most jobs, slow tests, 1 and 4 ranks, half of Horovod's core (make test-all); "
    "a real Slurm (make test-cluster)."
)


def main() -> int:
    """Run what was asked for; the exit code is 0 only if every launch ran tests and none failed."""
    options = _options()
    if options.quick:
        print(WITHOUT)
    planned = _planned(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    descendants.adopt_orphans()
    return _run(planned, options.extra, record=not options.one and not options.extra)


def _run(planned: list[launches.Launch], extra: list[str], record: bool) -> int:
    report = Report(planned) if record else Report(planned, record=None)
    worst = 0
    try:
        for launch in planned:
            report.begin(launch)
            code = following.follow(launch, extra, report.hear, report.show)
            report.end(launch, code)
            worst = max(worst, int(code != 0))
    except following.Stopped as stopped:
        report.show(f"\nEnded by {signal.Signals(stopped.number).name}, with all that was started.\n")
        report.count(launch)
        worst = 128 + stopped.number
    report.close()
    return worst


def _stop(number: int, frame: object) -> None:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # the end is under way
    raise following.Stopped(number)


def _planned(options: argparse.Namespace) -> list[launches.Launch]:
    if options.cluster:
        return [launches.cluster()]
    if options.one:
        size = (options.sizes or [2])[0]
        return [launches.one(options.one, size, (options.engines or [""])[0])]
    engines = launches.without_horovod(tuple(options.engines or launches.ENGINES))
    if options.quick:
        return launches.quick(engines)
    return launches.whole(engines, options.sizes, options.full)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=launches.ENGINES)
    parser.add_argument("--sizes", nargs="+", type=int)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="all areas within minutes")
    what.add_argument("--full", action="store_true", help="all tests on 1, 2 and 4 ranks of both engines")
    what.add_argument("--cluster", action="store_true", help="the tests on a real Slurm")
    what.add_argument("--one", metavar="PATH", help="one file, on --sizes ranks")
    parser.add_argument("extra", nargs="*", help="more arguments for pytest, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
