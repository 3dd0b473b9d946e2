"""The bridge to TensorFlow: where its tensors become buffers for the wire, and the only place that knows how."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.base import Call, Engine, Op


def reduce_gradients(
    engine: Engine, dense: Sequence[Any], rows: Sequence[Any], op: Op, call: Call
) -> tuple[list[Any], list[Any]]:
    """Sends the gradients of one step over the wire, in a graph as well as eagerly.

    Args:
        engine: The engine that moves them.
        dense: Tensors to combine with `op`.
        rows: Tensors to join along their first dimension: values and indices of sparse gradients.
        op: SUM or AVERAGE.
        call: What the ranks compare before anything is sent; its kind also names the operations.

    Returns:
        The combined tensors and the joined ones, as lists like `dense` and `rows`.
    """
    native = engine.native_tensors()
    if native is not None:
        with tf.control_dependencies(on_host(engine, lambda: [_agreed(engine, call)], [], [tf.bool])):
            reduced = [native.allreduce(each, op, f"{call.kind}.{i}") for i, each in enumerate(dense)]
            joined = [native.allgather(each, f"{call.kind}.rows.{i}") for i, each in enumerate(rows)]
        return reduced, joined

    def send(*arrays: np.ndarray) -> list[np.ndarray]:
        reduced = engine.grouped_allreduce(arrays[: len(dense)], op, call)
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
        except Exception as error:
            engine.last_error = error
            raise

    if tf.executing_eagerly():
        results = function(*(each.numpy() for each in tensors))
        return [tf.constant(each, dtype) for each, dtype in zip(results, dtypes, strict=True)]
    turn = _turn()
    with tf.control_dependencies([turn.read_value()]):
        outputs = tf.numpy_function(run, list(tensors), list(dtypes))
    with tf.control_dependencies(outputs):
        turn.assign_add(1)
    return outputs


def _agreed(engine: Engine, call: Call) -> np.ndarray:
    engine.agree(call)
    return np.array(True)


_turns: list[Any] = []


def _turn() -> Any:
    """Returns the variable by which TensorFlow orders host calls, as it orders all uses of a variable."""
    if not _turns:
        with tf.init_scope(), tf.device("CPU:0"):
            _turns.append(tf.Variable(0, dtype=tf.int64, trainable=False, name="hvdtrain_turn"))
    return _turns[0]
