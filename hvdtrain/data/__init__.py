"""Decide which rank reads which samples, and where a run that goes on continues.

From the user's data to a batch: `shard` (what `hvd.shard` was given) → one source of it (`arrays`, `pydataset`,
`datasets` with `pipelines` and `dataset_graph`, or `generators`) → `sample_plan` (which rank has which rows) →
`local_batch` (a rank's rows and their number) → `sharded_dataset` (what `fit` or a loop reads, with its
`position`).

What Keras reads of it: `adapters`; `global_batch` weights gradients and metrics by numbers of samples, `losses`
makes the ranks' losses add up, `callback_order` counts steps. The ranks among each other: `collective_errors` (one
error for all), `local_first` (one works, the others wait), `fingerprint` (the same data on all), `caches` (no two
ranks write one file).
"""

from hvdtrain.data.local_first import first_on_node, first_overall
from hvdtrain.data.shard import shard

__all__ = ["first_on_node", "first_overall", "shard"]
