"""The bridge to TensorFlow: where its tensors become buffers for the wire, and the only place that knows how."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.base import Call, Engine, MismatchError, Op, StandIn


class TensorMismatchError(MismatchError, tf.errors.FailedPreconditionError):
    """The ranks do not ask for the same thing: a `MismatchError` that scripts written for Horovod catch too."""

    def __init__(self, message: str) -> None:
        tf.errors.FailedPreconditionError.__init__(self, None, None, message)

    def __str__(self) -> str:
        return str(self.message)


def reduce_gradients(
    engine: Engine,
    dense: Sequence[Any],
    rows: Sequence[Any],
    op: Op,
    call: Call,
    groups: Sequence[Sequence[int]] = (),
    devices: tuple[str, str] = ("", ""),
) -> tuple[list[Any], list[Any]]:
    """Sends the gradients of one step over the wire, in a graph as well as eagerly.

    Args:
        engine: The engine that moves them.
        dense: Tensors to combine with `op`.
        rows: Tensors to join along their first dimension: values and indices of sparse gradients.
        op: SUM, AVERAGE or ADASUM.
        call: What the ranks compare before anything is sent; its kind also names the operations.
        groups: Which of `dense` are to travel as one, by their indices; the rest is left to the engine.
        devices: Where graph operations of the engine's own are placed that reduce, and those that gather.

    Returns:
        The combined tensors and the joined ones, as lists like `dense` and `rows`.
    """
    native = engine.native_tensors() if op is not Op.ADASUM else None
    if native is not None:
        call = replace(call, stand_in=_stand_in(dense, op, rows, groups, native=True))
        # Not before backprop has begun: a rank whose data end here must not have promised to take part. The last
        # variable's gradient is the first one there, so what Horovod overlaps with backprop it still does.
        with tf.control_dependencies(list(dense[-1:] or rows[-1:])):
            agreed = on_host(engine, lambda: [_agreed(engine, call)], [], [tf.bool])
        with tf.control_dependencies(agreed):
            return native.combine(call.kind, dense, rows, op, groups, devices)
    rest = sorted(set(range(len(dense))) - {index for members in groups for index in members})
    order = [*groups, rest] if rest or not groups else list(groups)
    first = replace(call, stand_in=_stand_in([dense[index] for index in order[0]], op))

    def send(*arrays: np.ndarray) -> list[np.ndarray]:
        reduced = list(arrays[: len(dense)])
        for turn, members in enumerate(order):
            parts = engine.grouped_allreduce(
                [arrays[index] for index in members], op, first if turn == 0 else None
            )
            for index, part in zip(members, parts, strict=True):
                reduced[index] = part
        return reduced + [engine.allgather(each) for each in arrays[len(dense) :]]

    results = on_host(engine, send, [*dense, *rows], [each.dtype for each in (*dense, *rows)])
    for result, each in zip(results, dense, strict=False):
        result.set_shape(each.shape)
    for result, each in zip(results[len(dense) :], rows, strict=True):
        result.set_shape([None, *each.shape[1:]])
    return results[: len(dense)], results[len(dense) :]


def all_true(engine: Engine, condition: Any) -> Any:
    """Tells on every rank whether a condition holds on all ranks.

    Args:
        engine: The engine that asks.
        condition: Scalar bool tensor.

    Returns:
        Scalar bool tensor, the same on all ranks.
    """

    def ask(mine: np.ndarray) -> list[np.ndarray]:
        return [engine.allreduce(np.asarray(mine, np.uint8), Op.MIN).astype(bool)]

    (everywhere,) = on_host(engine, ask, [condition], [tf.bool])
    everywhere.set_shape(())
    return everywhere


def on_host(
    engine: Engine, function: Callable[..., list[Any]], tensors: Sequence[Any], dtypes: Sequence[Any]
) -> list[Any]:
    """Runs a function of NumPy arrays on tensors; inside a graph, each time the graph runs.

    Two such calls of one graph run in the order in which they were written, on every rank: were the order
    left to the executor, two ranks could each wait for the other's second call.

    Args:
        engine: Keeps the error, should `function` raise one: TensorFlow passes on only its text.
        function: Takes arrays, which it must not change, and returns a list of arrays.
        tensors: What to call it with.
        dtypes: Dtypes of what it returns.

    Returns:
        A list of tensors, of unknown shape inside a graph.
    """

    def run(*arrays: np.ndarray) -> list[Any]:
        try:
            return function(*arrays)
        except MismatchError as error:
            engine.last_error = TensorMismatchError(str(error))
            raise engine.last_error from None
        except Exception as error:
            engine.last_error = error
            raise

    if tf.executing_eagerly():
        results = run(*(each.numpy() for each in tensors))
        return [tf.constant(each, dtype) for each, dtype in zip(results, dtypes, strict=True)]
    with _in_turn(tensors) as outputs:
        outputs += tf.numpy_function(run, list(tensors), list(dtypes))
    return outputs


def _agreed(engine: Engine, call: Call) -> np.ndarray:
    engine.agree(call)
    engine.leave_to_core()
    return np.array(True)


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


_turns: list[Any] = []


@contextlib.contextmanager
def _in_turn(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Puts a host call of a graph behind the one before it; the caller adds what it returns to the list."""
    outputs: list[Any] = []
    graph = tf.compat.v1.get_default_graph()
    if not graph.building_function or "WhileBodyGrad" in type(graph).__name__:
        # A session's graph, or the gradient of a loop, where TensorFlow gives no order to uses of a variable.
        fed = _fed(tensors)
        earlier = graph.get_collection_ref("hvdtrain_turn")
        with tf.control_dependencies([last for last, needs in earlier if needs <= fed]):
            yield outputs
        earlier.append((outputs[0], fed))
        return
    turn = _turn()
    with tf.control_dependencies([turn.read_value()]):
        yield outputs
    with tf.control_dependencies(outputs):
        turn.assign_add(1)


def _fed(tensors: Sequence[Any]) -> frozenset[str]:
    """Names the placeholders that tensors are computed from: a call must not wait for one that needs others."""
    seen, left = set(), [each.op for each in tensors if hasattr(each, "op")]
    while left:
        operation = left.pop()
        if operation not in seen:
            seen.add(operation)
            left += [each.op for each in operation.inputs] + list(operation.control_inputs)
    return frozenset(each.name for each in seen if each.type == "Placeholder")


def _turn() -> Any:
    """Returns the variable by which TensorFlow orders host calls, as it orders all uses of a variable."""
    if not _turns:
        _turns.append(counter("hvdtrain_turn"))
    return _turns[0]


def counter(name: str) -> Any:
    """Makes a variable of zero outside of all graphs, also while a tf.function is traced for a second time.

    Then TensorFlow lets nobody make variables, and asks the graph whose function it is, within `init_scope` too.
    """
    with contextlib.ExitStack() as outside:
        if tf.compat.v1.executing_eagerly_outside_functions():
            outside.enter_context(tf.Graph().as_default())
            outside.enter_context(tf.__internal__.eager_context.eager_mode())
        outside.enter_context(tf.init_scope())
        outside.enter_context(tf.device("CPU:0"))
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
