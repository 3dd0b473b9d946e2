"""Check that the kind of a loss added by a layer is found from its values for parts of the rows."""

import numpy as np
import pytest

from hvdtrain.wrap.layers import Kind, kind_of

ROWS = (2, 3)
DRAWS = [np.random.default_rng(seed).normal(size=(5, 4)) for seed in range(4)]
KINDS = {
    "mean": (np.mean, Kind.MEAN),
    "sum": (np.sum, Kind.SUM),
    "constant": (lambda rows: 3.0, Kind.MEAN),
    "row by row": (lambda rows: rows.sum(1), Kind.ROWS),
    "every number": (lambda rows: rows**2, Kind.ROWS),
    "mean of each feature": (lambda rows: rows.mean(0), Kind.MEAN),
    "sum of each feature": (lambda rows: rows.sum(0), Kind.SUM),
    "flat": (np.ravel, None),
    "row less the mean": (lambda rows: rows - rows.mean(0), None),
    "largest": (np.max, None),
    "sum and constant": (lambda rows: rows.sum() + 1, None),
    "zero": (lambda rows: 0.0, None),
    "not a number": (lambda rows: np.nan, None),
    "mean where it is a number": (lambda rows: np.mean(rows) if rows.sum() > 0 else np.inf, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    loss, expected = KINDS[name]
    observed = [[np.array(loss(rows)) for rows in (draw, *np.split(draw, ROWS[:1]))] for draw in DRAWS]
    assert kind_of(observed, ROWS, 1e-6) is expected


def test_one_finite_draw_decides():
    silent = [np.array(np.nan)] * 3
    zero = [np.array(0.0)] * 3
    total = [np.array(5.0), np.array(2.0), np.array(3.0)]
    assert kind_of([silent, zero, total], ROWS, 1e-6) is Kind.SUM
    assert kind_of([silent, zero], ROWS, 1e-6) is None
