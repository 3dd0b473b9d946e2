"""Which rank is to blame, and the words for it, from what guards have told."""

import json
from types import SimpleNamespace

import pytest

from hvdtrain.launch.supervision import protocol
from hvdtrain.launch.supervision.outcome import conclude as conclude_job
from hvdtrain.launch.supervision.protocol import CLOSED
from hvdtrain.launch.supervision.verdict import Verdict

TRACE = "Traceback (most recent call last):\nValueError: x\n"


class Told(Verdict):
    """A verdict that is told things in short."""

    def hello(self, *ranks):
        for rank in ranks:
            self.note(rank, protocol.HELLO, json.dumps({"host": "h", "rank": rank}).encode())
        return self

    def reports(self, rank, code=1, text="ValueError: x", traceback=TRACE):
        report = {"done": code == 0, "code": code, "text": text, "traceback": traceback}
        self.note(rank, protocol.REPORT, json.dumps(report).encode())
        return self

    def ends(self, rank, status, crash=""):
        self.note(rank, protocol.EXIT, json.dumps({"status": status, "crash": crash}).encode())
        return self

    def closes(self, rank):
        self.note(rank, CLOSED, b"")
        return self


def test_success_needs_the_word_of_every_rank_and_its_exit_code():
    told = Told(2).hello(0, 1).reports(0, 0).ends(0, 0)
    assert not told.succeeded
    assert told.code() == 1
    told.reports(1, 0)
    assert not told.succeeded
    assert told.ends(1, 0).succeeded
    assert told.code() == 0


def test_the_first_failure_is_the_cause_of_the_others():
    told = Told(3).hello(0, 1, 2).reports(1, 3).ends(0, -15).reports(2, 1).ends(1, 3)
    assert told.code() == 3
    assert (
        told.sentence()
        == f"hvdtrain: rank 1 of 3 (host h) failed; its traceback:\n\n{TRACE.rstrip()}".replace(
            "hvdtrain: rank 1", "hvdtrain: rank 2 failed with the same message.\nhvdtrain: rank 1"
        )
    )


def test_many_ranks_that_say_the_same_are_named_in_one_line():
    told = Told(4).reports(3).reports(0).reports(2).reports(1, text="other")
    assert told.sentence().startswith("hvdtrain: ranks 0 and 2 failed with the same message.\n")


def test_a_lost_connection_makes_way_for_a_reason_but_not_for_tearing_down():
    assert Told(2).closes(0).ends(1, -15).first == 0
    assert Told(2).closes(0).ends(1, -9).first == 0
    assert Told(2).closes(0).reports(1).first == 1
    assert Told(2).closes(0).ends(1, 5).first == 1
    assert Told(2).ends(0, -15).reports(1).first == 0


def test_a_connection_that_ends_after_its_rank_is_no_failure():
    assert Told(1).hello(0).reports(0, 0).ends(0, 0).closes(0).first is None


@pytest.mark.parametrize(
    "status, words",
    [
        (-9, "was killed by signal 9 (SIGKILL). The kernel does this when memory runs out"),
        (-7, "was killed by signal 7 (SIGBUS). Shared memory may be full"),
        (5, "ended with exit code 5, without a Python exception"),
        (0, "ended with exit code 0 before its script had finished"),
    ],
)
def test_the_words_for_an_end_without_a_report(status, words):
    assert words in Told(1).hello(0).ends(0, status).sentence()


def test_a_crash_shows_the_users_part_of_its_stack():
    crash = 'Fatal Python error: Aborted\n\n  File "a.py", line 3 in f\n'
    crash += '  File "/x/hvdtrain/script.py", line 9 in _become_main\n'
    assert Told(1).ends(0, -6, crash).sentence().endswith('File "a.py", line 3 in f')


SAID = """--------------------------------------------------------------------------
It looks like MPI_INIT failed for some reason; your parallel process is
likely to abort.

  PML add procs failed
--------------------------------------------------------------------------
"""
ROUTINE = "Primary job  terminated normally, but 1 process returned\na non-zero exit code.\n"


def conclude(told, said, status=1):
    ending = conclude_job(SimpleNamespace(verdict=told, launcher_output=said, interrupted=None), status, 1.0)
    return ending.code, ending.message


def test_what_mpi_said_comes_before_a_rank_that_could_say_nothing():
    told = Told(2).hello(0, 1).ends(1, 1)
    assert conclude(told, SAID)[1].startswith(
        "hvdtrain: message of the MPI launcher: It looks like MPI_INIT failed for some reason; your parallel "
        "process is likely to abort.\nhvdtrain: rank 1 of 2"
    )
    assert conclude(told, ROUTINE)[1].startswith("hvdtrain: rank 1 of 2")
    assert conclude(Told(2).reports(1), SAID)[1].startswith("hvdtrain: rank 1 of 2")


def test_a_launcher_that_ends_well_without_its_ranks_is_no_success():
    code, words = conclude(Told(2).hello(0), "", status=0)
    assert code == 1
    assert "rank(s) 1 of 2 never started" in words


def test_a_launcher_that_was_killed_is_named():
    assert conclude(Told(2).hello(0, 1), "", status=-9) == (
        137,
        "hvdtrain: the MPI launcher was killed by signal 9 before its ranks had ended.",
    )
