"""Run the smoke test, `hvdtrain smoke`; its ranks run this file too."""

import os
import socket
import time
import zlib

import numpy as np

from hvdtrain import runtime
from hvdtrain.collectives.engine import Engine
from hvdtrain.launch.run import RunOptions, run
from hvdtrain.launch.start_plan import slots_of_job

SIZES = {"4 KiB": 1 << 10, "1 MiB": 1 << 18, "32 MiB": 1 << 23}  # float32 elements
ROUNDS = 5
STEPS = 10


def smoke(num_proc: int | None = None, hosts: str | None = None) -> int:
    """Start ranks as `hvdtrain run` does; each times and checks three allreduces and trains ten steps.

    Args:
        num_proc: Number of ranks; by default all slots of the scheduler's job, or 2.
        hosts: Hosts and their slots, as for `hvdtrain run`.

    Returns:
        The exit code: 0 if every sum is right and all ranks hold the same weights, else that of the failed rank.
    """
    ranks = num_proc if num_proc is not None else slots_of_job(os.environ) or 2
    return run(RunOptions(ranks, __file__, hosts=hosts))


def main() -> None:
    """Raise an error if a sum or the training is wrong; rank 0 prints a line for each part that passed."""
    import hvdtrain.keras as hvd

    hvd.init()
    engine = runtime.engine()
    for name, elements in SIZES.items():
        seconds = _timed_sum(engine, elements)
        moved = 2 * (engine.size - 1) / engine.size * elements * 4
        figures = f"{seconds * 1e3:.2f} ms, {moved / seconds / 1e9:.2f} GB/s a rank"
        _print_on_rank_0(engine, f"allreduce of {name}: right, {figures}")
    losses = _train(engine)
    figures = f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
    _print_on_rank_0(engine, f"{STEPS} steps of training: the same weights on all ranks, {figures}")
    hosts = sorted(set(engine.allgather_object(socket.gethostname())))
    where = f"{len(hosts)} host{'s' * (len(hosts) > 1)} ({', '.join(hosts[:8])})"
    _print_on_rank_0(engine, f"smoke test passed: {engine.size} ranks on {where}")
    hvd.shutdown()


def _timed_sum(engine: Engine, elements: int) -> float:
    """Return the median time of an allreduce in seconds, on the slowest rank."""
    numbers = np.full(elements, engine.rank + 1, np.float32)
    expected = engine.size * (engine.size + 1) / 2
    times = []
    for _ in range(ROUNDS):
        engine.barrier()
        started = time.perf_counter()
        summed = engine.allreduce(numbers, op="sum")
        times.append(time.perf_counter() - started)
        if not np.all(summed == expected):
            raise RuntimeError(
                f"hvdtrain: on rank {engine.rank} a sum of {elements} numbers over {engine.size} ranks is "
                f"{summed.min()} to {summed.max()}. Expected: {expected}."
            )
    return float(np.median(engine.allreduce(np.array(times), op="max")))


def _train(engine: Engine) -> list[float]:
    """Train a small model on different data on each rank, and return the loss of each step."""
    import keras

    import hvdtrain.keras as hvd

    keras.utils.set_random_seed(engine.rank)
    x = np.random.default_rng(engine.rank).normal(size=(STEPS * 32, 16)).astype("float32")
    y = x.sum(1, keepdims=True)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse")
    losses: list[float] = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"]))
    )
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x, y, batch_size=32, callbacks=[broadcast, record], verbose=0)
    weights = b"".join(var.numpy().tobytes() for var in model.weights)
    checksums = engine.allgather_object(zlib.crc32(weights))
    if len(set(checksums)) > 1:
        raise RuntimeError(
            f"hvdtrain: after {STEPS} steps the weights differ between ranks; checksums: {checksums}."
        )
    return losses


def _print_on_rank_0(engine: Engine, text: str) -> None:
    if engine.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
