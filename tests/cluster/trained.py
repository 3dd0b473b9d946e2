"""A training with checkpoints, which takes minutes unless it goes on from one.

trained.py EPOCHS DIRECTORY
"""

import sys
import time
from pathlib import Path

import keras
import numpy as np

import hvdtrain.keras as hvd

hvd.init()
keras.utils.set_random_seed(1)
x = np.random.default_rng(0).standard_normal((512, 8)).astype("float32")
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(1e-3)), "mse")
pause = 0 if list(Path(sys.argv[2]).glob("step-*")) else 1
slowly = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(pause))
model.fit(
    hvd.shard((x, x[:, :1]), 64),
    epochs=int(sys.argv[1]),
    verbose=0,
    callbacks=[hvd.callbacks.Checkpoint(sys.argv[2], every_steps=4), slowly],
)
if hvd.rank() == 0:
    print(f"trained for {int(model.optimizer.iterations.numpy())} steps")
