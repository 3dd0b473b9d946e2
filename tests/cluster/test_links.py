"""Links between hosts: how fast they are is found out, and what is slow is used while backprop goes on."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAINING = """
import keras, numpy as np, threading, zlib
import hvdtrain.keras as hvd
hvd.init()
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.layers.Input((1000,)), *(keras.layers.Dense(1000) for _ in range(3))])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
data = np.random.default_rng(hvd.rank()).standard_normal((16, 1000)).astype("float32")
model.fit(data, data, batch_size=8, epochs=2, verbose=0)
weights = b"".join(each.numpy().tobytes() for each in model.trainable_variables)
print("CRC", zlib.crc32(weights), any(each.name == "hvdtrain-background" for each in threading.enumerate()))
"""


@pytest.fixture
def narrow(cluster):
    """Links of 1 Gbit/s; without a limit they are as fast as memory."""
    cluster.narrow("1gbit")
    yield
    cluster.widen()


@pytest.mark.parametrize(("hosts", "each"), [(2, 1), (2, 2), (4, 1)])
def test_on_a_slow_link_gradients_travel_beside_backprop(cluster, workplace, narrow, hosts, each):
    (workplace / "train.py").write_text(TRAINING)
    crc = {}
    for overlap in ("auto", "off"):
        job = cluster.submit(
            ROOT / "slurm/cpu.sbatch",
            "train.py",
            options=[f"--nodes={hosts}", f"--ntasks-per-node={each}", f"--cpus-per-task={2 // each}"],
            HVDTRAIN_ENGINE="mpi",
            HVDTRAIN_OVERLAP=overlap,
        )
        assert job.ended() == "COMPLETED", job.output
        lines = [line.partition("CRC ")[2].split() for line in job.output.splitlines() if "CRC " in line]
        assert len(lines) == hosts * each, job.output
        assert {beside for _, beside in lines} == {str(overlap == "auto")}, job.output
        assert len({number for number, _ in lines}) == 1  # all ranks hold the same weights
        crc[overlap] = lines[0][0]
    assert hosts * each > 2 or len(set(crc.values())) == 1  # two numbers have one sum, more have several


def test_bench_finds_the_ranks_of_a_job(cluster, workplace, narrow):
    (workplace / "bench.sbatch").write_text(
        "#!/bin/bash\n"
        "hvdtrain bench allreduce --sizes 1M --rounds 1 --no-peers --engines mpi --save sums >/dev/null\n"
    )
    job = cluster.submit("bench.sbatch", options=["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"])
    assert job.ended() == "COMPLETED", job.output
    report = json.loads((workplace / "sums.json").read_text())
    assert report["machine"]["hosts"] == ["node1", "node2"] and report["ranks"] == 2
    rows = {row["contender"]: row for row in report["rows"]}
    assert all(row["right"] for row in rows.values())
    # 1 Gbit/s is 0.125 GB/s, and nobody can be faster; but a bucket of 256 KB goes at once.
    assert rows["link between hosts"]["values"]["bus_gb_s"]["median"] < 0.2
