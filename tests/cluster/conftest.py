import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, lacking

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Slurm of four hosts, on which this checkout and this Python can be used as on a login host."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, hosts=4, shared=[ROOT, Path(sys.prefix), *_needed()]) as found:
        yield found


@pytest.fixture
def workplace(cluster, tmp_path_factory, monkeypatch):
    """A folder that all hosts share, from which jobs are submitted."""
    place = cluster.folder / "jobs" / f"of-{len(list((cluster.folder / 'jobs').iterdir()))}"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def _needed():
    """Finds where the Python beneath a virtual environment is, should that be under /tmp."""
    return [Path(sys.base_prefix)] if shutil.which("python3") else []
