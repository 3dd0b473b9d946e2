"""Join this process to the other ranks at `hvd.init()`, with its GPU and cores, and return its place among them."""

import os
import socket
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdtrain import cores, runtime, settings
from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.keras.patches import jit_compile, model_fit, optimizers, progress, usage_warnings
from hvdtrain.runtime.process_sets import register
from hvdtrain.timeline.control import start_if_asked


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Join this process to the other ranks of the job, and divide cores and GPUs of the host among its ranks.

    Afterwards `rank()`, `size()` and the collectives work, TensorFlow computes with this rank's share of
    the cores (unless you have set its threads yourself) and sees one GPU, chosen by local rank. Rank 0
    prints one line with engine, ranks, hosts and threads. Call it before any tensor is created; a second call
    has no effect.

    Args:
        comm: The ranks to join, if these are not all processes that the launcher started: an mpi4py communicator,
            or a list of ranks of `MPI.COMM_WORLD`.
        process_sets: Process sets to register immediately, the same list on all ranks. "dynamic" is accepted for
            compatibility with Horovod: sets can be added at any time.

    Raises:
        RuntimeError: On every rank, if the launcher started another number of processes than MPI reports.
        ValueError: If HVDTRAIN_ENGINE is not auto, horovod, mpi or single, or a process set cannot be created.
    """
    if runtime.is_initialized():
        return
    engine = runtime.init(comm)
    if engine.size > 1:
        threads = _limit_threads(engine)
        _select_gpu(engine)
        engine.say(_summary(engine, threads))
    for message in settings.unknown():
        engine.warn(message)
    for patch in (optimizers, jit_compile, model_fit, usage_warnings, progress):
        patch.install()
    start_if_asked()
    if process_sets is not None and process_sets != "dynamic":
        register(list(process_sets))


def rank() -> int:
    """Return the number of this process among all ranks, from 0 to `size() - 1`; rank 0 prints and saves."""
    return runtime.engine().world.rank


def size() -> int:
    """Return the number of ranks; multiply the batch size by it, and possibly the learning rate."""
    return runtime.engine().world.size


def local_rank() -> int:
    """Return the number of this process among the ranks of its host; its GPU has the same number."""
    return runtime.engine().world.local_rank


def local_size() -> int:
    """Return the number of ranks on this host."""
    return runtime.engine().world.local_size


def cross_rank() -> int:
    """Return the number of this host among the hosts that have a rank with this `local_rank()`."""
    return runtime.engine().world.cross_rank


def cross_size() -> int:
    """Return the number of hosts that have a rank with this `local_rank()`."""
    return runtime.engine().world.cross_size


def is_homogeneous() -> bool:
    """Return whether every host has the same number of ranks."""
    return runtime.engine().world.homogeneous


def _limit_threads(engine: Engine) -> int:
    """Limit TensorFlow's threads to this rank's cores, unless the user has set them; return their number."""
    cores_of_ranks = engine.allgather_object((socket.gethostname(), cores.allowed(), cores.quota()))
    on_this_host = [entry for entry in cores_of_ranks if entry[0] == socket.gethostname()]
    threads = cores.share(cores.allowed(), [entry[1] for entry in on_this_host], cores.quota())
    threads = min(threads, cores.granted() or threads)
    set_by_user = tf.config.threading.get_intra_op_parallelism_threads()
    if set_by_user or "TF_NUM_INTRAOP_THREADS" in os.environ:
        return set_by_user or int(os.environ["TF_NUM_INTRAOP_THREADS"])
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        if not tf.config.threading.get_inter_op_parallelism_threads():
            # At least two: while one thread waits for other ranks, another one must continue the step.
            tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    except RuntimeError:
        warnings.warn(
            f"Rank {engine.rank}: TensorFlow was already running when hvd.init() was called, so its threads "
            f"cannot be limited to the {threads} this rank should use. Call hvd.init() first.",
            stacklevel=3,
        )
    return threads


def _select_gpu(engine: Engine) -> None:
    """Make one GPU visible to TensorFlow, chosen by local rank, and report ranks that share a GPU."""
    gpus = tf.config.list_physical_devices("GPU")
    choice = choose_gpu(len(gpus), engine.world.local_rank)
    if choice is not None and len(gpus) > 1:
        tf.config.set_visible_devices(gpus[choice], "GPU")
    own_gpu = gpu_identity(choice, os.environ.get("CUDA_VISIBLE_DEVICES"))
    sharing = ranks_sharing(engine.allgather_object((socket.gethostname(), own_gpu)))
    if sharing:
        engine.say(
            f"{ranks_text(sharing)} share a GPU with another rank of their host. Start as many ranks as there "
            "are GPUs on each host, or assign a different GPU to each rank with CUDA_VISIBLE_DEVICES."
        )


def choose_gpu(count: int, local_rank: int) -> int | None:
    """Return the index of the GPU that a rank uses, among those it sees; None if it sees none."""
    return local_rank % count if count else None


def gpu_identity(choice: int | None, visible: str | None) -> str | None:
    """Return a name of a GPU that is the same for all ranks of a host that use this GPU.

    Args:
        choice: Index among the GPUs that this process sees, or None without a GPU.
        visible: CUDA_VISIBLE_DEVICES of this process; its entries are names that are unique on the host.
    """
    if choice is None:
        return None
    entries = [entry.strip() for entry in visible.split(",")] if visible else []
    return entries[choice] if choice < len(entries) else str(choice)


def ranks_sharing(gpus_of_ranks: Sequence[tuple[int, str | None]]) -> list[int]:
    """Return the ranks whose (host, GPU) is also that of another rank."""
    return [
        rank
        for rank, host_and_gpu in enumerate(gpus_of_ranks)
        if host_and_gpu[1] is not None and gpus_of_ranks.count(host_and_gpu) > 1
    ]


def _summary(engine: Engine, threads: int) -> str:
    world = engine.world
    hosts = f"{world.cross_size} host{'s' if world.cross_size > 1 else ''} x {world.local_size}"
    return (
        f"engine {engine.name}, {engine.library}, {engine.size} ranks on {hosts}, "
        f"{threads} thread{'s' if threads > 1 else ''} a rank."
    )
