"""Train with model.fit on all ranks: a distributed optimizer, and callbacks for broadcast, metrics and warm-up."""

import digits
import tensorflow as tf

import horovod.tensorflow.keras as hvd

hvd.init()
options = digits.arguments()
tf.keras.utils.set_random_seed(
    hvd.rank()
)  # different weights on each rank, until the first callback broadcasts
(images, labels), (test_images, test_labels) = digits.load(hvd.rank(), hvd.size(), options.samples)

rate = 0.002 * hvd.size()
model = digits.build()
model.compile(
    optimizer=hvd.DistributedOptimizer(tf.keras.optimizers.Adam(rate)),
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(
    images,
    labels,
    batch_size=32,
    epochs=options.epochs,
    callbacks=[
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=rate, warmup_epochs=2),
    ],
    verbose=2 if hvd.rank() == 0 else 0,
)

checksums = hvd.allgather(digits.checksum(model))
if hvd.rank() == 0:
    print(digits.closing_line(digits.accuracy(model, test_images, test_labels), checksums))
