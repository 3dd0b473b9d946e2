"""Decide which rank reads which samples, and where a resumed run continues.

From the user's data to a batch: `shard` (the arguments of `hvd.shard`) → a source (`arrays`, `pydataset`,
`datasets` with `pipelines` and `dataset_graph`, or `generators`) → `sample_plan` (which rank has which rows) →
`local_batch` (a rank's rows and their number) → `sharded_dataset` (data for `fit` or a loop, with its `position`).

For Keras: `adapters` reads sharded data, `global_batch` weights gradients and metrics by numbers of samples,
`losses` makes the ranks' losses add up, `callback_order` counts steps. Between ranks: `collective_errors` (an error
on one rank is raised on all), `local_first` (one rank works while the others wait), `fingerprint` (detects the same
data on all ranks), `caches` (no two ranks write the same file).
"""

from hvdtrain.data.local_first import first_on_node, first_overall
from hvdtrain.data.shard import shard

__all__ = ["first_on_node", "first_overall", "shard"]
