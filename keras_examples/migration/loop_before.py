"""Train with your own loop: a distributed tape, and a broadcast of the variables after the first batch."""

import digits
import tensorflow as tf

import horovod.tensorflow as hvd

hvd.init()
options = digits.arguments()
tf.keras.utils.set_random_seed(hvd.rank())  # different weights on each rank, until the broadcast
(images, labels), (test_images, test_labels) = digits.load(hvd.rank(), hvd.size(), options.samples)
batches = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).batch(32)

model = digits.build()
loss = tf.keras.losses.SparseCategoricalCrossentropy()
optimizer = tf.keras.optimizers.Adam(0.002 * hvd.size())


@tf.function
def step(images, labels, first):
    with tf.GradientTape() as tape:
        value = loss(labels, model(images, training=True))
    tape = hvd.DistributedGradientTape(tape)
    gradients = tape.gradient(value, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    if first:
        hvd.broadcast_variables(model.variables, root_rank=0)
        hvd.broadcast_variables(optimizer.variables, root_rank=0)
    return value


for epoch in range(options.epochs):
    for number, (some_images, some_labels) in enumerate(batches):
        value = step(some_images, some_labels, epoch == number == 0)
    mean = hvd.allreduce(value, op=hvd.Average)
    if hvd.rank() == 0:
        print(f"epoch {epoch + 1}: loss {float(mean):.3f}")

checksums = hvd.allgather(digits.checksum(model))
if hvd.rank() == 0:
    print(digits.closing_line(digits.accuracy(model, test_images, test_labels), checksums))
