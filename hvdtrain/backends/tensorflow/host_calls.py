"""Run functions of NumPy arrays on TensorFlow's tensors, on the host and in the same order on all ranks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Engine, MismatchError, Op


class TensorMismatchError(MismatchError, tf.errors.FailedPreconditionError):
    """The ranks request different operations: a `MismatchError` that scripts written for Horovod catch too."""

    def __init__(self, message: str) -> None:
        tf.errors.FailedPreconditionError.__init__(self, None, None, message)

    def __str__(self) -> str:
        return str(self.message)


def all_true(engine: Engine, condition: Any) -> Any:
    """Return on every rank whether a condition holds on all ranks.

    Args:
        engine: The engine that compares the ranks.
        condition: Scalar bool tensor.

    Returns:
        Scalar bool tensor, the same on all ranks.
    """

    def compare(own: np.ndarray) -> list[np.ndarray]:
        return [engine.allreduce(np.asarray(own, np.uint8), Op.MIN).astype(bool)]

    (everywhere,) = on_host(engine, compare, [condition], [tf.bool])
    everywhere.set_shape(())
    return everywhere


def on_host(
    engine: Engine, function: Callable[..., list[Any]], tensors: Sequence[Any], dtypes: Sequence[Any]
) -> list[Any]:
    """Run a function of NumPy arrays on tensors; inside a graph, each time the graph runs.

    The calls of one graph run in the order of the program, on every rank. If TensorFlow's executor chose the order,
    two ranks could start different calls, and each would wait forever for the other.

    Args:
        engine: Stores an error that `function` raises, because TensorFlow passes on only its text.
        function: Takes arrays, which it must not change, and returns a list of arrays.
        tensors: The arguments.
        dtypes: Dtypes of the results.

    Returns:
        A list of tensors, of unknown shape inside a graph.
    """

    def run(*arrays: np.ndarray) -> list[Any]:
        try:
            return function(*arrays)
        except MismatchError as error:
            engine.last_error = TensorMismatchError(str(error))
            engine.last_error.__dict__.update(error.__dict__)  # keeps the marks of the error
            raise engine.last_error from None
        except Exception as error:
            engine.last_error = error
            raise

    if tf.executing_eagerly():
        results = run(*(tensor.numpy() for tensor in tensors))
        return [tf.constant(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]
    with _in_turn(tensors) as outputs:
        outputs += tf.numpy_function(run, list(tensors), list(dtypes))
    return outputs


_turns: list[Any] = []


@contextlib.contextmanager
def _in_turn(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Run a host call of a graph after the previous one; the caller adds the results of the call to the list."""
    outputs: list[Any] = []
    graph = tf.compat.v1.get_default_graph()
    if not graph.building_function or "WhileBodyGrad" in type(graph).__name__:
        # In a session's graph, or in the gradient of a loop, TensorFlow does not order the uses of a variable.
        # The no_op has the same control dependencies as the host call will have.
        placeholders = _needed_placeholders(
            [*(tensor.op for tensor in tensors if hasattr(tensor, "op")), tf.no_op()]
        )
        earlier = graph.get_collection_ref("hvdtrain_turn")
        with tf.control_dependencies([last for last, needs in earlier if needs <= placeholders]):
            yield outputs
        earlier.append((outputs[0], placeholders))
        return
    turn = _turn()
    with tf.control_dependencies([turn.read_value()]):
        yield outputs
    with tf.control_dependencies(outputs):
        turn.assign_add(1)


def _needed_placeholders(operations: Sequence[Any]) -> frozenset[str]:
    """Return the placeholders that operations need: a call must not wait for a call that needs others."""
    seen, remaining = set(), list(operations)
    while remaining:
        operation = remaining.pop()
        if operation not in seen:
            seen.add(operation)
            remaining += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    return frozenset(operation.name for operation in seen if operation.type == "Placeholder")


def _turn() -> Any:
    """Return the variable that all host calls use: TensorFlow orders the uses of a variable."""
    if not _turns:
        _turns.append(counter("hvdtrain_turn"))
    return _turns[0]


def counter(name: str, device: str | None = "CPU:0") -> Any:
    """Create a variable with value 0 outside of all graphs, also while a tf.function is traced for a second time.

    During a second trace TensorFlow forbids new variables, also within `init_scope`, because it checks the graph of
    the function; so the default graph is replaced by a new one.
    """
    with contextlib.ExitStack() as outside:
        if tf.compat.v1.executing_eagerly_outside_functions():
            outside.enter_context(tf.Graph().as_default())
            outside.enter_context(tf.__internal__.eager_context.eager_mode())
        outside.enter_context(tf.init_scope())
        outside.enter_context(tf.device(device))
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
