"""Who reads which samples, and where a run that goes on continues.

From the user's data to a batch: `sharding` (what `hvd.shard` was given) → one source of it (`arrays`,
`pydataset`, `datasets` with `pipelines` and `lineage`, or `generators`) → `plan` (which rows are whose) →
`part` (a rank's rows and their number) → `sharded` (what `fit` or a loop reads, with its `position`).

How Keras reads that: `seams` and `adapters`; `global_batch` weights gradients and metrics by numbers of samples,
`losses` makes the ranks' losses add up, `following` counts steps. The ranks among each other: `together` (one error
for all), `first` (one works, the others wait), `fingerprint` (the same data on all), `caches` (no two ranks write
one file).
"""

from hvdtrain.data.first import first_on_node, first_overall
from hvdtrain.data.sharding import shard

__all__ = ["first_on_node", "first_overall", "shard"]
