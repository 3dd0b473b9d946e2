"""Plain values come back as they were, to the bit, and nothing else is taken."""

import collections
import io
import math
import random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hvdtrain.checkpoints.plain import NotPlainError, digest, is_plain, packed, unpacked

numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
tables = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.int8, np.uint64, np.bool_, np.complex64]),
    arrays.array_shapes(min_dims=0, min_side=0),
)
values = st.recursive(
    numbers | tables,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=8,
)


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return (math.isnan(one) and math.isnan(other)) if one != one else one == other


@given(values)
def test_everything_plain_comes_back(value):
    again = unpacked(packed(value))
    assert same(again, value)
    assert digest(again) == digest(value)


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1),
        np.arange(6).reshape(2, 3).T,
        np.arange(3).astype(ml_dtypes.bfloat16),
        ml_dtypes.bfloat16(2),
        np.array(["a", "ü"]),
        random.getstate(),
        np.random.get_state(),
        {"best": -np.inf, "weights": [np.ones(3), None]},
        {3, 1, "a", (1, 2)},
        frozenset(["a"]),
        2 - 0.5j,
    ],
)
def test_what_callbacks_and_generators_hold(value):
    again = unpacked(packed(value))
    np.testing.assert_equal(again, value)
    assert type(again) is type(value)


def test_a_digest_tells_types_and_signs_apart():
    different = [
        b"0",
        {0},
        frozenset([0]),
        0j,
        {},
        set(),
        0,
        0.0,
        -0.0,
        False,
        "0",
        None,
        [0],
        (0,),
        np.zeros(1),
        np.zeros(1, "float32"),
        np.float64(0),
    ]
    assert len({digest(each) for each in different}) == len(different)


@pytest.mark.parametrize(
    "value", [object(), {object()}, bytearray(b"x"), [lambda: 0], io.StringIO(), np.array([object()])]
)
def test_what_is_not_plain(value):
    assert not is_plain(value)
    with pytest.raises(NotPlainError):
        packed([value])


def test_a_dict_of_a_kind_of_its_own_is_kept_as_a_dict():
    assert unpacked(packed(collections.Counter("aab"))) == {"a": 2, "b": 1}


def test_what_holds_itself_is_not_plain():
    value = []
    value.append(value)
    assert not is_plain(value)
