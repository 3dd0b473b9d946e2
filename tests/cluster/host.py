"""The first process of a host of the cluster: gives it its name and file systems, then runs Slurm's daemons.

    python host.py NAME FOLDER [SHARED ...]

It runs in namespaces of its own (network, mount, hostname, IPC, processes). When it ends, the kernel ends
everything on the host, as when a machine loses its power.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

SBIN = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def main(name: str, folder: Path, shared: list[Path]) -> None:
    """Becomes the host `name` of the cluster in `folder`, and reaps what its jobs leave behind."""
    socket.sethostname(name)
    own = folder / "hosts" / name
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", "/dev/shm")
    _mount("--bind", folder / "etc/hosts", "/etc/hosts")
    _mount("--bind", own / "run", folder / "run")
    _own_tmp(own / "tmp", [folder, *shared])
    environ = {"PATH": SBIN, "HOME": "/root", "SLURM_CONF": str(folder / "etc/slurm.conf")}
    start_munged(folder, name)
    subprocess.Popen(["slurmd", "-D", "-f", environ["SLURM_CONF"]], env=environ, stdin=subprocess.DEVNULL)
    while True:
        os.wait()


def start_munged(folder: Path, name: str) -> None:
    """Starts the daemon by which Slurm's daemons know each other; it goes on by itself.

    It is told not to mind that the folder of a test is open to its owner only.
    """
    run, log = folder / "run", folder / "log"
    places = {
        "key-file": folder / "etc/munge.key",
        "socket": run / "munge.sock",
        "pid-file": run / "munged.pid",
        "log-file": log / f"munged-{name}.log",
        "seed-file": run / "munged.seed",
    }
    options = [f"--{option}={place}" for option, place in places.items()]
    subprocess.run(["munged", "--force", *options], env={"PATH": SBIN}, check=True)


def _own_tmp(own: Path, shared: list[Path]) -> None:
    """Gives the host a /tmp that no other sees, but for the folders that all hosts share."""
    for each in shared:
        if each.is_relative_to("/tmp"):
            place = own / each.relative_to("/tmp")
            place.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", each, place)
    _mount("--rbind", own, "/tmp")


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
