"""Tests of the functions on tensors run in the world that launched them."""

import pytest
from modes import MODES


@pytest.fixture(scope="session", autouse=True)
def world():
    import hvdtrain.tensorflow as hvd

    hvd.init()
    return hvd


@pytest.fixture
def halves(world):
    """The process sets of the even and of the odd ranks, this rank's own first; one set where there is one rank."""
    if world.size() == 1:
        yield world.global_process_set, None
        return
    sets = [world.add_process_set(range(start, world.size(), 2)) for start in (0, 1)]
    yield sets if world.rank() % 2 == 0 else sets[::-1]
    for each in sets:
        world.remove_process_set(each)


@pytest.fixture
def overlapping(world):
    """Of two process sets, all ranks but the first and all but the last, those that this rank belongs to."""
    if world.size() == 1:
        yield [world.global_process_set]
        return
    sets = [world.add_process_set(range(start, world.size() - 1 + start)) for start in (0, 1)]
    yield [each for each in sets if each.included()]
    for each in sets:
        world.remove_process_set(each)


@pytest.fixture(params=MODES, ids=list(MODES))
def run(request):
    """Runs a function of tensors eagerly, in a `tf.function`, or in a session of TensorFlow 1."""
    return MODES[request.param]
