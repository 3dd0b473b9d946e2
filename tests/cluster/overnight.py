"""Stands for a training with checkpoints: counts its steps, and goes on from the file in which it left its number.

    overnight.py STEPS FILE

Its first start has no end: something must stop it. A later one is done after so many steps more.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

from hvdtrain import heartbeat
from hvdtrain.stop_request import Preempted

world = MPI.COMM_WORLD
asked: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
heartbeat.ask_patience(20)
more, file = int(sys.argv[1]), Path(sys.argv[2])
first = int(file.read_text()) if file.exists() else 0
last = first + more if first else None
deadline = float(os.environ.get("HVDTRAIN_DEADLINE", "inf"))
hosts = world.allgather(os.uname().nodename)
if world.rank == 0:
    print(f"goes on from step {first} with {world.size} ranks on {sorted(set(hosts))}", flush=True)
    left = "no end" if deadline > time.time() + 1e6 else f"{(deadline - time.time()) / 60:.0f} min"
    print(f"start {os.environ['HVDTRAIN_RESTART']}, {left}; pid {os.getpid()}", flush=True)
for step in itertools.count(first + 1):
    time.sleep(0.1)
    heartbeat.at(0, step)
    stop = world.allreduce(int(max(asked, default=0)), MPI.MAX)
    if world.rank == 0 and (stop or step % 10 == 0):
        file.with_suffix(".part").write_text(str(step))
        file.with_suffix(".part").replace(file)
    if stop:
        world.barrier()
        raise Preempted(f"stopped at step {step} by {signal.Signals(stop).name}")
    if step == last:
        break
if world.rank == 0:
    print(f"finished at step {last}", flush=True)
