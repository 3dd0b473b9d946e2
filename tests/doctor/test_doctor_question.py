"""Programs that are absent, talk much, fail or never answer."""

import os
import time
from pathlib import Path

import pytest

from hvdtrain.doctor.inquiry import NoAnswerError, fresh, read_json, reason
from hvdtrain.doctor.question import Answer, Question, ask


def test_an_answer_has_both_streams_and_the_exit_code():
    answer = ask(["sh", "-c", "echo out; echo err >&2; exit 3"], os.environ, 20)
    assert (answer.code, answer.out, answer.err) == (3, "out\n", "err\n")


def test_a_program_that_is_not_there_answers_as_in_a_shell():
    assert ask(["/no/such/program"], os.environ, 20).code == 127


def test_much_output_does_not_stop_a_program():
    answer = ask(["sh", "-c", "head -c 3000000 /dev/zero"], os.environ, 20)
    assert answer.code == 0
    assert len(answer.out) == 3_000_000


def test_output_that_is_not_text_is_no_error():
    assert ask(["printf", r"a\377b"], os.environ, 20).out == "a\ufffdb"


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    script = f"sleep 600 & echo $! > {tmp_path}/child; echo before; wait"
    answer = ask(["sh", "-c", script], os.environ, 1)
    assert answer.code is None
    assert answer.out == "before\n"
    assert reason(answer) == "it was still running after 1 s"
    assert _ends(int((tmp_path / "child").read_text()))


def test_a_program_that_ignores_the_request_to_end_is_ended_all_the_same(tmp_path):
    answer = ask(
        ["sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 1; done"], os.environ, 1
    )
    assert answer.code is None
    assert _ends(int((tmp_path / "pid").read_text()))


def test_a_question_nobody_waits_for_leaves_nothing_behind():
    question = Question(["sleep", "600"], os.environ, 600)
    question.close()
    assert question.answer().code is not None


@pytest.mark.parametrize(
    ("err", "expected"),
    [
        (
            "Traceback\n  File x\nRuntimeError: Rank 1: alone.\n-----\nmpirun noticed\n-----\n",
            "RuntimeError: Rank 1: alone",
        ),
        (
            "mpirun noticed that process rank 1 on node a exited on signal 11 (Segmentation fault).\n----\n",
            "exited on signal 11",
        ),
        (
            "*** An error occurred in MPI_Init_thread\n*** on a NULL communicator\n",
            "An error occurred in MPI_Init_thread",
        ),
        ("something else\n-------\n", "something else"),
        ("", "it ended with exit code 9"),
    ],
)
def test_reasons(err, expected):
    assert reason(Answer(9, "", err)).startswith(expected)


def test_a_signal_is_named():
    assert reason(ask(["sh", "-c", "kill -ILL $$"], os.environ, 20)) == "it was killed by SIGILL"


def test_a_probes_answer_is_found_among_noise():
    assert read_json(Answer(0, 'noise\n{"size": 2}\nmore\n', "")) == {"size": 2}


@pytest.mark.parametrize("answer", [Answer(1, '{"size": 2}\n', "ValueError: no"), Answer(0, "nothing\n", "")])
def test_an_answer_counts_only_from_a_probe_that_ended_well(answer):
    with pytest.raises(NoAnswerError):
        read_json(answer)


def test_new_ranks_do_not_inherit_the_place_of_the_process_that_starts_them():
    inherited = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PMI_FD": "7"}
    environ = fresh({**inherited, "SLURM_STEP_ID": "0", "OMPI_MCA_btl": "self,vader", "PYTHONPATH": "/mine"})
    assert not inherited.keys() & environ.keys()
    assert environ["SLURM_STEP_ID"] == "0"
    assert environ["OMPI_MCA_btl"] == "self,vader"
    assert environ["PYTHONPATH"].startswith("/mine" + os.pathsep)


def _ends(pid):
    """Waits for a process that was told to end; a zombie has ended, whoever has yet to notice."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
