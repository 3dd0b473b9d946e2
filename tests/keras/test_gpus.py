"""Which GPU a rank takes. No GPU is needed: these are the decisions, not the device."""

import pytest

from hvdtrain.keras.world import choose_gpu, gpu_identity, ranks_sharing


@pytest.mark.parametrize("count, local_rank, choice", [(0, 0, None), (4, 2, 2), (1, 3, 0), (2, 3, 1)])
def test_by_local_rank(count, local_rank, choice):
    assert choose_gpu(count, local_rank) == choice


def identity(count, local_rank, visible):
    return gpu_identity(choose_gpu(count, local_rank), visible)


def test_four_ranks_with_four_visible_gpus_share_none():
    assert not ranks_sharing([("a", identity(4, rank, "0,1,2,3")) for rank in range(4)])


def test_slurm_gives_each_rank_its_own_gpu():
    assert not ranks_sharing([("a", identity(1, rank, str(rank))) for rank in range(4)])


def test_the_same_number_on_two_hosts_is_not_the_same_gpu():
    assert not ranks_sharing([("a", identity(1, 0, None)), ("b", identity(1, 0, None))])


def test_more_ranks_than_gpus_are_named():
    assert ranks_sharing([("a", identity(2, rank, None)) for rank in range(3)]) == [0, 2]


def test_every_rank_pinned_to_the_same_gpu_by_hand():
    assert ranks_sharing([("a", identity(1, rank, "GPU-5d4c")) for rank in range(2)]) == [0, 1]


def test_without_gpus_nobody_shares():
    assert not ranks_sharing([("a", None), ("a", None)])
