"""Train two models at the same time: the even ranks train a small model together, the odd ranks a larger one."""

import digits
import tensorflow as tf

import horovod.tensorflow as hvd

hvd.init(process_sets="dynamic")
if hvd.size() < 2:
    raise SystemExit("This example divides the ranks into two halves. Start it on two ranks or more.")
halves = [hvd.add_process_set(list(range(first, hvd.size(), 2))) for first in range(2)]
half = halves[hvd.rank() % 2]

options = digits.arguments()
tf.keras.utils.set_random_seed(hvd.rank())  # different weights on each rank, until the broadcast
(images, labels), (test_images, test_labels) = digits.load(half.rank(), half.size(), options.samples)
batches = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).batch(32)

filters = 8 if half is halves[0] else 32
model = digits.build(filters)
loss = tf.keras.losses.SparseCategoricalCrossentropy()
optimizer = tf.keras.optimizers.Adam(0.002 * half.size())


@tf.function
def step(images, labels, first):
    with tf.GradientTape() as tape:
        value = loss(labels, model(images, training=True))
    tape = hvd.DistributedGradientTape(tape, process_set=half)
    gradients = tape.gradient(value, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    if first:
        hvd.broadcast_variables(model.variables, root_rank=half.ranks[0], process_set=half)
        hvd.broadcast_variables(optimizer.variables, root_rank=half.ranks[0], process_set=half)


for epoch in range(options.epochs):
    for number, (some_images, some_labels) in enumerate(batches):
        step(some_images, some_labels, epoch == number == 0)

checksums = hvd.allgather(digits.checksum(model), process_set=half)
result = digits.closing_line(digits.accuracy(model, test_images, test_labels), checksums)
lines = hvd.allgather_object(f"{filters} filters on ranks {half.ranks} | {result}")
if hvd.rank() == 0:
    print("\n".join(lines[:2]))
