"""Decide which rank reads which samples, and where a resumed run continues.

From the user's data to a batch: `shard` (the arguments of `hvd.shard`) → `sources` (samples of arrays and
PyDatasets) or `pipelines` (a `tf.data.Dataset`, inspected by `dataset_graph`) → `sample_plan` (which rank has which
rows, and the position in an epoch) → `sharded_dataset` or `datasets` (data for `fit` or a loop).

For Keras: `adapters` reads sharded data and counts steps, `global_batch` weights gradients and metrics by numbers
of samples, `losses` makes the ranks' losses add up. Between ranks: `collective_errors` (an error on one rank is
raised on all), `fingerprint` (detects the same data on all ranks).
"""

from hvdtrain.data.collective_errors import first_on_node, first_overall
from hvdtrain.data.shard import shard

__all__ = ["first_on_node", "first_overall", "shard"]
