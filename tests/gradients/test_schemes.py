"""Schemes of one's own: they compose, keep their state over the steps, and are compared over the ranks."""

from dataclasses import dataclass, field

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.keras as hvd
from hvdtrain.collectives.engine import MismatchError, Op
from hvdtrain.gradients.compression import ErrorFeedback
from hvdtrain.gradients.schemes import Plain, Scheme

pytestmark = pytest.mark.ranks


@dataclass(frozen=True)
class Largest(Scheme):
    """Sends the largest part of a gradient: values and indices, which are gathered and added up."""

    ratio: float
    seen: list = field(default_factory=list, compare=False, repr=False)

    def reduce(self, group, engine, state):
        self.seen.append(list(group.keys))
        if group.call:
            engine.agree(group.call)
        results = []
        for array in group.arrays:
            chosen = largest(array, self.ratio)
            values, indices = engine.allgather(array.reshape(-1)[chosen]), engine.allgather(chosen)
            total = np.zeros(array.size, array.dtype)
            np.add.at(total, indices, values / engine.size if group.op is Op.AVERAGE else values)
            results.append(total.reshape(array.shape))
        return group.with_arrays(results, [without_largest(array, self.ratio) for array in group.arrays])


def largest(array, ratio):
    return np.sort(np.argsort(-np.abs(array.reshape(-1)), kind="stable")[: max(1, int(ratio * array.size))])


def without_largest(array, ratio):
    rest = array.copy()
    rest.reshape(-1)[largest(array, ratio)] = 0
    return rest


def gradient(rank, step, shape):
    return np.random.default_rng([rank, step, *shape]).standard_normal(shape)


def expected(shape, steps, ratio):
    """The updates of all steps, computed by one process."""
    errors = [np.zeros(shape) for _ in range(hvd.size())]
    for step in range(steps):
        total = np.zeros(shape)
        for rank in range(hvd.size()):
            corrected = gradient(rank, step, shape) + errors[rank]
            errors[rank] = without_largest(corrected, ratio)
            total += (corrected - errors[rank]) / hvd.size()
        yield total


SMALL, LARGE = (3, 4), (300, 500)  # the large one is reduced in TensorFlow's memory


each_way = pytest.mark.parametrize("way", ["eager", "graph", "during backprop"], indirect=True)


def updates(way, compression, shapes, steps):
    """Apply gradients with a learning rate of 1 to variables of zeros; yield the update of each step."""
    variables = [keras.Variable(np.zeros(shape), dtype="float64", name=f"w{len(shape)}") for shape in shapes]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
    optimizer.build(variables)

    def apply(*gradients):
        optimizer.apply([2.0 * half for half in gradients])

    run = apply if way == "eager" else tf.function(apply)
    before = [np.zeros(shape) for shape in shapes]
    for step in range(steps):
        run(*[tf.constant(gradient(hvd.rank(), step, shape) / 2) for shape in shapes])
        after = [np.asarray(variable) for variable in variables]
        yield [old - new for old, new in zip(before, after, strict=True)]
        before = after


@each_way
def test_a_scheme_of_ones_own_with_error_feedback(way):
    if hvd.size() == 1:
        pytest.skip("one rank has nothing to send")
    scheme = Largest(0.1)
    wanted = zip(expected(SMALL, 4, 0.1), expected(LARGE, 4, 0.1), strict=True)
    for received, right in zip(updates(way, ErrorFeedback(scheme), [SMALL, LARGE], 4), wanted, strict=True):
        for update, total in zip(received, right, strict=True):
            np.testing.assert_allclose(update, total, rtol=0, atol=1e-9)
        assert len(set(hvd.allgather_object(b"".join(update.tobytes() for update in received)))) == 1
    keys = sorted(key for group in scheme.seen for key in group)
    assert keys == sorted(4 * ["0/w2", "1/w2"])


@each_way
def test_a_plain_scheme_is_what_no_compression_is(way):
    plain = list(updates(way, Plain(), [SMALL, LARGE], 2))
    none = list(updates(way, hvd.Compression.none, [SMALL, LARGE], 2))
    for one, other in zip(plain, none, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@each_way
def test_ranks_with_different_schemes_are_told(way):
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    scheme = Largest(0.1 if hvd.rank() else 0.2)
    with pytest.raises((MismatchError, tf.errors.InvalidArgumentError)) as error:
        list(updates(way, scheme, [SMALL], 1))
    assert "rank 0: w2: float64[3, 4], Largest(ratio=0.2)" in str(error.value)
    assert "Largest(ratio=0.1)" in str(error.value)


def test_adasum_takes_no_scheme():
    with pytest.raises(ValueError, match=r"takes no scheme\. Received: Largest\(ratio=0.1\)"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=Largest(0.1), op=hvd.Adasum)
