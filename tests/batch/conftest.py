"""A login node whose sbatch, scontrol and sinfo are stand-ins that say what they are told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "submit"]

SBATCH = """#!/bin/sh
for word in "$@"; do [ "$word" = --test-only ] && { /bin/cat test_only >&2; read code <code; exit $code; }; done
printf '%s\\0' "$@" >words
printf '%s' "$HVDTRAIN_SITE" >site
[ -e refusal ] && { /bin/cat refusal >&2; exit 1; }
echo 42
"""
# Each question after a job is answered by the next of the files job.0, job.1, …, the last of them for ever.
SCONTROL = """#!/bin/sh
case "$*" in
*partition*) /bin/cat partitions ;;
*job*)
  read asked <asked
  [ -e "job.$asked.do" ] && /bin/mv "job.$asked.do" do && . ./do
  [ -e "job.$asked" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
  /bin/cat "job.$asked"
  [ -e "job.$((asked + 1))" ] && echo $((asked + 1)) >asked
  exit 0 ;;
esac
"""

PARTITIONS = """\
PartitionName=main AllowAccounts=ALL Default=YES MaxNodes=3 MaxTime=1-00:00:00 MinNodes=0 State=UP
PartitionName=gpu AllowAccounts=deep,learning Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
PartitionName=old AllowAccounts=ALL Default=NO MaxTime=UNLIMITED MinNodes=2 State=INACTIVE
"""
NODES = """\
main|n1|8|16000|(null)|idle
main|n2|8|16000|(null)|mixed
main|n3|16|64000|(null)|allocated
main|n4|8|16000|(null)|down*
gpu|g1|64|256000|gpu:a100:4(S:0-1)|idle
gpu|g2|64|256000|gpu:v100:2(S:0-1),nvme:1|idle
old|o1|4|8000|(null)|idle
"""
JOB = """\
JobId={id} {array}JobName=hvdtrain
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:07 TimeLimit=01:00:00 TimeMin=N/A
   NodeList=n[1-2]
   StdOut={log}
"""


class Login:
    """A login node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        sinfo = "#!/bin/sh\n/bin/cat nodes\n"
        for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "sinfo": sinfo, "hvdtrain": ""}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        files = {"partitions": PARTITIONS, "nodes": NODES, "test_only": "", "code": "0\n", "asked": "0\n"}
        for name, text in {**files, "train.py": "print(1)", "trials.txt": "# two\n--a 1\n\n--a 2\n"}.items():
            (folder / name).write_text(text)

    def environ(self, **more: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_"))
        }
        kept = {name: value for name, value in kept.items() if not name.startswith("HVDTRAIN_")}
        here = {"PATH": str(self.bin), "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        return {**kept, **here, "XDG_CONFIG_HOME": str(self.folder / "config"), **more}

    def template(self, name: str) -> str:
        return str(ROOT / "slurm" / f"{name}.sbatch")

    def start(self, *words: str, **environ: str) -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [*SUBMIT, *words]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ(**environ), text=True, **streams)

    def submit(self, *words: str, **environ: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **environ)
        try:
            out, err = process.communicate()
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def submitted(self, *words: str, **environ: str) -> list[str]:
        """The words that sbatch got."""
        done = self.submit(*words, **environ)
        assert done.returncode == 0, done.stderr
        return (self.folder / "words").read_text().split("\0")[:-1]

    def refused(self, *words: str, **environ: str) -> str:
        """What is said, where nothing reaches sbatch."""
        done = self.submit(*words, **environ)
        assert done.returncode == 2 and not (self.folder / "words").exists(), done
        assert "Traceback" not in done.stderr
        return done.stderr

    def profile(self, text: str, name: str = "cluster") -> Path:
        path = self.folder / "config" / "hvdtrain" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def job(self, number: int, state: str, do: str = "", **facts: str) -> None:
        """What Slurm answers when it is asked the `number`th time, and what happens in that moment."""
        usual = {"id": "42", "array": "", "reason": "None", "restarts": "0", "code": "0:0"}
        text = JOB.format(**{**usual, "log": str(self.folder / "hvdtrain-42.log"), "state": state, **facts})
        (self.folder / f"job.{number}").write_text(text)
        (self.folder / f"job.{number}.do").write_text(do)


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path / "my work")
