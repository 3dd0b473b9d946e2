"""When ranks that wait are worth a word, and when a job is lost, by what guards have told and when."""

import json
from dataclasses import asdict

import pytest

from hvdtrain.heartbeat import Beat, Limits
from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.hang_detector import HangDetector
from hvdtrain.launch.supervision.verdict import Verdict

WAITS = {"doing": "in allreduce of w", "waiting": 0.0, "waits": 7, "busy": False}
STACK = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3/threading.py", line 5 in wait

Current thread 0x2 (most recent call first):
  File "train.py", line 31 in load
  File "/x/hvdtrain/script.py", line 9 in _become_main
"""


class Told:
    """A job of which only is known what a test tells; time passes when the test says so."""

    def __init__(self, folder, size=4, report=60.0, abort=600.0):
        self.said, self.orders, self.now = [], [], 1000.0
        verdict = Verdict(size)
        for rank in range(size):
            verdict.note(rank, protocol.HELLO, json.dumps({"host": f"node{rank}"}).encode())
        self.verdict = verdict
        self.file = folder / "stacks.txt"
        self._hang_detector = HangDetector(
            verdict, self.orders.append, self.said.append, Limits(report, abort), self.file
        )

    def beat(self, *ranks, **facts):
        for rank in ranks:
            self._hear(rank, protocol.BEAT, asdict(Beat(pid=100 + rank, state="S", **facts)))
        return self

    def answer(self, *ranks, stacks="", **facts):
        for rank in ranks:
            beat = asdict(Beat(pid=100 + rank, state="S", **facts))
            self._hear(rank, protocol.STACK, {"beat": beat, "stacks": stacks, "waits_in": ""})
        return self

    def after(self, seconds):
        """Lets time pass, with a look every second as a job has it."""
        for _ in range(int(seconds)):
            self.now += 1
            if self.blame is None:
                assert self._hang_detector.check(self.now) == (self.blame is not None)
        return self

    @property
    def blame(self):
        """The rank that has failed because the job hangs, or None."""
        return self.verdict.first

    def _hear(self, rank, kind, payload):
        self.verdict.note(rank, kind, json.dumps(payload).encode(), self.now)


@pytest.fixture
def told(tmp_path):
    return lambda **how: Told(tmp_path, **how)


def test_nothing_is_said_as_long_as_nobody_waits(told):
    job = told().beat(0, 1, 2, 3, step=5).after(3000)
    assert (job.said, job.orders, job.blame) == ([], [], None)


def test_one_question_one_report_and_the_end(told):
    job = told().beat(0, 1, 3, step=311, **WAITS).beat(2, step=310, busy=False)
    assert job.after(59).orders == []
    assert job.after(3).orders == [protocol.LOOK]
    assert job.said == []
    waiting = {**WAITS, "waiting": 62.0}
    job.answer(0, 1, 3, step=311, stacks=STACK, **waiting).after(1)
    job.answer(2, step=310, stacks=STACK, busy=False)
    (said,) = job.after(2).said
    assert said.startswith(
        "hvdtrain: ranks 0,1,3 wait in allreduce of w at step 311 for 64 s; rank 2 is at step 310, in:\n"
        f'  File "train.py", line 31 in load\nThe stacks of all ranks are in {job.file}. '
    )
    assert job.file.read_text().count("line 31 in load") == 5  # of each rank, and in the sentence
    job.after(530)
    assert (len(job.said), len(job.orders), job.blame) == (1, 1, None)
    job.after(20)
    assert job.blame == 2
    report = job.verdict.ranks[2].report
    assert "longer than HVDTRAIN_STALL_ABORT_SECONDS=600 allows: ranks 0,1,3 wait" in report["text"]
    assert report["code"] == job.verdict.code() == 124


def test_what_is_over_when_all_have_answered_is_not_said(told):
    job = told().beat(0, 1, 3, step=9, **WAITS).beat(2, step=8, busy=False).after(62)
    assert job.orders == [protocol.LOOK]
    job.answer(0, 1, 2, 3, step=10).after(10)
    assert job.said == []


def test_the_first_step_may_take_long_to_compile_on_one_rank(told):
    job = told(size=2).beat(0, step=1, **WAITS).beat(1, step=1, busy=True).after(295)
    assert (job.said, job.orders) == ([], [])
    (said,) = job.after(12).said
    assert "rank 1 is at step 1, at work\nNothing is wrong as long as that continues." in said


def test_a_rank_at_work_is_given_six_times_as_long(told):
    job = told(size=2).beat(0, step=50, **WAITS).beat(1, step=49, doing="validation", busy=True).after(3550)
    (said,) = job.said
    assert "rank 1 is at step 49 (validation), at work\n" in said
    assert not job.file.exists()
    assert job.blame is None
    assert job.after(80).blame == 1


def test_a_rank_that_stops_working_is_a_failure_only_from_then_on(told):
    job = told(size=2).beat(0, step=50, **WAITS).beat(1, step=49, busy=True).after(1000)
    job.beat(1, step=49, busy=False).after(60)
    assert len(job.said) == 2
    assert "rank 1 is at step 49. " not in job.said[0]
    assert job.blame is None
    assert job.after(530).blame is None
    assert job.after(30).blame == 1


def test_with_0_nothing_is_ever_ended_and_with_no_limit_nothing_said(told):
    job = told(size=2, abort=0.0).beat(0, **WAITS).beat(1, busy=False).after(100_000)
    assert (len(job.said), job.blame) == (1, None)
    assert "The job is ended" not in job.said[0]
    job = told(size=2, report=0.0).beat(0, **WAITS).beat(1, busy=False).after(1000)
    assert job.said == []


def test_it_goes_on_and_may_hang_once_more(told):
    job = told(size=2).beat(0, step=5, **WAITS).beat(1, step=4, busy=False).after(100)
    job.beat(0, 1, step=5).after(2)
    assert job.said[1:] == ["hvdtrain: the ranks continue, after 101 s."]
    job.beat(0, step=9, **{**WAITS, "waits": 20}).beat(1, step=8, busy=False).after(100)
    assert len(job.said) == 3
    assert "at step 9 for" in job.said[2]


def test_a_process_set_waits_for_its_own_members_only(told):
    among = {**WAITS, "among": "ranks 0-1, 3"}
    job = (
        told().beat(0, 3, step=5, **among).beat(1, step=4, busy=False).beat(2, step=4, busy=False).after(100)
    )
    assert "ranks 0,3 wait in allreduce of w of ranks 0-1, 3 at step 5 for" in job.said[0]
    assert "; rank 1 is at step 4\n" in job.said[0]


def test_ranks_that_wait_in_different_places_are_all_named(told):
    other = {**WAITS, "doing": "in broadcast of v"}
    job = told(size=2).beat(0, step=5, **WAITS).beat(1, step=5, **other).after(100)
    assert "rank 0 waits in allreduce of w at step 5 for " in job.said[0]
    assert "rank 1 waits in broadcast of v at step 5 for " in job.said[0]
    assert "none is missing: MPI, or the network between them, may hang." in job.said[0]


@pytest.mark.parametrize(
    "state, words", [("T", "stopped (SIGSTOP): `kill -CONT 101` on node1"), ("D", "a disk")]
)
def test_the_state_of_a_process_is_told(told, state, words):
    job = told(size=2).beat(0, **WAITS)
    job._hear(1, protocol.BEAT, asdict(Beat(state=state, pid=101, busy=state == "T", step=3)))
    if state == "D":
        job._hear(1, protocol.BEAT, asdict(Beat(state=state, pid=101, busy=False, step=3)))
    assert words in job.after(100).said[0]


def test_ranks_that_do_not_answer_or_never_came_are_told_from_others(told):
    job = told(size=5).beat(0, 1, 2, **WAITS).beat(3, busy=False)
    job.verdict.ranks[4].up = False
    job.after(61).answer(0, 1, **{**WAITS, "waiting": 61.0}).after(10)
    (said,) = job.said
    assert said.startswith("hvdtrain: ranks 0,1 wait in allreduce of w for ")
    assert "rank 2 does not answer: its host node2, or the link to it, may be gone" in said
    assert "rank 4 has not started" in said


def test_many_late_ranks_are_told_in_a_few_lines(told):
    job = told(size=64).beat(*range(8), step=5, **WAITS).beat(*range(8, 64), step=4, busy=False).after(100)
    (said,) = job.said
    assert "ranks 0-7 wait in allreduce of w at step 5 for" in said
    assert "ranks 8-63 are at step 4\n" in said


def test_horovods_core_waits_only_where_its_process_does_nothing_inside_tensorflow(told):
    loose = {**WAITS, "loose": True}
    inside = STACK.replace('File "train.py", line 31', 'File "/x/tensorflow/python/eager/context.py", line 3')
    job = told(size=2).beat(0, 1, step=5, **{**loose, "busy": True}).after(1000)
    assert (job.said, job.orders) == ([], [])  # it computes
    job = told(size=2).beat(0, 1, step=5, **loose).after(61)
    job.answer(0, 1, step=5, stacks=STACK, **{**loose, "waiting": 61.0}).after(1000)
    assert (job.said, job.blame) == ([], None)  # it is somewhere else, and the core has long finished
    job = told(size=2).beat(0, 1, step=5, **loose).after(61)
    job.answer(0, 1, step=5, stacks=inside, **{**loose, "waiting": 61.0}).after(2)
    assert "ranks 0,1 wait in allreduce of w at step 5 for " in job.said[0]
    assert "s, and none is missing" in job.said[0]
    job.beat(0, 1, step=6, **{**loose, "waits": 8}).after(100)
    assert "at step 6 for " in job.said[2]  # what one wait was does not excuse the next


def test_a_launcher_that_was_stopped_itself_ends_nothing_at_once(told):
    job = told(size=2).beat(0, step=5, **WAITS).beat(1, step=4, busy=False)
    job.now += 10_000
    job.after(10)
    assert (len(job.said), job.blame) == (1, None)


def test_a_file_that_cannot_be_written_is_said(tmp_path, told):
    job = told(size=2)
    job._hang_detector._file = tmp_path / "no such folder" / "stacks.txt"
    job.beat(0, **WAITS).beat(1, busy=False).after(100)
    assert "could not be written" in job.said[0]
    assert "No such file or directory" in job.said[0]
