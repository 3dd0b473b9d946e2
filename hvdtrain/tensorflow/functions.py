"""Variables and objects that must be the same everywhere, made so."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.gradients.naming import described_call
from hvdtrain.gradients.trained_variables import NOTHING, registry
from hvdtrain.runtime.process_sets import ProcessSet, engine_of, global_process_set


def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> Any:
    """Give the variables of all ranks the values of one: before the first step, or after a checkpoint is read.

    Args:
        variables: Keras or TensorFlow variables, the same list on all ranks: `model.variables`,
            `optimizer.variables`.
        root_rank: The rank whose values all take, as the whole world numbers it.
        process_set: Which ranks take part.
        inplace: Accepted for Horovod's sake: memory is used alike with both.

    Returns:
        None; in a graph of TensorFlow 1 the operation to run.

    Raises:
        ValueError: If there is no such rank, or this rank is not in `process_set`.
        MismatchError: On every rank, if the ranks hold other variables, shapes or dtypes.
    """
    assigned = _assigned(list(variables), root_rank, process_set)
    # Outside graphs of TensorFlow 1 whatever is written runs.
    written = tf.executing_eagerly() or tf.compat.v1.get_default_graph().building_function
    return None if written else tf.group(*assigned)


def broadcast_(
    variables: Sequence[Any],
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Give the variables of all ranks the values of one, and returns these as tensors.

    Args:
        variables: As for `broadcast_variables`; dtypes may be mixed.
        root_rank: The rank whose values all take.
        name: Accepted for Horovod's sake.
        process_set: Which ranks take part.

    Returns:
        A list of tensors, the values that the variables now have.

    Raises:
        Exception: As `broadcast_variables`.
    """
    assigned = _assigned(list(variables), root_rank, process_set)
    with tf.control_dependencies(assigned):
        return [tf.identity(each) for each in variables]


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Give every rank a Python object of one, such as the epoch at which a resumed run goes on.

    Args:
        obj: Anything that can be pickled; what ranks other than `root_rank` pass is ignored.
        root_rank: The rank whose object all receive.
        session: Accepted for Horovod's sake; no session is needed.
        name: Accepted for Horovod's sake.
        process_set: Which ranks take part.

    Returns:
        The object of `root_rank`.

    Raises:
        ValueError: If there is no such rank, or this rank is not in `process_set`.
    """
    return engine_of(process_set).broadcast_object(obj, root_rank)


def broadcast_object_fn(
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """Return a function of one object that does what `broadcast_object` does, with these arguments."""
    return functools.partial(
        broadcast_object, root_rank=root_rank, session=session, name=name, process_set=process_set
    )


def allgather_object(
    obj: Any,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Give every rank the Python objects of all.

    Args:
        obj: Anything that can be pickled.
        session: Accepted for Horovod's sake; no session is needed.
        name: Accepted for Horovod's sake.
        process_set: Which ranks take part.

    Returns:
        The objects in the order of the ranks.

    Raises:
        ValueError: If this rank is not in `process_set`.
    """
    return engine_of(process_set).allgather_object(obj)


def _assigned(variables: Sequence[Any], root_rank: int, process_set: ProcessSet) -> list[Any]:
    engine = engine_of(process_set)
    if engine.size > 1:
        registry.note_broadcast(engine, variables)
        if not variables:
            engine.say(NOTHING)
    details = [f"{tf.as_dtype(each.dtype).name} {tuple(each.shape)}" for each in variables]
    call = described_call(f"broadcast of variables from rank {root_rank}", variables, details)
    values = [tf.convert_to_tensor(each) for each in variables]
    received = differentiable.broadcast(engine, values, root_rank, call)
    assigned = [variable.assign(value) for variable, value in zip(variables, received, strict=True)]
    return [each for each in assigned if each is not None]
