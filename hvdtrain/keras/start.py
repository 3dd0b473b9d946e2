"""What `hvd.init()` does: joins the world, and takes this rank's share of cores and GPUs, no more."""

import os
import socket
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain import cores, runtime, settings
from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.keras import model_comparison, progress
from hvdtrain.keras.patches import model_compile, model_fit, usage_warnings
from hvdtrain.runtime.process_sets import register
from hvdtrain.timeline.control import start_if_asked


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Join this process to the ranks it was launched with, and divides the machine among them.

    Afterwards `rank()`, `size()` and the collectives work, TensorFlow computes with this rank's share of
    the cores (unless you have set its threads yourself) and sees one GPU, chosen by local rank. Rank 0
    prints one line that says what it found. Call it first, before any tensor exists; a second call
    changes nothing.

    Args:
        comm: The world, if it is not all that was launched: an mpi4py communicator, or ranks of MPI's world.
        process_sets: Process sets to make usable at once, the same list on all ranks. "dynamic" is accepted for
            Horovod's sake: sets can always be added later.

    Raises:
        RuntimeError: On every rank, if the launcher started another number of processes than MPI sees.
        ValueError: If HVDTRAIN_ENGINE is not auto, horovod, mpi or single, or a process set cannot be made.
    """
    if runtime.is_initialized():
        return
    engine = runtime.init(comm)
    if engine.size > 1:
        threads = _take_cores(engine)
        _take_gpu(engine)
        engine.say(_summary(engine, threads))
    for sentence in settings.unknown():
        engine.warn(sentence)
    model_compile.install()
    model_fit.install()
    usage_warnings.install()
    model_comparison.install()
    progress.note_lines()
    start_if_asked()
    if process_sets is not None and process_sets != "dynamic":
        register(list(process_sets))


def _take_cores(engine: Engine) -> int:
    """Limit TensorFlow's threads to this rank's cores; returns the number, the user's own if there is one."""
    everyone = engine.allgather_object((socket.gethostname(), cores.allowed(), cores.quota()))
    here = [place for place in everyone if place[0] == socket.gethostname()]
    threads = cores.share(cores.allowed(), [place[1] for place in here], cores.quota())
    threads = min(threads, cores.granted() or threads)
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    if chosen or "TF_NUM_INTRAOP_THREADS" in os.environ:
        return chosen or int(os.environ["TF_NUM_INTRAOP_THREADS"])
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        if not tf.config.threading.get_inter_op_parallelism_threads():
            # At least two: while one waits for other ranks, the step must go on.
            tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    except RuntimeError:
        warnings.warn(
            f"Rank {engine.rank}: TensorFlow was already running when hvd.init() was called, so its threads "
            f"cannot be limited to the {threads} this rank should use. Call hvd.init() first.",
            stacklevel=3,
        )
    return threads


def _take_gpu(engine: Engine) -> None:
    """Show TensorFlow one GPU, by local rank, and says when ranks must share one."""
    gpus = tf.config.list_physical_devices("GPU")
    choice = choose_gpu(len(gpus), engine.world.local_rank)
    if choice is not None and len(gpus) > 1:
        tf.config.set_visible_devices(gpus[choice], "GPU")
    mine = gpu_identity(choice, os.environ.get("CUDA_VISIBLE_DEVICES"))
    taken = engine.allgather_object((socket.gethostname(), mine))
    shared = ranks_sharing(taken)
    if shared:
        engine.say(
            f"{ranks_text(shared)} share a GPU with another rank of their host. Start as many ranks as there "
            "are GPUs on each host, or give each its own through CUDA_VISIBLE_DEVICES."
        )


def choose_gpu(count: int, local_rank: int) -> int | None:
    """Return which of the visible GPUs a rank takes: its own by local rank, or the only one it was given."""
    return local_rank % count if count else None


def gpu_identity(choice: int | None, visible: str | None) -> str | None:
    """Name a GPU so that two ranks of a host can tell whether they mean the same one.

    Args:
        choice: Index among the GPUs that this process sees, or None without a GPU.
        visible: CUDA_VISIBLE_DEVICES of this process; its entries are the host's own names.
    """
    if choice is None:
        return None
    entries = [entry.strip() for entry in visible.split(",")] if visible else []
    return entries[choice] if choice < len(entries) else str(choice)


def ranks_sharing(taken: Sequence[tuple[int, str | None]]) -> list[int]:
    """List the ranks whose (host, GPU) another rank has taken too."""
    return [rank for rank, place in enumerate(taken) if place[1] is not None and taken.count(place) > 1]


def _summary(engine: Engine, threads: int) -> str:
    world = engine.world
    hosts = f"{world.cross_size} host{'s' if world.cross_size > 1 else ''} x {world.local_size}"
    return (
        f"engine {engine.name}, {engine.library}, {engine.size} ranks on {hosts}, "
        f"{threads} thread{'s' if threads > 1 else ''} a rank."
    )
