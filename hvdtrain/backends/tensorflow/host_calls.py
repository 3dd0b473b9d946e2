"""The bridge to TensorFlow: where its tensors become buffers for the wire, and the only place that knows how."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Engine, MismatchError, Op


class TensorMismatchError(MismatchError, tf.errors.FailedPreconditionError):
    """The ranks do not ask for the same thing: a `MismatchError` that scripts written for Horovod catch too."""

    def __init__(self, message: str) -> None:
        tf.errors.FailedPreconditionError.__init__(self, None, None, message)

    def __str__(self) -> str:
        return str(self.message)


def all_true(engine: Engine, condition: Any) -> Any:
    """Return on every rank whether a condition holds on all ranks.

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
    """Run a function of NumPy arrays on tensors; inside a graph, each time the graph runs.

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
            engine.last_error.__dict__.update(error.__dict__)  # what is noted of the error stays noted
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


_turns: list[Any] = []


@contextlib.contextmanager
def _in_turn(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Put a host call of a graph behind the one before it; the caller adds what it returns to the list."""
    outputs: list[Any] = []
    graph = tf.compat.v1.get_default_graph()
    if not graph.building_function or "WhileBodyGrad" in type(graph).__name__:
        # A session's graph, or the gradient of a loop, where TensorFlow gives no order to uses of a variable.
        # The operation that does nothing shows the control dependencies that the host call will get.
        fed = _fed([*(each.op for each in tensors if hasattr(each, "op")), tf.no_op()])
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


def _fed(operations: Sequence[Any]) -> frozenset[str]:
    """Name the placeholders that operations need: a call must not wait for one that needs others."""
    seen, left = set(), list(operations)
    while left:
        operation = left.pop()
        if operation not in seen:
            seen.add(operation)
            left += [each.op for each in operation.inputs] + list(operation.control_inputs)
    return frozenset(each.name for each in seen if each.type == "Placeholder")


def _turn() -> Any:
    """Return the variable by which TensorFlow orders host calls, as it orders all uses of a variable."""
    if not _turns:
        _turns.append(counter("hvdtrain_turn"))
    return _turns[0]


def counter(name: str, device: str | None = "CPU:0") -> Any:
    """Make a variable of zero outside of all graphs, also while a tf.function is traced for a second time.

    Then TensorFlow lets nobody make variables, and asks the graph whose function it is, within `init_scope` too.
    """
    with contextlib.ExitStack() as outside:
        if tf.compat.v1.executing_eagerly_outside_functions():
            outside.enter_context(tf.Graph().as_default())
            outside.enter_context(tf.__internal__.eager_context.eager_mode())
        outside.enter_context(tf.init_scope())
        outside.enter_context(tf.device(device))
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
