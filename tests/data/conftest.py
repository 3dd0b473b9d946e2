"""Tests of sharded data run in the world that launched them."""

import pytest


@pytest.fixture(autouse=True)
def world(engine):
    return engine


@pytest.fixture
def several(engine):
    """For what needs more than one rank."""
    if engine.size == 1:
        pytest.skip("a world of one agrees with itself")
