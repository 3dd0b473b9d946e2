"""`hvdtrain submit --follow`: the log of a job to its end, and by what success is told."""

import signal

import pytest

from hvdtrain.batch import follow
from hvdtrain.batch.sbatch_options import find_template


@pytest.fixture
def following(login, monkeypatch, capfdbinary):
    """Follows the job here, without the pauses that spare a real controller."""
    monkeypatch.chdir(login.folder)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follow, "FILE_SECONDS", 0.1)
    monkeypatch.setattr(follow, "LOG_SECONDS", 0.01)

    def run(name: str = "cpu") -> tuple[int, str, str]:
        code = follow.follow("42", find_template(name), login.environ(), stay=True)
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


def test_a_log_is_followed_through_a_requeue_to_the_proof(login, following):
    login.job(0, "PENDING")
    login.job(1, "PENDING", reason="Priority")
    login.job(2, "RUNNING", "printf 'one\\n' >>hvdtrain-42.log")
    login.job(3, "NODE_FAIL", "printf 'tw' >>hvdtrain-42.log")
    login.job(4, "PENDING", reason="BeginTime", restarts="1")
    login.job(5, "RUNNING", "printf 'o\\n' >>hvdtrain-42.log", restarts="1")
    login.job(6, "COMPLETED", "printf 'end' >>hvdtrain-42.log; echo {} >hvdtrain-42.done", restarts="1")
    code, out, err = following()
    assert code == 0
    assert out.endswith("scancel 42\none\ntwo\nend")
    assert "job 42 is PENDING (Priority: other jobs are before it)" in err
    assert "job 42 is PENDING (BeginTime" in err and "job 42 is RUNNING on n[1-2], restart 1" in err
    assert "job 42 has done its work on n[1-2]" in err


ENDS = [
    ("FAILED", "3:0", 3, "ended as FAILED after 00:00:07, exit code 3. The last lines"),
    ("CANCELLED", "0:15", 143, "ended as CANCELLED"),
    ("TIMEOUT", "0:0", 1, "it reached its time limit; --time sets a longer one, and --preemptible continues"),
    ("OUT_OF_MEMORY", "0:125", 253, "--mem asks for more"),
    ("COMPLETED", "0:0", 1, "nothing proves that every rank did its work"),
]


@pytest.mark.parametrize(("state", "code", "expected", "sentence"), ENDS)
def test_an_end_without_a_proof(login, following, state, code, expected, sentence):
    login.job(0, "RUNNING", "printf 'out of luck\\n' >>hvdtrain-42.log")
    login.job(1, state, code=code)
    found, _, err = following()
    assert found == expected
    assert sentence in err and err.rstrip().endswith("out of luck")


def test_the_smoke_test_proves_itself_by_its_last_line(login, following):
    login.job(0, "COMPLETED", "printf 'smoke test passed: 2 ranks\\n' >hvdtrain-42.log")
    assert following("smoke")[0] == 0
    (login.folder / "job.0.do").write_text("printf 'hm\\n' >hvdtrain-42.log")
    assert following("smoke")[0] == 1


def test_a_controller_that_is_away_and_a_job_that_is_forgotten(login, following):
    login.job(0, "RUNNING", "echo {} >hvdtrain-42.done")
    login.job(1, "RUNNING", "echo 2 >asked; echo 'Unable to contact slurm controller' >&2; exit 1")
    login.job(2, "RUNNING", "/bin/rm job.2")
    code, _, err = following()
    assert code == 0 and err.count("controller does not answer") == 1
    (login.folder / "hvdtrain-42.done").unlink()


def test_every_trial_of_a_sweep_is_followed(login, following):
    waiting = {"id": "42", "array": "ArrayJobId=42 ArrayTaskId=0-1 ", "log": "/x-4294967294.log"}
    login.job(0, "PENDING", **waiting)
    trials = [{"id": f"4{3 + index}", "array": f"ArrayJobId=42 ArrayTaskId={index} "} for index in (0, 1)]
    logs = [str(login.folder / f"{index}.log") for index in (0, 1)]
    login.job(1, "COMPLETED", log=logs[0], **trials[0])
    first = (login.folder / "job.1").read_text()
    login.job(1, "FAILED", code="9:0", log=logs[1], **trials[1])
    (login.folder / "job.1").write_text(f"{first}\n{(login.folder / 'job.1').read_text()}")
    (login.folder / "job.1.do").write_text("echo {} >hvdtrain-42-0.done; echo bad luck >1.log")
    code, out, err = following("array_sweep")
    assert code == 9 and "tail -F /x-*.log" in out
    assert "job 42_0 has done its work" in err
    assert "job 42_1 ended as FAILED" in err and err.rstrip().endswith("bad luck")


def test_ctrl_c_leaves_the_job_running(login):
    login.job(0, "RUNNING", "echo going >>hvdtrain-42.log")
    process = login.start("--follow", "train.py")
    try:
        assert any("going" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and "job 42 continues; scancel 42 ends it" in err


def test_nobody_reads_the_log(login):
    login.job(0, "RUNNING", "echo going >>hvdtrain-42.log")
    process = login.start("--follow", "train.py")
    try:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 128 + signal.SIGPIPE
    finally:
        process.kill()
    assert "Traceback" not in err and "Error" not in err
