"""Detect that every rank trains on the same data, and warn."""

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.data import dataset_graph, structures

BATCHES = 2  # batches of the first epoch to compare: equal ones are no coincidence

_SAME_BATCHES = "the first batches are identical on all {size} ranks, so {size} ranks learn no more than one"
_SAME_SOURCE = (
    "each of the {size} ranks goes through all of it in its own order, which takes as long as on one process"
)
_WARNING = (
    "every rank trains on the same data: {why}. Type: model.fit(hvd.shard((x, y), batch_size=…), …) without "
    "batch_size for fit; or let each rank load its own part."
)


class Fingerprint:
    """Checksums of the first batches, recorded while the model reads them.

    `over` returns the same data set and records its first elements: nothing is read ahead and nothing is
    changed. Only inputs count, so that targets of one class do not look like equal data.
    """

    def __init__(self, source: int | None = None) -> None:
        self._source = (
            source  # checksum of the data before shuffling, if each rank may shuffle it differently
        )
        self._sums: list[int] = []

    @classmethod
    def of(cls, fit: Mapping[str, Any]) -> "Fingerprint":
        """Make a fingerprint with the facts that are known before the first batch, from the arguments of a `fit`.

        Keras shuffles arrays and PyDatasets with each process's own random numbers, so that equal data may give
        different batches.
        """
        whole = fit.get("steps_per_epoch") is None  # else each rank may run only its share of the steps
        with contextlib.suppress(Exception):  # data that cannot be read raises its error in fit
            return cls(_source_digest(fit) if whole and fit.get("shuffle", True) else None)
        return cls()

    def over(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Return a data set with the same elements that records the first ones when they are read."""

        def note(*leaves: Any) -> np.bool_:
            if len(self._sums) < BATCHES:
                self._sums.append(digest(list(leaves)))
            return np.bool_(True)

        def noted(index: tf.Tensor, batch: Any) -> Any:
            x = batch[0] if isinstance(batch, tuple) else batch
            leaves = [leaf for leaf in tf.nest.flatten(x, expand_composites=True) if tf.is_tensor(leaf)]
            seen = tf.cond(
                index < BATCHES, lambda: tf.numpy_function(note, leaves, tf.bool), lambda: tf.constant(True)
            )
            with tf.control_dependencies([seen]):
                return tf.nest.map_structure(tf.identity, batch, expand_composites=True)

        watched = dataset.enumerate().map(noted)
        length = dataset.cardinality()
        return watched.apply(tf.data.experimental.assert_cardinality(length)) if length >= 0 else watched

    def value(self) -> int | None:
        """Return the fingerprint of the recorded batches; None before the first batch."""
        return zlib.crc32(repr(self._sums).encode()) if self._sums else None

    def verdict(self, engine: Engine) -> str | None:
        """Return the warning if all ranks train on the same data, or None. Every rank must call this."""
        if engine.size == 1:
            return None
        engine.agree(Call("comparison of data"))
        values, sources = zip(*engine.allgather_object((self.value(), self._source)), strict=True)
        return verdict(values) or verdict(sources, _SAME_SOURCE)


def verdict(values: Sequence[int | None], why: str = _SAME_BATCHES) -> str | None:
    """Return the warning if all ranks have the same value, or None."""
    if len(values) == 1 or values[0] is None or len(set(values)) > 1:
        return None
    return _WARNING.format(why=why.format(size=len(values)))


def digest(x: Any) -> int:
    """Return the CRC-32 over all arrays of a nest, their shapes and dtypes included."""
    return structures.checksum_of_all(np.asarray(leaf) for leaf in keras.tree.flatten(x))


def _source_digest(fit: Mapping[str, Any]) -> int | None:
    """Return the CRC-32 of some samples before shuffling; None if they cannot be compared."""
    x = fit.get("x")
    if isinstance(x, keras.utils.PyDataset):
        return digest([x.num_batches, x[0]]) if x.num_batches else None
    if isinstance(x, tf.data.Dataset):
        source = dataset_graph.only_shuffled(x)
        return None if source is None else digest(list(source.take(BATCHES)))
    leaves = keras.tree.flatten([fit.get(name) for name in ("x", "y", "sample_weight")])
    given = [leaf for leaf in leaves if leaf is not None]
    if not all(hasattr(leaf, "shape") for leaf in given):
        return None
    arrays = [np.asarray(leaf) for leaf in given]
    return digest([[np.array(array.shape), structures.spread(array)] for array in arrays])
