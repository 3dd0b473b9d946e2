"""Run collective operations in Horovod's native core, over MPI, or over NCCL if it was built with NCCL."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain import heartbeat, process_activity
from hvdtrain.collectives.engine import Engine, Op, StandIn, World
from hvdtrain.collectives.horovod.library import (
    find_horovod,
    for_hvdtrain,
    load_horovod,
    ready_for_timeline,
    record_timeline,
)
from hvdtrain.collectives.mpi import engine as mpi
from hvdtrain.collectives.reduction import averaged, reduce_and_take

# Up to this size Horovod copies gradients into one buffer; for larger ones the copy costs more than it saves.
_FUSED_BYTES = 8 << 20

# Most elements of one operation: Horovod passes their number to MPI as a 32-bit integer, unchecked. Larger arrays
# are sent over MPI without Horovod's core.
MOST_ELEMENTS = (1 << 31) - 1

# Dtypes that Horovod's operations do not support are sent in the next wider dtype that they support.
_SENT_AS = {"bool": np.uint8, "int16": np.int32, "uint16": np.int32, "uint32": np.int64}


class HorovodEngine(Engine):
    """An engine whose background thread negotiates, fuses and reduces during the computation.

    NumPy arrays are passed to Horovod's TensorFlow operations; gradients inside a TensorFlow graph stay in
    the graph (see `native_tensors`).

    Args:
        comm: The mpi4py communicator of the world; by default MPI's own world.
    """

    name = "horovod"

    def __init__(self, comm: Any = None) -> None:
        import tensorflow as tf

        # mpi4py initializes MPI before Horovod does, for many threads, so that both may use it at the same time.
        self._mpi = mpi.load_mpi()
        horovod = load_horovod()
        self._tf = tf
        self.horovod = horovod
        if not (horovod.nccl_built() or os.environ.get("HOROVOD_AUTOTUNE", "0") != "0"):
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(_FUSED_BYTES))
        before = process_activity.threads()
        with (
            for_hvdtrain(),
            ready_for_timeline(comm or self._mpi.COMM_WORLD) as self._records,
        ):
            horovod.init(comm) if comm else horovod.init()
        # Its threads use CPU time even when the ranks are idle, so they are no sign of progress.
        heartbeat.set_aside(process_activity.threads() - before)
        self._ops = {
            Op.AVERAGE: horovod.Sum,
            Op.SUM: horovod.Sum,
            Op.MIN: horovod.Min,
            Op.MAX: horovod.Max,
            Op.PRODUCT: horovod.Product,
        }
        self.library = mpi.library_name(self._mpi)
        self.world = World(
            horovod.rank(),
            horovod.size(),
            horovod.local_rank(),
            horovod.local_size(),
            horovod.cross_rank(),
            horovod.cross_size(),
            horovod.is_homogeneous(),
        )
        many_threads = self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE
        same_world = (comm or self._mpi.COMM_WORLD).size == self.size
        self._side_channel = mpi.MpiEngine(comm) if many_threads and same_world else None

    def _compared(self, number: int, value: int = 0) -> tuple[bool, int]:
        if self._side_channel:  # takes microseconds, while Horovod would wait for its next cycle
            return self._side_channel._compared(number, value)
        numbers = np.array([number, -number, -value])
        lowest = np.empty_like(numbers)
        self._reduce(numbers, lowest, Op.MIN)
        return bool((numbers[:2] == lowest[:2]).all()), -int(lowest[2])

    def _reduce(self, send: np.ndarray, receive: np.ndarray, op: Op) -> None:
        if send.size > MOST_ELEMENTS:
            self._mpi_engine("a reduction", send.size)._reduce(send, receive, op)
            return
        receive[...] = self._on_cpu(
            lambda tensor: self.horovod.allreduce(tensor, op=self._ops[op], name="hvdtrain.allreduce"),
            self._cast_to_supported(send),
        )
        averaged(receive, op, self.size)

    def _gather(self, array: np.ndarray) -> tuple[np.ndarray, list[int]]:
        counts = self._on_cpu(
            lambda tensor: self.horovod.allgather(tensor, name="hvdtrain.allgather.rows"),
            np.array([len(array)]),
        )
        nbytes = int(counts.sum()) * array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        if nbytes > MOST_ELEMENTS:
            return self._mpi_engine("an allgather", nbytes)._gather(array)
        joined = np.empty((int(counts.sum()), *array.shape[1:]), array.dtype)
        if joined.nbytes:
            received = self._on_cpu(
                lambda tensor: self.horovod.allgather(tensor, name="hvdtrain.allgather"), _as_bytes(array)
            )
            _as_bytes(joined)[...] = received
        return joined, counts.tolist()

    def _broadcast(self, array: np.ndarray, root_rank: int) -> np.ndarray:
        if array.nbytes > MOST_ELEMENTS:
            return self._mpi_engine("a broadcast", array.nbytes)._broadcast(array, root_rank)
        result = array.copy()
        if result.nbytes:
            result.reshape(-1).view(np.uint8)[...] = self._on_cpu(
                lambda tensor: self.horovod.broadcast(tensor, root_rank, name="hvdtrain.broadcast"),
                array.reshape(-1).view(np.uint8),
            )
        return result

    def _reduce_scatter(self, array: np.ndarray, rows: Sequence[int], op: Op) -> np.ndarray:
        # Horovod scatters sums of few dtypes only; the whole result contains every rank's rows.
        return reduce_and_take(self, array, rows, op)

    def _exchange(self, array: np.ndarray, splits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        # No rank knows how much another one receives; it is at most the size of the largest array times the ranks.
        most = self._compared(0, array.nbytes)[1] * self.size
        if most > MOST_ELEMENTS:
            return self._mpi_engine("an alltoall", most)._exchange(array, splits)
        with self._eagerly_on_cpu():
            received, counts = self.horovod.alltoall(
                self._tf.constant(_as_bytes(array)),
                self._tf.constant(np.array(splits, np.int32)),
                name="hvdtrain.alltoall",
            )
        rows = counts.numpy().tolist()
        result = np.empty((sum(rows), *array.shape[1:]), array.dtype)
        if result.nbytes:
            _as_bytes(result)[...] = received.numpy()
        return result, rows

    def _subset(self, ranks: Sequence[int]) -> Engine | None:
        # A process set uses its own communicator: with Horovod's single background thread, two sets that train
        # different models would wait for each other's cycles, and MPI alone is no slower.
        if self._side_channel is None:
            raise RuntimeError(
                f"Process sets need an MPI that serves several threads at once, and {self.library} here does not. "
                "Use HVDTRAIN_ENGINE=mpi."
            )
        return self._side_channel._subset(ranks)

    def shutdown(self) -> None:
        """End Horovod's background thread on this rank."""
        if self._side_channel:
            self._side_channel.shutdown()
        self.horovod.shutdown()

    def abort(self, code: int) -> None:
        """End the processes of all ranks at once."""
        self._mpi.COMM_WORLD.Abort(code)

    def native_timeline(self, path: Path, mark_cycles: bool) -> Callable[[], None] | None:
        """Let Horovod's core record too, if a timeline was requested before the core started."""
        recording = self._records and self.rank == 0
        return record_timeline(self.horovod, path, mark_cycles) if recording else None

    def native_tensors(self) -> "NativeTensors":
        """Return Horovod's graph operations."""
        return NativeTensors(self._tf, self.horovod, self._ops)

    def _gather_objects(self, data: np.ndarray) -> list[Any]:
        # Objects need no GPU, and over MPI TensorFlow need not have started yet.
        if self._side_channel:
            return self._side_channel._gather_objects(data)
        return super()._gather_objects(data)

    def _mpi_engine(self, what: str, elements: int) -> Engine:
        """Return the engine for arrays that are too large for Horovod's core."""
        if self._side_channel is None:
            raise OverflowError(
                f"{what} of up to {elements} elements or bytes is too large for Horovod, which counts at most "
                f"{MOST_ELEMENTS}, and {self.library} here does not serve several threads at once, so that it "
                "cannot be sent beside Horovod. Use HVDTRAIN_ENGINE=mpi, or smaller arrays."
            )
        return self._side_channel

    def _cast_to_supported(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.uint64:
            raise TypeError(
                "Horovod has no reduction of uint64. Cast to int64, or use HVDTRAIN_ENGINE=mpi, which has one."
            )
        return array.astype(_SENT_AS.get(array.dtype.name, array.dtype), copy=False)

    def _on_cpu(self, operation: Any, array: np.ndarray) -> np.ndarray:
        with self._eagerly_on_cpu():
            return operation(self._tf.constant(array)).numpy()

    @contextlib.contextmanager
    def _eagerly_on_cpu(self) -> Iterator[None]:
        """Run operations immediately, on the host, also while TensorFlow traces a function or builds a graph."""
        # init_scope alone leaves a traced function, but not the default graph of TensorFlow 1.
        eager = self._tf.__internal__.eager_context.eager_mode()
        with self._tf.init_scope(), eager, self._tf.device("CPU:0"):
            yield


class NativeTensors:
    """Horovod's operations on TensorFlow tensors, in a graph or eagerly; each starts when its input is ready."""

    def __init__(self, tensorflow: Any, horovod: Any, ops: dict[Op, Any]) -> None:
        self._tf = tensorflow
        self.horovod = horovod
        self._ops = {**ops, Op.AVERAGE: horovod.Average}

    @property
    def most_elements(self) -> int:
        """Most elements of one operation."""
        return MOST_ELEMENTS

    def combine(
        self,
        name: str,
        dense: Sequence[Any],
        rows: Sequence[Any],
        op: Op,
        groups: Sequence[Sequence[int]],
        devices: tuple[str, str] = ("", ""),
    ) -> tuple[list[Any], list[Any]]:
        """Reduce some tensors and join the rows of others.

        Args:
            name: Name by which Horovod matches the operations of the ranks; a number is added for each one.
            dense: Tensors to combine with `op`, any but ADASUM.
            rows: Tensors to join along their first dimension.
            op: How they are combined.
            groups: Indices of the tensors of `dense` that Horovod sends as one; each other tensor is sent alone.
            devices: Devices for the operations that reduce and for those that gather.

        Returns:
            The combined tensors and the joined tensors, as lists like `dense` and `rows`.

        Raises:
            ValueError: If a tensor or a group has more elements than Horovod can count.
        """
        reduced = list(dense)
        alone = set(range(len(dense))) - {index for members in groups for index in members}
        for members in (*groups, *([index] for index in sorted(alone))):
            self.check_size("reduction", sum(dense[index].shape.num_elements() or 0 for index in members))
            for dtype in dict.fromkeys(
                dense[index].dtype for index in members
            ):  # a group of Horovod has one dtype
                alike = [index for index in members if dense[index].dtype == dtype]
                with self._tf.device(devices[0]):
                    parts = self._reduced([dense[index] for index in alike], op, f"{name}.{alike[0]}")
                for index, part in zip(alike, parts, strict=True):
                    reduced[index] = part
        with self._tf.device(devices[1]):
            return reduced, [
                self._joined(tensor, f"{name}.rows.{index}") for index, tensor in enumerate(rows)
            ]

    def check_size(self, what: str, elements: int) -> None:
        """Raise ValueError if an operation has more elements than Horovod can count."""
        if elements > self.most_elements:
            raise ValueError(
                f"The {what} of gradients has {elements} elements, more than the {self.most_elements} that Horovod "
                "counts. Use HVDTRAIN_ENGINE=mpi, which has no such limit, or divide the variable or the group."
            )

    def stand_in(self, name: str, work: StandIn) -> None:
        """Take part in a `combine` of the other ranks with zeros and without rows."""
        zeros = [self._tf.zeros(shape, dtype) for dtype, shape in work.reduced]
        no_rows = [self._tf.zeros((0, *shape), dtype) for dtype, shape in work.gathered]

        def combine() -> (
            Any
        ):  # returns the tensors, because a graph runs only operations that lead to its results
            return self.combine(name, zeros, no_rows, work.op, work.groups)

        # In a graph or eagerly, as on the other ranks: operations have other names inside a graph.
        combine() if work.eager else self._tf.function(combine)()

    def _reduced(self, tensors: Sequence[Any], op: Op, name: str) -> list[Any]:
        carried = [self._cast_to_supported(tensor) for tensor in tensors]
        options = {"op": self._ops[op], "name": name, "ignore_name_scope": True}
        if len(carried) == 1:
            reduced = [self.horovod.allreduce(carried[0], **options)]
        else:
            reduced = self.horovod.grouped_allreduce(carried, **options)
        return [self._tf.cast(result, tensor.dtype) for result, tensor in zip(reduced, tensors, strict=True)]

    def _joined(self, tensor: Any, name: str) -> Any:
        joined = self.horovod.allgather(self._cast_to_supported(tensor), name=name, ignore_name_scope=True)
        return self._tf.cast(joined, tensor.dtype)

    def _cast_to_supported(self, tensor: Any) -> Any:
        return self._tf.cast(tensor, self._tf.float32) if tensor.dtype == self._tf.bfloat16 else tensor


def reason_not_to_use(tensorflow_version: str, mpi_library: str) -> str | None:
    """Return why Horovod should not be used here, so that `auto` can report its choice and the reason.

    Args:
        tensorflow_version: The TensorFlow of this environment, such as "2.21.0".
        mpi_library: The MPI that mpi4py loaded, as written by `mpi_name`.

    Returns:
        The reason without a full stop, or None if Horovod is built for exactly these two.
    """
    spec = find_horovod()
    if spec is None or spec.origin is None:
        return "Horovod is not built (hvdtrain build-horovod)"
    folder = Path(spec.origin).parent
    if not list((folder / "tensorflow").glob("mpi_lib*.so")):
        return "Horovod is installed without its TensorFlow part (hvdtrain build-horovod)"
    try:
        built_for = _build_record(folder)
    except ValueError:
        return "what Horovod was built for cannot be read (hvdtrain build-horovod)"
    for what, here in (("tensorflow", tensorflow_version), ("mpi", mpi_library)):
        # "2.21.0+vendor" is TensorFlow 2.21.0: the part after the plus does not change the interface.
        if what in built_for and built_for[what].split("+")[0] != here.split("+")[0]:
            return f"Horovod was built for {built_for[what]}, this is {here} (hvdtrain build-horovod)"
    return None


def _build_record(folder: Path) -> dict[str, str]:
    """Read the record of the build: hvdtrain's contains TensorFlow and MPI, Horovod's own only TensorFlow."""
    for name in ("hvdtrain_build.json", "metadata.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return {}


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """View rows of any dtype as rows of bytes, which every operation of Horovod supports."""
    width = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return array.reshape(-1).view(np.uint8).reshape(len(array), width)
