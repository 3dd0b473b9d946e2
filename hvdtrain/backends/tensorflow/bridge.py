"""A step's gradients on their way over the wire: in the engine's own core, all at once, or beside backprop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.backends.tensorflow import in_place
from hvdtrain.backends.tensorflow.host_calls import on_host
from hvdtrain.collectives.engine import Call, Engine, Op, StandIn
from hvdtrain.collectives.overlap import Beside

# What travels beside backprop goes in parts of this size at least, the gradients that are ready first at first: on
# a link of 1 Gbit/s it takes 30 ms, and what the ranks compare before it a thirtieth of that.
PART_BYTES = 4 << 20


@dataclass(frozen=True)
class Watch:
    """Who looks on as a step's gradients are sent.

    Args:
        begin: Called as a step begins; tells whether this step is of a special kind.
        see: Called with the place and the array of each dense gradient before it changes where it lies, unless
            the engine's own core moves it.
    """

    begin: Callable[[], bool] = lambda: False
    see: Callable[[int, np.ndarray], None] = lambda place, array: None


# AutoGraph rewrites what a user's function calls; what goes on beside backprop would take five times as long.
@tf.autograph.experimental.do_not_convert
def reduce_gradients(
    engine: Engine,
    dense: Sequence[Any],
    rows: Sequence[Any],
    op: Op,
    call: Call,
    watch: Watch = Watch(),
    groups: Sequence[Sequence[int]] = (),
    devices: tuple[str, str] = ("", ""),
) -> tuple[list[Any], list[Any], Any]:
    """Sends the gradients of one step over the wire, in a graph as well as eagerly.

    Args:
        engine: The engine that moves them.
        dense: Tensors to combine with `op`, in the order of the variables.
        rows: Tensors to join along their first dimension: values and indices of each sparse gradient in turn.
        op: SUM, AVERAGE or ADASUM.
        call: What the ranks compare before anything is sent; its kind also names the operations.
        watch: Who looks on.
        groups: Which of `dense` are to travel as one, by their indices; the rest is left to the engine.
        devices: Where graph operations of the engine's own are placed that reduce, and those that gather.

    Returns:
        The combined tensors and the joined ones, as lists like `dense` and `rows`, and what `watch.begin` said, as
        a bool tensor.
    """
    if not shown_to_numpy(engine, op):
        return _in_core(engine, dense, rows, op, call, watch, groups, devices)
    rest = sorted(set(range(len(dense))) - {index for members in groups for index in members})
    parts = [*groups, rest] if rest or not groups else list(groups)
    way = _Way(engine, dense, op, call, watch)
    if engine.beside is not None and not tf.executing_eagerly():
        return way.beside(engine.beside, _ready_first(dense, parts), rows)
    return way.at_once(parts, rows)


def shown_to_numpy(engine: Engine, op: Op) -> bool:
    """Tells whether `reduce_gradients` shows the dense gradients to NumPy, instead of to the engine's own core."""
    return op is Op.ADASUM or engine.native_tensors() is None


def _in_core(
    engine: Engine,
    dense: Sequence[Any],
    rows: Sequence[Any],
    op: Op,
    call: Call,
    watch: Watch,
    groups: Sequence[Sequence[int]],
    devices: tuple[str, str],
) -> tuple[list[Any], list[Any], Any]:
    call = replace(call, stand_in=_stand_in(dense, op, rows, groups, native=True))

    def agree(*sizes: np.ndarray) -> list[Any]:
        largest = engine.agree(call, max(map(int, sizes), default=0))
        _check_joined(engine, sizes, largest)
        engine.leave_to_core()
        return [np.array(watch.begin())]

    # Not before backprop has begun: a rank whose data end here must not have promised to take part. The last
    # variable's gradient is the first one there, so what Horovod overlaps with backprop it still does.
    with tf.control_dependencies(list(dense[-1:] or rows[-1:])):
        # Indices are known before backprop, so that this does not wait for the values.
        sizes = [
            tf.size(indices, tf.int64) * (values.shape[1:].num_elements() or 1)
            for values, indices in zip(rows[::2], rows[1::2], strict=True)
        ]
        (begun,) = on_host(engine, agree, sizes, [tf.bool])
    with tf.control_dependencies([begun]):
        return *engine.native_tensors().combine(call.kind, dense, rows, op, groups, devices), begun


def _check_joined(engine: Engine, sizes: Sequence[np.ndarray], largest: int) -> None:
    """Raises on every rank if the ranks' rows together are more than the engine's own core can count.

    Args:
        engine: The engine.
        sizes: How many elements this rank adds to each tensor of joined rows.
        largest: The largest of these numbers on all ranks.
    """
    native, most = engine.native_tensors(), largest * engine.size
    if most > native.most_elements:
        most = int(engine.allreduce(np.array(sizes), Op.SUM).max())
    native.check_size("allgather", most)


class _Way:
    """The gradients of one step, through NumPy: those that lie in memory of our own are reduced there.

    Args:
        engine: The engine that moves them.
        dense: The tensors to combine.
        op: How.
        call: What the ranks compare before anything is sent.
        watch: Who looks on.
    """

    def __init__(self, engine: Engine, dense: Sequence[Any], op: Op, call: Call, watch: Watch) -> None:
        self._engine, self._dense, self._op, self._call, self._watch = engine, dense, op, call, watch
        self._kept = [in_place.ours(each) for each in dense]
        self._stays = [each is not None for each in self._kept]
        self._given = [each if mine is None else mine for each, mine in zip(dense, self._kept, strict=True)]

    def at_once(
        self, parts: Sequence[Sequence[int]], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any], Any]:
        """Sends everything in one call of the host, when all gradients are there."""
        order = [index for members in parts for index in members]
        calls = self._calls(parts)

        def send(*arrays: np.ndarray) -> list[Any]:
            begun = self._watch.begin()
            lying = self._lying(order, arrays[: len(order)])
            returned = self._returned(
                {
                    index: result
                    for members, call in zip(parts, calls, strict=True)
                    for index, result in zip(members, self._sent(members, call, lying), strict=True)
                }
            )
            return [np.array(begun), *returned, *map(self._engine.allgather, arrays[len(order) :])]

        given = [self._given[index] for index in order]
        begun, *results = on_host(self._engine, send, [*given, *rows], [tf.bool, *self._dtypes(rows)])
        begun.set_shape(())
        return *self._arrived(begun, results, rows), begun

    def beside(
        self, thread: Beside, parts: Sequence[Sequence[int]], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any], Any]:
        """Sends each part as soon as its gradients are there, while backprop computes the next ones."""
        calls = self._calls(parts)

        def start(turn: int, *arrays: np.ndarray) -> list[Any]:
            if turn == 0 and thread.is_busy:
                thread.finish()  # a step was broken off; what went wrong beside it is said now
            begun = turn == 0 and self._watch.begin()
            lying = self._lying(parts[turn], arrays, outlive=True)
            thread.start(lambda: self._sent(parts[turn], calls[turn], lying))
            return [np.array(begun)]

        def finish(*arrays: np.ndarray) -> list[Any]:
            done = thread.finish()
            pairs = (zip(members, results, strict=True) for members, results in zip(parts, done, strict=True))
            returned = self._returned({index: result for each in pairs for index, result in each})
            return [np.array(True), *returned, *map(self._engine.allgather, arrays)]

        started = [
            on_host(self._engine, partial(start, turn), [self._given[index] for index in members], [tf.bool])[
                0
            ]
            for turn, members in enumerate(parts)
        ]
        with tf.control_dependencies(started):
            finished, *results = on_host(self._engine, finish, list(rows), [tf.bool, *self._dtypes(rows)])
        begun = started[0]
        begun.set_shape(())
        return *self._arrived(finished, results, rows), begun

    def _lying(
        self, order: Sequence[int], arrays: Sequence[np.ndarray], outlive: bool = False
    ) -> dict[int, np.ndarray]:
        """Shows the arrays to who looks on, and returns those to send; others outlive the call only as copies."""
        for index, array in zip(order, arrays, strict=True):
            self._watch.see(index, array)
        stays = [self._stays[index] for index in order]
        if outlive:
            arrays = [array if stay else array.copy() for array, stay in zip(arrays, stays, strict=True)]
        return dict(zip(order, in_place.writable(arrays, stays), strict=True))

    def _calls(self, parts: Sequence[Sequence[int]]) -> list[Call | None]:
        """Returns what the ranks compare before each part: before the first one all gradients, with their names."""
        stand_in = _stand_in([self._dense[index] for index in parts[0]], self._op)
        return [replace(self._call, stand_in=stand_in), *[None] * (len(parts) - 1)]

    def _sent(
        self, members: Sequence[int], call: Call | None, lying: dict[int, np.ndarray]
    ) -> list[np.ndarray]:
        stays = [self._stays[index] for index in members]
        return self._engine.grouped_allreduce([lying[index] for index in members], self._op, call, stays)

    def _returned(self, reduced: dict[int, np.ndarray]) -> list[np.ndarray]:
        return [reduced[index] for index, stay in enumerate(self._stays) if not stay]

    def _dtypes(self, rows: Sequence[Any]) -> list[Any]:
        moved = [each for each, stay in zip(self._dense, self._stays, strict=True) if not stay]
        return [each.dtype for each in (*moved, *rows)]

    def _arrived(self, after: Any, results: list[Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Puts together what was returned and what has changed where it lies, which nobody may see before."""
        arrived = iter(results)
        with tf.control_dependencies([] if tf.executing_eagerly() else [after]), tf.device("CPU:0"):
            reduced = [next(arrived) if mine is None else in_place.changed(mine) for mine in self._kept]
        joined = list(arrived)
        for result, each in zip(reduced, self._dense, strict=True):
            result.set_shape(each.shape)
        for result, each in zip(joined, rows, strict=True):
            result.set_shape([None, *each.shape[1:]])
        return reduced, joined


def _ready_first(dense: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Divides the gradients into parts in the order of backprop: the last variable's is the first one there."""
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
    """Describes what a rank that has joined sends; nothing where the shapes show only as the graph runs."""
    if not all(each.shape.is_fully_defined() for each in dense):
        return None
    return StandIn(
        tuple((each.dtype.name, tuple(each.shape)) for each in dense),
        tuple((each.dtype.name, tuple(each.shape[1:])) for each in rows),
        op,
        tuple(tuple(members) for members in groups),
        native=native,
        eager=tf.executing_eagerly(),
    )
