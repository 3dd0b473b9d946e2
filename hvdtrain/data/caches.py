"""Reject cache files of `dataset.cache(path)` that several ranks of a host would write or read."""

import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.data import dataset_graph


def files_of(data: Any, whole: bool = False) -> list[str]:
    """List the cache files of a data set that no other rank may use.

    Args:
        data: The training data; only a `tf.data.Dataset` has cache files.
        whole: Whether every rank reads the same data, so that a complete file is correct for all.
    """
    if not isinstance(data, tf.data.Dataset):
        return []
    found = [str(Path(path).absolute()) for path in dataset_graph.cache_files(data)]
    return [path for path in found if not (whole and Path(f"{path}.index").exists())]


def refuse_common(engine: Engine, what: str, files: Sequence[str]) -> None:
    """Raise an error if several ranks of a host cache their data in the same file. All ranks call this.

    TensorFlow fails if two processes write one file. If the file is complete, every process reads it without an
    error, even when it holds another rank's part.

    Args:
        engine: The ranks.
        what: The first words of the error message.
        files: The result of `files_of` on this rank.

    Raises:
        ValueError: On every rank.
    """
    users = defaultdict(list)
    everywhere = engine.allgather_object((socket.gethostname(), list(files)))
    for rank, (host, paths) in zip(engine.ranks, everywhere, strict=True):
        for path in paths:
            users[host, path].append(rank)
    for (_, path), ranks in users.items():
        if len(ranks) > 1:
            raise ValueError(
                f"{what}: {ranks_text(ranks)} cache their data in the same file, {path}. Each rank needs a file of "
                f"its own: dataset.cache(f'{path}-{{hvd.rank()}}'); or leave the path out, to cache in memory."
            )
