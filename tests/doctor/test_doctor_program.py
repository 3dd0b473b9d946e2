"""Programs that are absent, talk much, fail or never answer."""

import os
import time
from pathlib import Path

import pytest

from hvdtrain.doctor.probe_runner import ProbeError, failure_reason, rank_environment, read_json
from hvdtrain.doctor.program import Program, Result, run_program


def test_an_answer_has_both_streams_and_the_exit_code():
    result = run_program(["sh", "-c", "echo out; echo err >&2; exit 3"], os.environ, 20)
    assert (result.code, result.out, result.err) == (3, "out\n", "err\n")


def test_a_program_that_is_not_there_answers_as_in_a_shell():
    assert run_program(["/no/such/program"], os.environ, 20).code == 127


def test_much_output_does_not_stop_a_program():
    result = run_program(["sh", "-c", "head -c 3000000 /dev/zero"], os.environ, 20)
    assert result.code == 0
    assert len(result.out) == 3_000_000


def test_output_that_is_not_text_is_no_error():
    assert run_program(["printf", r"a\377b"], os.environ, 20).out == "a\ufffdb"


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    script = f"sleep 600 & echo $! > {tmp_path}/child; echo before; wait"
    result = run_program(["sh", "-c", script], os.environ, 1)
    assert result.code is None
    assert result.out == "before\n"
    assert failure_reason(result) == "it was still running after 1 s"
    assert _ends(int((tmp_path / "child").read_text()))


def test_a_program_that_ignores_the_request_to_end_is_ended_all_the_same(tmp_path):
    result = run_program(
        ["sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 1; done"], os.environ, 1
    )
    assert result.code is None
    assert _ends(int((tmp_path / "pid").read_text()))


def test_a_program_nobody_waits_for_leaves_nothing_behind():
    program = Program(["sleep", "600"], os.environ, 600)
    program.close()
    assert program.result().code is not None


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
    assert failure_reason(Result(9, "", err)).startswith(expected)


def test_a_signal_is_named():
    assert (
        failure_reason(run_program(["sh", "-c", "kill -ILL $$"], os.environ, 20)) == "it was killed by SIGILL"
    )


def test_a_probes_answer_is_found_among_noise():
    assert read_json(Result(0, 'noise\n{"size": 2}\nmore\n', "")) == {"size": 2}


@pytest.mark.parametrize("result", [Result(1, '{"size": 2}\n', "ValueError: no"), Result(0, "nothing\n", "")])
def test_an_answer_counts_only_from_a_probe_that_ended_well(result):
    with pytest.raises(ProbeError):
        read_json(result)


def test_new_ranks_do_not_inherit_the_place_of_the_process_that_starts_them():
    inherited = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PMI_FD": "7"}
    environ = rank_environment(
        {**inherited, "SLURM_STEP_ID": "0", "OMPI_MCA_btl": "self,vader", "PYTHONPATH": "/mine"}
    )
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
