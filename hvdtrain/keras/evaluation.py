"""Evaluate and predict on all ranks: divide the data among them, and return the result of one process."""

from typing import Any

import keras
import numpy as np

from hvdtrain import runtime
from hvdtrain.collectives.agreement import root_index
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures
from hvdtrain.data.collective_errors import compare, together
from hvdtrain.data.shard import Sharded
from hvdtrain.keras.callbacks.distributed import telling
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.dealt_batches import Arrays, DealtData, Facts, dealt_data
from hvdtrain.keras.membership import engine_of


def evaluate(
    model: keras.Model,
    data: Any,
    y: Any = None,
    batch_size: int | None = None,
    verbose: Any = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
) -> Any:
    """Evaluate a model on all ranks, each on its part of the data, with the result of one process.

    The batches of `model.evaluate` are distributed to the ranks in turn, and the states of all metrics are
    combined, not their results: loss, AUC, F1, MeanIoU and all others are those of the whole data, on every rank.
    All ranks call this with the same, whole data.

    Args:
        model: A compiled model, the same on all ranks.
        data: x, (x, y) or (x, y, sample_weight) of arrays; or batches of these: a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator; or the result of `hvd.shard`.
        y: Targets, if `data` contains the inputs only.
        batch_size: Samples of a batch on one rank; 32 by default.
        verbose: As for `model.evaluate`; only rank 0 prints.
        sample_weight: Weights, if `data` contains the inputs only.
        steps: Number of batches to take, over all ranks; None for all.
        callbacks: As for `model.evaluate`.
        return_dict: True for a dict by names of metrics, False for a list in their order.

    Returns:
        The result of `model.evaluate`, the same on all ranks.

    Raises:
        ValueError: If the model trains on a process set, the data is empty or endless, its order is not the same
            on all ranks, or the state of a metric cannot be combined.
        RuntimeError: If another rank cannot read its data; its error is quoted.
        MismatchError: On every rank, if data or weights differ between the ranks, or one of them fails.
    """
    engine = _world(model, "hvd.evaluate")
    part, divided = _part(engine, data, (y, sample_weight), batch_size, steps)
    given = keras.tree.flatten([] if callbacks is None else callbacks)
    with telling(engine, "hvd.evaluate"):
        return model.evaluate(
            **part,
            verbose=verbose if engine.rank == 0 else 0,
            callbacks=[MetricAverageCallback(), *given] if divided else given,
            return_dict=return_dict,
        )


def predict(
    model: keras.Model,
    data: Any,
    batch_size: int | None = None,
    verbose: Any = "auto",
    steps: int | None = None,
    root_rank: int | None = None,
) -> Any:
    """Predict on all ranks, each for its part of the data, and return all predictions in the order of the data.

    The batches of `model.predict` are distributed to the ranks in turn. All ranks call this with the same, whole
    data. Every rank reads a `tf.data.Dataset` or generator completely, and predicts for its part.

    Args:
        model: A model, the same on all ranks.
        data: Inputs as for `model.predict`: an array, a list, tuple or dict of arrays, or batches: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, or a generator.
        batch_size: Samples of a batch on one rank; 32 by default.
        verbose: As for `model.predict`, on rank 0; only arrays have a progress bar.
        steps: Number of batches to take, over all ranks; None for all.
        root_rank: The only rank that gets the predictions, which saves memory on the others; None for all.

    Returns:
        The result of `model.predict`: an array of shape (samples, ...), or a nest of arrays. None on ranks other
        than `root_rank`.

    Raises:
        ValueError: If the data is empty or endless, its order is not the same on all ranks, or there is no such
            rank.
        TypeError: If the data comes from `hvd.shard`.
        RuntimeError: If another rank fails; its error is quoted.
        MismatchError: On every rank, if data or weights differ between the ranks.
    """
    engine = _world(model, "hvd.predict")
    if root_rank is not None:
        root_index(engine.ranks, root_rank, "hvd.predict")
    whole = _whole(engine, "hvd.predict", (data, None, None), batch_size, steps)
    silent = 0 if engine.rank else verbose
    outputs = together(engine, "hvd.predict", lambda: _predicted(model, whole, engine, silent))
    return _in_order(engine, outputs, root_rank)


def _world(model: keras.Model, function: str) -> Engine:
    """Return the engine of all ranks, after checking that they have the same model."""
    world = runtime.engine()
    if engine_of(model) is not world:
        raise ValueError(
            f"{function} divides the data among all {world.size} ranks, but this model trains on a process set. "
            "Call model.evaluate or model.predict on its ranks."
        )
    facts = [
        (f"weight {weight.path}", f"checksum {structures.checksum(weight.numpy()):08x}")
        for weight in model.weights
    ]
    advice = (
        "hvd.broadcast_variables(model.weights, root_rank=0) makes them the same; "
        "hvd.callbacks.distributed(...) keeps BatchNormalization's statistics the same while the model trains."
    )
    compare(world, function, facts, advice)
    return world


def _part(
    engine: Engine, data: Any, y_and_weight: tuple[Any, Any], batch_size: int | None, steps: int | None
) -> tuple[dict[str, Any], bool]:
    """Return the arguments of this rank's `evaluate`, and whether they are a part of the data.

    If there are fewer batches than ranks, every rank evaluates the whole data.
    """
    if isinstance(data, Sharded):
        return {"x": data, "y": y_and_weight[0], "sample_weight": y_and_weight[1], "steps": steps}, True
    apart = y_and_weight[0] is None and isinstance(data, tuple)
    parts = structures.unpacked(data) if apart else (data, *y_and_weight)
    whole = _whole(engine, "hvd.evaluate", parts, batch_size, steps)
    if not together(engine, "hvd.evaluate", lambda: whole.enough(engine.size)):
        return {"x": whole.as_x()}, False
    return {"x": whole.dealt(engine.rank, engine.size).as_x()}, True


def _whole(
    engine: Engine, function: str, parts: tuple[Any, Any, Any], batch_size: int | None, steps: int | None
) -> DealtData:
    """Return the batches of the data, after checking that it is the same on all ranks."""

    def read() -> tuple[DealtData, Facts]:
        if isinstance(parts[0], Sharded):
            raise TypeError(f"{function} divides the data itself: give it what you gave to hvd.shard.")
        whole = dealt_data(parts, batch_size, steps, engine.size)
        return whole, whole.facts()

    whole, facts = together(engine, function, read)
    compare(engine, function, facts, "Load the same, whole data on every rank; each takes its part of it.")
    return whole


def _predicted(model: keras.Model, whole: DealtData, engine: Engine, verbose: Any) -> list[Any]:
    """Return the outputs of this rank's batches."""
    mine = whole.dealt(engine.rank, engine.size)
    if not isinstance(mine, Arrays):
        model.make_predict_function()
        outputs = []
        for batch in mine:
            given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)  # as Keras' adapters do
            result = model.predict_function([given])
            outputs.append(keras.tree.map_structure(keras.ops.convert_to_numpy, result))
        return outputs
    if not mine.length:
        return []
    outputs = model.predict(mine.parts[0], mine.batch_size, verbose)
    starts = range(0, mine.length, mine.batch_size)
    return [
        keras.tree.map_structure(lambda leaf, at=at: leaf[at : at + mine.batch_size], outputs)
        for at in starts
    ]


def _in_order(engine: Engine, outputs: list[Any], root_rank: int | None) -> Any:
    """Join the outputs of all ranks, in the order of the batches in the data."""
    leaves = [keras.tree.flatten(output) for output in outputs]
    counts = [len(arrays[0]) for arrays in leaves]
    pattern = keras.tree.pack_sequence_as(outputs[0], list(range(len(leaves[0])))) if outputs else None
    empty = [np.asarray(leaf)[:0] for leaf in leaves[0]] if outputs else []
    everyone = engine.allgather_object((pattern, empty, counts))
    pattern, empty, _ = everyone[0]
    if not empty:
        raise ValueError("hvd.predict: the data holds no samples.")
    order = _places([rank_counts for _, _, rank_counts in everyone])
    joined = []
    for index, nothing in enumerate(empty):
        rows = np.concatenate([nothing, *(arrays[index] for arrays in leaves)])
        whole = _gathered(engine, rows, root_rank)
        joined.append(whole[order] if root_rank in (None, runtime.engine().rank) else None)
    if joined[0] is None:
        return None
    return keras.tree.map_structure(lambda index: joined[index], pattern)


def _places(counts: list[list[int]]) -> np.ndarray:
    """Return the position of each row of the data in the rows of rank 0, followed by those of rank 1, and so on.

    Args:
        counts: For each rank the number of rows in each of its batches.
    """
    batch_of_row = []
    for rank, rank_counts in enumerate(counts):
        batches = rank + len(counts) * np.arange(len(rank_counts))
        batch_of_row.append(np.repeat(batches, rank_counts))
    return np.argsort(np.concatenate(batch_of_row), kind="stable")


def _gathered(engine: Engine, rows: np.ndarray, root_rank: int | None) -> np.ndarray:
    if rows.dtype.kind in "OSU":
        return np.concatenate(engine.allgather_object(rows))
    if root_rank is None:
        return engine.allgather(rows)
    return engine.alltoall(rows, [len(rows) * (rank == root_rank) for rank in engine.ranks])[0]
