"""A real Slurm cluster on one machine: each host is a set of namespaces, joined to the others by a link of its own.

Every host has its name, address, /tmp, /dev/shm, processes and slurmd; the controller runs beside them. Needs root.

    with Cluster(folder, hosts=4, shared=[checkout]) as cluster:
        job = cluster.submit("slurm/cpu.sbatch", "train.py", options=["--nodes=2"])
        job.ended()
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import host

NETWORK, CONTROLLER, BRIDGE = "10.78.0", "10.78.0.254", "hvdbridge"
LOCK = Path("/tmp/hvdtrain-cluster.lock")  # one cluster at a time: the names of its network are fixed
PATIENCE = (
    600  # seconds without progress after which something hangs; on an idle machine it takes half a minute
)
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")

# No cgroups in a container, so nothing binds; short timers, so that a lost host is seen within a test.
CONFIGURATION = """
ClusterName=hvdtrain
SlurmctldHost=ctl({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/run/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=12
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2
BatchStartTimeout=20
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=node[1-{hosts}] NodeAddr={network}.[1-{hosts}] CPUs=2 RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def lacking() -> str | None:
    """Says in one line why no cluster can be started here, or None."""
    if os.geteuid():
        return "the cluster of network namespaces needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=host.SBIN)]
    if absent:
        return f"there is no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2 util-linux"
    return None


class Cluster:
    """A Slurm cluster that lives as long as a `with` block.

    Args:
        folder: A new folder, which all hosts share: configuration, logs, and what jobs write.
        hosts: How many; they are node1, node2, …, with two CPUs each.
        shared: Other folders under /tmp that jobs need. Elsewhere the hosts share everything.
    """

    def __init__(self, folder: Path, hosts: int = 4, shared: Sequence[Path] = ()) -> None:
        self.folder, self.shared = folder, [Path(each) for each in shared]
        self.hosts = [f"node{index}" for index in range(1, hosts + 1)]
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self._lock = LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._unlink()
        try:
            self._configure()
            for each in self.hosts:
                self._start_host(each)
            host.start_munged(self.folder, "ctl")
            self.start_controller()
            until(self._all_idle, lambda: f"not all hosts came up: {self.ask('sinfo', '-N')}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a user on the login host."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}:/usr/sbin:/sbin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def ask(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it says."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(
        self, template: str | Path, *words: str, options: Sequence[str] = (), **variables: str
    ) -> "Job":
        """Submits a batch script as a user does, with `options` for sbatch and `words` for the script."""
        logs = self.folder / "jobs"
        command = ["sbatch", "--parsable", f"--output={logs}/%j.log", *options, str(template), *words]
        done = subprocess.run(command, env=self.environ | variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"sbatch refused: {done.stderr.strip()}")
        number = done.stdout.strip()
        return Job(self, number, logs / f"{number}.log")

    def on(self, name: str, *command: str) -> str:
        """Runs a command on a host, as its root, and returns what it prints."""
        outer = self._processes[name].pid
        first = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        words = ["nsenter", "-t", first, "-a", "--", *command]
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True)
        return done.stdout + done.stderr

    def cut(self, name: str) -> None:
        """Takes a host's link down; to the others it is as if its cable were pulled."""
        _ip("-n", name, "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """Puts the link back."""
        _ip("-n", name, "link", "set", "eth0", "up")

    def narrow(self, rate: str) -> None:
        """Lets each host's link carry no more than `rate`, such as "1gbit", in either direction."""
        for name in self.hosts:
            limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms"]
            _tc("-n", name, "qdisc", "replace", "dev", "eth0", *limit)
            _tc("qdisc", "replace", "dev", f"hvd-{name}", *limit)

    def widen(self) -> None:
        """Takes the limit away."""
        for name in self.hosts:
            _tc("-n", name, "qdisc", "del", "dev", "eth0", "root")
            _tc("qdisc", "del", "dev", f"hvd-{name}", "root")

    def sent(self, name: str) -> int:
        """How many bytes a host has sent over its link."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(self.on(name, "cat", path) or 0)

    def start_controller(self) -> None:
        """Starts slurmctld; again, too, after `kill_controller`."""
        hosts = self.folder / "etc/hosts"
        become = f"hostname ctl; mount --bind '{hosts}' /etc/hosts; exec slurmctld -D"
        self._processes["ctl"] = self._start(["unshare", "--uts", "--mount", "sh", "-ec", become], "ctl")

    def kill_controller(self, knows: "Job") -> None:
        """Kills slurmctld, as a crash of its host would, once it has written down that a job runs."""
        written = self.folder / "state/job_state"
        started = datetime.fromisoformat(knows.facts()["StartTime"]).timestamp() + 1
        until(lambda: written.stat().st_mtime > started, lambda: "the state is not written")
        self._processes["ctl"].kill()
        self._processes["ctl"].wait()

    def kill_slurmd(self, name: str) -> None:
        """Kills slurmd on a host; its jobs' processes live on, and Slurm takes the host for lost."""
        self.on(name, "sh", "-c", f"kill -9 $(cat '{self.folder}/run/slurmd.pid')")

    def start_slurmd(self, name: str) -> None:
        """Starts it again."""
        self.on(name, "slurmd", "-f", str(self.folder / "etc/slurm.conf"))

    def back(self) -> None:
        """Waits until Slurm has all hosts again, and nothing runs on them."""
        until(self._all_idle, lambda: f"not all hosts are back: {self.ask('sinfo', '-N')}")

    def running(self, word: str) -> dict[str, list[str]]:
        """Lists the processes with a word in their command, on each host that has any."""
        look = f"grep -al '[{word[0]}]{word[1:]}' /proc/[0-9]*/cmdline"
        found = {name: self.on(name, "sh", "-c", look).split() for name in self.hosts}
        return {name: processes for name, processes in found.items() if processes}

    def _configure(self) -> None:
        for name in ("etc", "state", "log", "run", "hosts", "jobs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        etc = self.folder / "etc"
        facts = {"folder": self.folder, "hosts": len(self.hosts)}
        (etc / "slurm.conf").write_text(CONFIGURATION.format(controller=CONTROLLER, network=NETWORK, **facts))
        # Namespaces hide the cgroup file system, by which slurmd would find out its version.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o400)
        addresses = [f"{NETWORK}.{index} {name}" for index, name in enumerate(self.hosts, start=1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{CONTROLLER} ctl", *addresses, ""]))
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")

    def _start_host(self, name: str) -> None:
        for part in ("tmp", "run/spool"):
            (self.folder / "hosts" / name / part).mkdir(parents=True, exist_ok=True)
        number = name.removeprefix("node")
        _ip("netns", "add", name)
        _ip("link", "add", f"hvd-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"hvd-{name}", "master", BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        shared = [str(each) for each in self.shared]
        first = [sys.executable, host.__file__, name, str(self.folder), *shared]
        self._processes[name] = self._start(["ip", "netns", "exec", name, "unshare", *own, *first], name)

    def _start(self, command: list[str], name: str) -> subprocess.Popen:
        environ = {"PATH": host.SBIN, "SLURM_CONF": str(self.folder / "etc/slurm.conf")}
        with (self.folder / "log" / f"first-{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _all_idle(self) -> bool:
        try:
            return set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%n").split()) == {*self.hosts}
        except RuntimeError:
            return False

    def _end(self) -> None:
        for each in self._processes.values():
            each.kill()
        for each in self._processes.values():
            each.wait()
        munged = self.folder / "run/munged.pid"
        if munged.exists():
            os.kill(int(munged.read_text()), signal.SIGTERM)
        self._unlink()
        self._lock.close()

    def _unlink(self) -> None:
        """Removes the network, also one that a killed test run has left."""
        for each in self.hosts:
            _ip("netns", "del", each, check=False)
            _ip("link", "del", f"hvd-{each}", check=False)
        _ip("link", "del", BRIDGE, check=False)


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    cluster: Cluster
    number: str
    log: Path

    def facts(self) -> dict[str, str]:
        """What Slurm knows of it: JobState, ExitCode, Restarts, …"""
        words = self.cluster.ask("scontrol", "show", "job", "-o", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, …"""
        return self.facts()["JobState"]

    @property
    def hosts(self) -> list[str]:
        """Where it runs."""
        return self.cluster.ask("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def prints(self, text: str) -> None:
        """Wait until the job has printed `text`."""
        until(
            lambda: text in self.output,
            lambda: f"never printed {text!r}: {self._story()}",
            lambda: self.output,
        )

    def ended(self) -> str:
        """Wait for the end and return the state."""
        active = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING", "SUSPENDED")
        until(lambda: self.state not in active, lambda: f"did not end: {self._story()}", lambda: self.output)
        return self.state

    def _story(self) -> str:
        return f"job {self.number} is {self.state}; its output:\n{self.output[-4000:]}"


def until(
    holds: Callable[[], bool], told: Callable[[], str], progress: Callable[[], object] = lambda: None
) -> None:
    """Wait until something holds, or raise TimeoutError with what is told when there is no progress.

    Args:
        holds: What is waited for.
        told: Says what is the matter if it never holds.
        progress: Returns anything that changes while there is progress. Nothing limits the whole.
    """
    last, since = progress(), time.monotonic()
    while not holds():
        time.sleep(0.1)
        if (now := progress()) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise TimeoutError(f"No progress for {PATIENCE} s: {told()}")


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], env={"PATH": host.SBIN}, check=check, capture_output=not check)


def _tc(*words: str) -> None:
    subprocess.run(["tc", *words], env={"PATH": host.SBIN}, check=True)
