"""Exchange TensorFlow's gradients: in the engine's own core, in one host call, or during backprop."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import in_place
from hvdtrain.backends.tensorflow.host_calls import on_host
from hvdtrain.collectives.engine import Call, Engine, Op, StandIn
from hvdtrain.collectives.overlap import BackgroundThread
from hvdtrain.gradients.bridge import Bridge, Exchanged
from hvdtrain.gradients.exchange import Exchange
from hvdtrain.gradients.naming import plain_variable
from hvdtrain.gradients.schemes import Plain

# During backprop, gradients are sent in parts of at least this size, in the order in which they are computed. On a
# link of 1 Gbit/s a part takes 30 ms, and the comparison of the ranks before it a thirtieth of that.
PART_BYTES = 4 << 20


class TensorFlowBridge(Bridge):
    """Tensors, `tf.IndexedSlices` and variables of TensorFlow, in a graph as well as eagerly."""

    def is_sparse(self, gradient: Any) -> bool:
        """Return whether a gradient is a `tf.IndexedSlices`."""
        return isinstance(gradient, tf.IndexedSlices)

    def parts(self, gradient: Any) -> list[Any]:
        """Return the tensors of a gradient: its values, and the indices of a sparse one."""
        return [gradient.values, gradient.indices] if self.is_sparse(gradient) else [gradient]

    def with_rows(self, gradient: Any, values: Any, indices: Any) -> Any:
        """Return `tf.IndexedSlices` of the same variable with other rows."""
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def to_dense(self, gradient: Any) -> Any:
        """Return a gradient as a dense tensor."""
        return tf.convert_to_tensor(gradient)

    def scaled(self, gradient: Any, factor: float) -> Any:
        """Return a gradient multiplied by a factor, in its own dtype."""
        if factor == 1.0:
            return gradient
        if self.is_sparse(gradient):
            return self.with_rows(gradient, self.scaled(gradient.values, factor), gradient.indices)
        return gradient * tf.constant(factor, gradient.dtype)

    def dtype_name(self, gradient: Any) -> str:
        """Return the name of a gradient's dtype, such as "float32"."""
        return gradient.dtype.name

    # AutoGraph rewrites the functions that a user's function calls; the code of `during_backprop` takes five times
    # as long when it is rewritten.
    @tf.autograph.experimental.do_not_convert
    def exchange(
        self,
        exchange: Exchange,
        dense: Sequence[Any],
        rows: Sequence[Any],
        groups: Sequence[Sequence[int]] = (),
        devices: tuple[str, str] = ("", ""),
    ) -> Exchanged:
        """Combine the gradients of one step over the ranks; see `Bridge.exchange`."""
        engine = exchange.engine
        if exchange.takes_tensors and engine.native_tensors() is not None:
            return _in_core(exchange, dense, rows, groups, devices)
        rest = sorted(set(range(len(dense))) - {index for members in groups for index in members})
        parts = [*groups, rest] if rest or not groups else list(groups)
        on_numpy = _OnNumpy(exchange, dense, rows)
        if engine.background is not None and not tf.executing_eagerly():
            return on_numpy.during_backprop(engine.background, _parts_in_backprop_order(dense, parts))
        return on_numpy.at_once(parts)

    @tf.autograph.experimental.do_not_convert
    def check(
        self,
        engine: Engine,
        due: Any,
        compare: Callable[..., list[np.ndarray]],
        variables: Sequence[Any],
        gradients: Sequence[Any],
    ) -> Any:
        """Call `compare` on the host if a step is due to be verified; see `Bridge.check`."""

        def checked() -> Any:
            values = [tf.convert_to_tensor(variable) for variable in variables]
            parts = [part for gradient in gradients for part in self.parts(gradient)]
            (passed,) = on_host(engine, compare, [*values, *parts], [tf.bool])
            passed.set_shape(())
            return passed

        return tf.cond(due, checked, lambda: tf.constant(True))

    def after(self, dependency: Any, gradients: Sequence[Any]) -> list[Any]:
        """Return the gradients such that they are used only after a tensor has been computed."""
        with tf.control_dependencies([dependency]):
            return tf.nest.map_structure(tf.identity, list(gradients), expand_composites=True)

    def readable(self, variables: Iterable[Any]) -> list[Any]:
        """Return those variables whose values can be read later: TensorFlow's, outside of a session's graph."""
        if not tf.compat.v1.executing_eagerly_outside_functions():
            return []
        return [variable for variable in variables if isinstance(plain_variable(variable), tf.Variable)]


def _in_core(
    exchange: Exchange,
    dense: Sequence[Any],
    rows: Sequence[Any],
    groups: Sequence[Sequence[int]],
    devices: tuple[str, str],
) -> Exchanged:
    """Exchange gradients by the graph operations of the engine's own core."""
    engine, op = exchange.engine, exchange.op
    call = replace(exchange.call, stand_in=_stand_in(dense, op, rows, groups, native=True))

    def agree(*sizes: np.ndarray) -> list[Any]:
        largest = engine.agree(call, max(map(int, sizes), default=0))
        _check_joined(engine, sizes, largest)
        engine.leave_to_core()
        return [np.array(exchange.begin())]

    # Not before backprop has begun: a rank whose data ends here must not have agreed to take part. The gradient of
    # the last variable is computed first, so Horovod still overlaps its reductions with backprop.
    with tf.control_dependencies(list(dense[-1:] or rows[-1:])):
        # Indices are known before backprop, so that this does not wait for the values.
        sizes = [
            tf.size(indices, tf.int64) * (values.shape[1:].num_elements() or 1)
            for values, indices in zip(rows[::2], rows[1::2], strict=True)
        ]
        (due,) = on_host(engine, agree, sizes, [tf.bool])
    with tf.control_dependencies([due]):
        combined, joined = engine.native_tensors().combine(call.kind, dense, rows, op, groups, devices)
    return Exchanged(combined, joined, due, recorded=False)


def _check_joined(engine: Engine, sizes: Sequence[np.ndarray], largest: int) -> None:
    """Raise on every rank if the ranks' rows together are more than the engine's own core can count.

    Args:
        engine: The engine.
        sizes: How many elements this rank adds to each tensor of joined rows.
        largest: The largest of these numbers on all ranks.
    """
    native, most = engine.native_tensors(), largest * engine.size
    if most > native.most_elements:
        most = int(engine.allreduce(np.array(sizes), Op.SUM).max())
    native.check_size("allgather", most)


class _OnNumpy:
    """Exchange gradients as NumPy arrays; large ones are reduced in TensorFlow's memory.

    Args:
        exchange: The operations on the arrays.
        dense: The tensors to combine.
        rows: The tensors to join.
    """

    def __init__(self, exchange: Exchange, dense: Sequence[Any], rows: Sequence[Any]) -> None:
        self._exchange, self._dense, self._rows = exchange, dense, rows
        # Where the memory of a tensor cannot be taken over, its entry is None.
        self._owned = [in_place.take_over(tensor) for tensor in dense]
        self._is_owned = [owned is not None for owned in self._owned]
        self._given = [
            tensor if owned is None else owned for tensor, owned in zip(dense, self._owned, strict=True)
        ]

    def at_once(self, parts: Sequence[Sequence[int]]) -> Exchanged:
        """Send everything in one host call, when all gradients have been computed."""
        order = [index for members in parts for index in members]
        calls = self._calls(parts)

        def send(*arrays: np.ndarray) -> list[Any]:
            due = self._exchange.begin()
            self._exchange.record(order, arrays[: len(order)])
            buffers = self._buffers(order, arrays[: len(order)])
            reduced: dict[int, np.ndarray] = {}
            for members, call in zip(parts, calls, strict=True):
                reduced.update(zip(members, self._reduced(members, call, buffers), strict=True))
            return [np.array(due), *self._returned(reduced), *self._exchange.join(arrays[len(order) :])]

        given = [self._given[index] for index in order]
        due, *results = self._on_host(send, [*given, *self._rows], [tf.bool, *self._dtypes()])
        return self._exchanged(due, due, results)

    def during_backprop(self, thread: BackgroundThread, parts: Sequence[Sequence[int]]) -> Exchanged:
        """Send each part as soon as its gradients have been computed, while backprop computes the next ones."""
        calls = self._calls(parts)

        def start(turn: int, *arrays: np.ndarray) -> list[Any]:
            if turn == 0 and thread.is_busy:
                thread.finish()  # a step was interrupted: raise the error of its thread now
            due = turn == 0 and self._exchange.begin()
            self._exchange.record(parts[turn], arrays)
            buffers = self._buffers(parts[turn], arrays, keep=True)
            thread.start(lambda: self._reduced(parts[turn], calls[turn], buffers))
            return [np.array(due)]

        def finish(*arrays: np.ndarray) -> list[Any]:
            reduced: dict[int, np.ndarray] = {}
            for members, results in zip(parts, thread.finish(), strict=True):
                reduced.update(zip(members, results, strict=True))
            return [np.array(True), *self._returned(reduced), *self._exchange.join(arrays)]

        started = []
        for turn, members in enumerate(parts):
            given = [self._given[index] for index in members]
            started += self._on_host(partial(start, turn), given, [tf.bool])
        with tf.control_dependencies(started):
            finished, *results = self._on_host(finish, list(self._rows), [tf.bool, *self._dtypes()])
        return self._exchanged(started[0], finished, results)

    def _on_host(
        self, function: Callable[..., list[Any]], tensors: list[Any], dtypes: list[Any]
    ) -> list[Any]:
        return on_host(self._exchange.engine, function, tensors, dtypes)

    def _buffers(
        self, order: Sequence[int], arrays: Sequence[np.ndarray], keep: bool = False
    ) -> dict[int, np.ndarray]:
        """Return the arrays to send, by the index of their gradient.

        Args:
            order: The indices.
            arrays: The arrays.
            keep: Whether they are used after the host call has returned. Arrays in memory that was not taken
                over are copied then, because TensorFlow may reuse their memory.
        """
        is_owned = [self._is_owned[index] for index in order]
        if keep:
            arrays = [array if owned else array.copy() for array, owned in zip(arrays, is_owned, strict=True)]
        return dict(zip(order, in_place.writable(arrays, is_owned), strict=True))

    def _calls(self, parts: Sequence[Sequence[int]]) -> list[Call | None]:
        """Return the calls that the ranks compare before each part; that of the first part names all gradients."""
        # A rank that has joined can stand in with zeros for a plain reduction only.
        plain = isinstance(self._exchange.scheme, Plain)
        stand_in = _stand_in([self._dense[index] for index in parts[0]], self._exchange.op) if plain else None
        return [replace(self._exchange.call, stand_in=stand_in), *[None] * (len(parts) - 1)]

    def _reduced(
        self, members: Sequence[int], call: Call | None, buffers: dict[int, np.ndarray]
    ) -> list[np.ndarray]:
        is_owned = [self._is_owned[index] for index in members]
        return self._exchange.reduce(members, [buffers[index] for index in members], call, is_owned)

    def _returned(self, reduced: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Return the results that TensorFlow gets as new tensors; the others are in memory that it already has."""
        return [reduced[index] for index, owned in enumerate(self._is_owned) if not owned]

    def _dtypes(self) -> list[Any]:
        moved = [tensor for tensor, owned in zip(self._dense, self._is_owned, strict=True) if not owned]
        return [tensor.dtype for tensor in (*moved, *self._rows)]

    def _exchanged(self, due: Any, finished: Any, results: list[Any]) -> Exchanged:
        """Collect the returned tensors, and those changed in place, which are not used before `finished`."""
        due.set_shape(())
        returned = iter(results)
        with tf.control_dependencies([] if tf.executing_eagerly() else [finished]), tf.device("CPU:0"):
            dense = [
                next(returned) if owned is None else in_place.read_after_change(owned)
                for owned in self._owned
            ]
        joined = list(returned)
        for result, tensor in zip(dense, self._dense, strict=True):
            result.set_shape(tensor.shape)
        for result, tensor in zip(joined, self._rows, strict=True):
            result.set_shape([None, *tensor.shape[1:]])
        return Exchanged(dense, joined, due, recorded=True)


def _parts_in_backprop_order(dense: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Divide the gradients into parts in the order of backprop: that of the last variable is computed first."""
    ordered = sorted(
        (sorted(members, reverse=True) for members in groups), key=partial(max, default=-1), reverse=True
    )
    if len(ordered) > 1:
        return ordered
    parts: list[list[int]] = [[]]
    filled = 0
    for index in ordered[0] if ordered else []:
        if filled >= PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += (dense[index].shape.num_elements() or 0) * dense[index].dtype.size
    return parts


def _stand_in(
    dense: Sequence[Any], op: Op, rows: Sequence[Any] = (), groups: Sequence[Any] = (), native: bool = False
) -> StandIn | None:
    """Describe what a rank that has joined sends; None if shapes are known only when the graph runs."""
    if not all(tensor.shape.is_fully_defined() for tensor in dense):
        return None
    return StandIn(
        tuple((tensor.dtype.name, tuple(tensor.shape)) for tensor in dense),
        tuple((tensor.dtype.name, tuple(tensor.shape[1:])) for tensor in rows),
        op,
        tuple(tuple(members) for members in groups),
        native=native,
        eager=tf.executing_eagerly(),
    )
