"""What the verification says of gradients: what was compared, and that nothing was where nothing could be."""

import numpy as np
import pytest

from hvdtrain.gradients.projections import Proof, precision, projected, smallest


def proof(*gradients, off=0.0):
    """Two ranks with the same gradients, of which `off` times the magnitude too much is applied."""
    gradients = [np.asarray(each) for each in gradients]
    expected, scale = np.array([projected(each.astype("float64")) for each in gradients]).T
    have = np.array([projected(each)[0] for each in gradients]) + (off * scale if off else 0)
    eps = np.array([precision(each.dtype) for each in gradients])
    floor = np.array([each.size * smallest(each.dtype) for each in gradients])
    return Proof(expected, have, scale, eps, floor, tuple(each.dtype.name for each in gradients), 2)


def test_ordinary_gradients():
    said = proof(np.ones(4, "float32"), np.ones(2, "float32"), off=1e-7).sentence("average")
    assert said == ", and what is applied is the average of all ranks' gradients (relative deviation 1e-07)."


@pytest.mark.parametrize(
    "gradient, words",
    [
        (np.zeros(4, "float32"), "are zero"),
        (np.full(4, 1e-42, "float32"), "are too small for float32"),
        (np.full(4, 1e-7, "float16"), "are too small for float16"),
        (np.full(4, np.inf, "float32"), "are not finite"),
    ],
)
def test_gradients_that_prove_nothing(gradient, words):
    nothing = proof(gradient, gradient)
    assert not nothing.compared.any() and not len(nothing.wrong())
    said = nothing.sentence("average")
    assert f"The gradients {words}, so nothing is proved of their average yet" in said
    assert "deviation" not in said


def test_of_some_gradients_nothing_is_proved():
    some = proof(np.ones(4, "float32"), np.zeros(4, "float32"), np.full(4, 1e-42, "float32"))
    assert some.compared.tolist() == [True, False, False]
    said = some.sentence("average")
    assert (
        "(relative deviation 0). The gradients of 2 more are zero (1), are too small for float32 (1)." in said
    )


def test_compressed_gradients_are_measured_by_what_their_dtype_can_tell():
    said = proof(np.full(100, 0.1, "float16"), off=3e-4).sentence("average")
    assert (
        "all ranks' gradients, sent as float16 (relative deviation 0.0003, of which rounding to float16"
        in said
    )


@pytest.mark.parametrize("dtype, off", [("float32", 1e-3), ("float16", 0.05), ("float32", float("nan"))])
def test_what_is_wrong_is_found(dtype, off):
    assert proof(np.ones(4, dtype), np.ones(4, dtype), off=off).wrong().tolist() == [0, 1]
