"""How the cores of a host are divided."""

import pytest

from hvdtrain.cores import allowed, granted, quota, share


@pytest.mark.parametrize(
    "mine, neighbours, container, threads",
    [
        ({0, 1}, [{0, 1}], None, 2),
        ({0, 1}, [{0, 1}] * 2, None, 1),
        ({0, 1}, [{0, 1}] * 4, None, 1),
        ({0}, [{0}, {1}], None, 1),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}, {4, 5, 6, 7}], None, 4),
        (set(range(16)), [set(range(16))] * 3, None, 5),
        (set(range(64)), [set(range(64))] * 4, 8.0, 2),
        (set(range(64)), [set(range(64))], 0.5, 1),
        ({0, 1, 2}, [{0, 1, 2}, {2}], None, 2),
    ],
)
def test_ranks_share_what_they_have_in_common(mine, neighbours, container, threads):
    assert share(frozenset(mine), neighbours, container) == threads


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_container_limits(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


def test_this_process_may_run_somewhere():
    assert allowed()


@pytest.mark.parametrize("text, cores", [("4", 4), ("", None), ("0", None), ("many", None)])
def test_slurms_cores_a_task(text, cores):
    assert granted({"SLURM_CPUS_PER_TASK": text}) == cores


def test_without_slurm_nothing_is_granted():
    assert granted({}) is None
