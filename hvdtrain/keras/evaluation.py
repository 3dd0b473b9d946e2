"""`hvd.evaluate` and `hvd.predict`: the work divided among the ranks, the result that of one process."""

import itertools
from typing import Any

import keras
import numpy as np

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.data import structures
from hvdtrain.data.collective_errors import compare, together
from hvdtrain.data.shard import Sharded
from hvdtrain.keras.callbacks.error_propagation import telling
from hvdtrain.keras.callbacks.membership import engine_of
from hvdtrain.keras.callbacks.metric_average import MetricAverageCallback
from hvdtrain.keras.dealt_batches import Arrays, Deck, Facts, deck


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
    """Evaluate a model on all ranks at once, each on its part of the data, exactly as one process would.

    The batches are those of `model.evaluate`, dealt to the ranks in turn, and the states of all metrics are
    combined, not their results: loss, AUC, F1, MeanIoU and all others are those of the whole data, on every
    rank. All ranks call this with the same, whole data.

    Args:
        model: A compiled model, the same on all ranks.
        data: x, (x, y) or (x, y, sample_weight) of arrays; or batches of these: a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator; or what `hvd.shard` returned.
        y: Targets, where `data` holds the inputs only.
        batch_size: Samples of a batch on one rank; 32 by default.
        verbose: As for `model.evaluate`; the other ranks than rank 0 print nothing.
        sample_weight: Weights, likewise.
        steps: How many batches to take, over all ranks; None for all.
        callbacks: As for `model.evaluate`.
        return_dict: True for a dict by names of metrics, False for a list in their order.

    Returns:
        What `model.evaluate` returns, the same on all ranks.

    Raises:
        ValueError: If the model trains on a process set, the data is empty or endless, its order is not the same
            on all ranks, or the state of a metric cannot be combined.
        RuntimeError: If another rank cannot read its data; its error is quoted.
        MismatchError: On every rank, if data or weights differ between the ranks, or one of them fails.
    """
    engine = _world(model, "hvd.evaluate")
    part, divided = _part(engine, data, (y, sample_weight), batch_size, steps)
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks] * (callbacks is not None)
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
    """Predict on all ranks at once, each for its part of the data, and returns all of it in the order of the data.

    The batches are those of `model.predict`, dealt to the ranks in turn. All ranks call this with the same, whole
    data. Of a `tf.data.Dataset` or generator every rank reads the whole, and predicts for its part.

    Args:
        model: A model, the same on all ranks.
        data: Inputs as for `model.predict`: an array, a list, tuple or dict of arrays, or batches: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, or a generator.
        batch_size: Samples of a batch on one rank; 32 by default.
        verbose: As for `model.predict`, on rank 0; only arrays have a progress bar.
        steps: How many batches to take, over all ranks; None for all.
        root_rank: The only rank to get the prediction, which saves the memory of the others; None for all.

    Returns:
        What `model.predict` returns: an array of shape (samples, ...), or a nest of them. None on other ranks
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
        engine.check_root(root_rank, "hvd.predict")
    whole = _whole(engine, "hvd.predict", (data, None, None), batch_size, steps)
    silent = 0 if engine.rank else verbose
    outputs = together(engine, "hvd.predict", lambda: _predicted(model, whole, engine, silent))
    return _in_order(engine, outputs, root_rank)


def _world(model: keras.Model, function: str) -> Engine:
    """Return the engine of all ranks, once it is known that they hold the same model."""
    world = runtime.engine()
    if engine_of(model) is not world:
        raise ValueError(
            f"{function} divides the data among all {world.size} ranks, but this model trains on a process set. "
            "Call model.evaluate or model.predict on its ranks."
        )
    facts = [
        (f"weight {each.path}", f"checksum {structures.checksum(each.numpy()):08x}") for each in model.weights
    ]
    compare(
        world,
        function,
        facts,
        "hvd.broadcast_variables(model.weights, root_rank=0) makes them the same; "
        "hvd.callbacks.distributed(...) keeps BatchNormalization's statistics the same while the model trains.",
    )
    return world


def _part(
    engine: Engine, data: Any, beside: tuple[Any, Any], batch_size: int | None, steps: int | None
) -> tuple[dict[str, Any], bool]:
    """Return what this rank evaluates, and whether it is a part: where some rank would have none, all take all."""
    if isinstance(data, Sharded):
        return {"x": data, "y": beside[0], "sample_weight": beside[1], "steps": steps}, True
    apart = beside[0] is None and isinstance(data, tuple)
    parts = structures.unpacked(data) if apart else (data, *beside)
    whole = _whole(engine, "hvd.evaluate", parts, batch_size, steps)
    if not together(engine, "hvd.evaluate", lambda: whole.enough(engine.size)):
        return whole.arguments(), False
    return whole.dealt(engine.rank, engine.size).arguments(), True


def _whole(
    engine: Engine, function: str, parts: tuple[Any, Any, Any], batch_size: int | None, steps: int | None
) -> Deck:
    """Read what the user calls data, once it is known to be the same on all ranks."""

    def read() -> tuple[Deck, Facts]:
        if isinstance(parts[0], Sharded):
            raise TypeError(f"{function} divides the data itself: give it what you gave to hvd.shard.")
        whole = deck(parts, batch_size, steps, engine.size)
        return whole, whole.facts()

    whole, facts = together(engine, function, read)
    compare(engine, function, facts, "Load the same, whole data on every rank; each takes its part of it.")
    return whole


def _predicted(model: keras.Model, whole: Deck, engine: Engine, verbose: Any) -> list[Any]:
    """Return the outputs of this rank's batches."""
    mine = whole.dealt(engine.rank, engine.size)
    if not isinstance(mine, Arrays):
        model.make_predict_function()
        return [_numpy(model.predict_function([_as_batch(each)])) for each in mine]
    if not mine.length:
        return []
    outputs = model.predict(mine.parts[0], mine.batch_size, verbose)
    starts = range(0, mine.length, mine.batch_size)
    return [
        keras.tree.map_structure(lambda leaf, at=at: leaf[at : at + mine.batch_size], outputs)
        for at in starts
    ]


def _as_batch(batch: Any) -> tuple[Any, ...]:
    """Return what Keras' adapters would make of a batch: x alone in a tuple."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _numpy(outputs: Any) -> Any:
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def _in_order(engine: Engine, outputs: list[Any], root_rank: int | None) -> Any:
    """Join all ranks' outputs, batch after batch as they stand in the data."""
    leaves = [keras.tree.flatten(each) for each in outputs]
    counts = [len(each[0]) for each in leaves]
    pattern = keras.tree.pack_sequence_as(outputs[0], list(range(len(leaves[0])))) if outputs else None
    empty = [np.asarray(leaf)[:0] for leaf in leaves[0]] if outputs else []
    everyone = engine.allgather_object((pattern, empty, counts))
    pattern, empty, _ = everyone[0]
    if not empty:
        raise ValueError("hvd.predict: the data holds no samples.")
    order = _places([each for _, _, each in everyone])
    joined = []
    for index, nothing in enumerate(empty):
        whole = _gathered(engine, np.concatenate([nothing, *(each[index] for each in leaves)]), root_rank)
        joined.append(whole[order] if root_rank in (None, runtime.engine().rank) else None)
    if joined[0] is None:
        return None
    return keras.tree.map_structure(lambda index: joined[index], pattern)


def _places(counts: list[list[int]]) -> np.ndarray:
    """Return where each row of the data stands among the rows of rank 0, those of rank 1, and so on."""
    ends = np.cumsum([count for rank in counts for count in rank])
    blocks = iter(
        [np.arange(end - count, end) for end, count in zip(ends, itertools.chain(*counts), strict=True)]
    )
    ranks = [[next(blocks) for _ in rank] for rank in counts]
    batches = range(sum(map(len, counts)))
    return np.concatenate([ranks[batch % len(ranks)][batch // len(ranks)] for batch in batches])


def _gathered(engine: Engine, rows: np.ndarray, root_rank: int | None) -> np.ndarray:
    if rows.dtype.kind in "OSU":
        return np.concatenate(engine.allgather_object(rows))
    if root_rank is None:
        return engine.allgather(rows)
    return engine.alltoall(rows, [len(rows) * (rank == root_rank) for rank in engine.ranks])[0]
