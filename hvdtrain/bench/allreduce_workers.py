"""Sum arrays over ranks in the way of each contender of `hvdtrain bench allreduce`, and check the sums.

Each public function is the work of a contender: it takes the settings and returns a function that answers requests.
"""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, final

import numpy as np

from hvdtrain.collectives.engine import Call, Op
from hvdtrain.collectives.horovod.library import load_horovod
from hvdtrain.collectives.mpi.engine import load_mpi

Settings = Mapping[str, Any]
Answer = Callable[[Mapping[str, Any]], dict[str, Any]]

_PERIOD = 1009  # of a buffer's content; prime, so that pieces which start at multiples of a round size differ
_MAX_SUM = 128  # no sum is larger, so that it is exact in every dtype
_MAX_SUMMANDS = 64  # at most this many ranks contribute to one number


@final
@dataclass(frozen=True)
class AllreduceWorker:
    """Sums arrays over ranks, and checks the results outside of the timed part."""

    bind: Callable[[np.ndarray], Callable[[], Any]]  # returns a function that sums this array at each call
    barrier: Callable[[], Any]
    rank: int
    size: int
    fetch: Callable[[Any], np.ndarray] = np.asarray  # converts the result of that function to an array

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `seconds` of one sum, and whether the last of `repeat` results is `right`."""
        if request["dtype"] == "bfloat16":
            import ml_dtypes  # noqa: F401  # makes the name known to NumPy
        dtype = np.dtype(request["dtype"])
        count = request["bytes"] // dtype.itemsize
        once = self.bind(np.resize(summands(request["seed"], self.rank, self.size, dtype), count))
        once()
        self.barrier()
        seconds, result = _time_repeats(once, request["repeat"])
        # MPI makes progress only inside of its calls: a rank that has finished may still be needed by another rank.
        self.barrier()
        expected = np.zeros((), dtype)
        for other in range(self.size):
            expected = expected + summands(request["seed"], other, self.size, dtype)
        return {"seconds": seconds, "right": _is_repeated(self.fetch(result), expected.astype(dtype))}


def engine(settings: Settings) -> Answer:
    """Use the engine of hvdtrain that HVDTRAIN_ENGINE names, on NumPy arrays."""
    from hvdtrain import runtime

    engine = runtime.init()

    def bind(array: np.ndarray) -> Callable[[], Any]:
        out = np.empty_like(array)
        return lambda: engine.allreduce(array, Op.SUM, out=out)

    return AllreduceWorker(bind, engine.barrier, engine.rank, engine.size)


def engine_in_graph(settings: Settings) -> Answer:
    """Use that engine on tensors inside a `tf.function`, through the same code as gradients."""
    import tensorflow as tf  # before MPI, as in a training script

    from hvdtrain import runtime
    from hvdtrain.backends.tensorflow.bridge import TensorFlowBridge
    from hvdtrain.gradients.exchange import Exchange

    engine = runtime.init()

    def bind(array: np.ndarray) -> Callable[[], Any]:
        exchange = Exchange(engine, Op.SUM, Call("hvdtrain.bench", (f"{array.dtype}[{array.size}]",)))

        @tf.function
        def reduced(tensor: Any) -> Any:
            return TensorFlowBridge().exchange(exchange, [tensor], []).dense[0]

        return partial(reduced, tf.constant(array))

    return AllreduceWorker(bind, engine.barrier, engine.rank, engine.size)


def mpi(settings: Settings) -> Answer:
    """Call MPI_Allreduce from Python for the whole array, or for one `piece` of so many bytes after the other."""
    comm = load_mpi().COMM_WORLD

    def bind(array: np.ndarray) -> Callable[[], Any]:
        out = np.empty_like(array)
        step = settings.get("piece", array.nbytes) // array.itemsize

        def in_pieces() -> np.ndarray:
            for start in range(0, array.size, step):
                comm.Allreduce(array[start : start + step], out[start : start + step])
            return out

        # One call needs no slices, whose creation would be timed too.
        return (lambda: comm.Allreduce(array, out) or out) if step >= array.size else in_pieces

    return AllreduceWorker(bind, comm.Barrier, comm.rank, comm.size)


def horovod(settings: Settings) -> Answer:
    """Call `allreduce` of stock Horovod inside a `tf.function`, with default settings."""
    import tensorflow as tf

    hvd = load_horovod()
    hvd.init()
    zero = tf.zeros(())

    def bind(array: np.ndarray) -> Callable[[], Any]:
        @tf.function
        def reduced(tensor: Any) -> Any:
            return hvd.allreduce(tensor, op=hvd.Sum, name=f"bench.{array.dtype}.{array.size}")

        return partial(reduced, tf.constant(array))

    return AllreduceWorker(bind, lambda: hvd.allreduce(zero, name="bench.barrier"), hvd.rank(), hvd.size())


def gloo(settings: Settings) -> Answer:
    """Call `torch.distributed.all_reduce` over Gloo, in place, as DistributedDataParallel does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def bind(array: np.ndarray) -> Callable[[], Any]:
        source = torch.from_numpy(array)
        buffer = source.clone()

        def once() -> tuple:
            dist.all_reduce(buffer)
            return source, buffer

        return once

    def fetch(result: tuple) -> np.ndarray:
        # In place, each repetition has summed the result of the one before: sum the original array once more.
        source, buffer = result
        buffer.copy_(source)
        dist.all_reduce(buffer)
        return buffer.numpy()

    return AllreduceWorker(bind, dist.barrier, dist.get_rank(), dist.get_world_size(), fetch)


def one_core(settings: Settings) -> Answer:
    """Copy an array, or add two arrays, on one core, to measure the limits of the machine."""
    operation = settings["operation"]
    if operation not in ("copy", "add"):
        raise ValueError(f"operation must be copy or add. Received: {operation!r}.")

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        dtype = np.dtype(np.uint8 if operation == "copy" else request["dtype"])
        array = np.ones(request["bytes"] // dtype.itemsize, dtype)
        out = np.ones_like(array)
        copy, add = partial(np.copyto, out, array), partial(np.add, out, array, out=out)
        once: Callable[[], Any] = copy if operation == "copy" else add
        once()
        return {"seconds": _time_repeats(once, request["repeat"])[0], "right": True}

    return answer


def link(settings: Settings) -> Answer:
    """Send a message from rank 0 to a rank on another host and back, to measure the link between hosts."""
    comm = load_mpi().COMM_WORLD
    hosts = comm.allgather(socket.gethostname())
    partner = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), None)
    if partner is None:
        raise RuntimeError(f"All {comm.size} ranks are on {hosts[0]}, so there is no link to measure.")

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        message = np.zeros(request["bytes"], np.uint8)

        def there_and_back() -> None:
            if comm.rank == 0:
                comm.Send(message, partner)
                comm.Recv(message, partner)
            elif comm.rank == partner:
                comm.Recv(message, 0)
                comm.Send(message, 0)

        comm.Barrier()
        seconds, _ = _time_repeats(there_and_back, request["repeat"])
        comm.Barrier()
        return {"seconds": seconds / 2 if comm.rank in (0, partner) else 0.0, "right": True}

    return answer


def summands(seed: int, rank: int, size: int, dtype: np.dtype) -> np.ndarray:
    """Return small random integers of one rank, whose sum over ranks is exact in every dtype with 7 bits for it.

    With many ranks, each rank contributes only to some of the numbers, so that no sum needs more bits.
    """
    contributing = min(size, _MAX_SUMMANDS)
    below = min(11, _MAX_SUM // contributing)
    numbers = np.random.default_rng([seed, rank]).integers(0, below, _PERIOD)
    mine = (np.arange(_PERIOD) + rank) % -(-size // contributing) == 0
    return np.where(mine, numbers, 0).astype(dtype)


def _time_repeats(once: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Return the seconds of one call, the mean of several, and the result of the last call."""
    begun = perf_counter()
    for _ in range(repeat):
        result = once()
    return (perf_counter() - begun) / repeat, result


def _is_repeated(array: np.ndarray, period: np.ndarray) -> bool:
    """Return whether an array consists of repetitions of `period`, of which the last may be cut off."""
    flat = array.reshape(-1)
    whole = len(flat) // len(period) * len(period)
    blocks = (flat[:whole].reshape(-1, len(period)) == period).all()
    return bool(blocks and (flat[whole:] == period[: len(flat) - whole]).all())
