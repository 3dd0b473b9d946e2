"""Files that `dataset.cache(path)` writes: several ranks must not write, or read parts of, the same one."""

import socket
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdtrain.collectives.engine import Engine, ranks_text
from hvdtrain.data import dataset_graph


def files_of(data: Any, whole: bool = False) -> list[str]:
    """List the cache files of a data set that must not be those of another rank.

    Args:
        data: What a user trains on; only a `tf.data.Dataset` has cache files.
        whole: Whether every rank reads the same data, so that a file that is complete is right for all.
    """
    if not isinstance(data, tf.data.Dataset):
        return []
    found = [str(Path(path).absolute()) for path in dataset_graph.cache_files(data)]
    return [path for path in found if not (whole and Path(f"{path}.index").exists())]


def refuse_common(engine: Engine, what: str, files: Sequence[str]) -> None:
    """Raise an error if several ranks of a host cache their data in the same file. All ranks call this.

    TensorFlow fails while two processes write one file. When it is complete, each would read it without a word,
    also where it holds another rank's part.

    Args:
        engine: The ranks.
        what: Begins the error.
        files: What `files_of` returns on this rank.

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
