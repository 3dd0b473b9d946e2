"""Small arrays in shared buffers: none lost, none overwritten, none kept for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.collectives import fusion

arrays = st.lists(
    st.tuples(st.integers(0, 200_000), st.sampled_from(["float32", "float64", "float16", "int8"])),
    max_size=20,
).map(lambda members: [(np.arange(size) % 97).astype(dtype) for size, dtype in members])


@given(arrays)
def test_every_array_is_in_one_bucket_of_its_dtype(members):
    buckets = fusion.plan(members)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(members)))
    for bucket in buckets:
        assert len({members[index].dtype for index in bucket}) == 1
        assert len(bucket) == 1 or sum(members[index].nbytes for index in bucket) <= fusion.BUCKET_BYTES


def test_many_small_arrays_fill_several_buckets():
    members = [np.zeros(60_000, np.float32)] * 100
    assert [len(bucket) for bucket in fusion.plan(members)] == [69, 31]


def test_large_arrays_are_not_copied_into_a_bucket():
    assert fusion.plan([np.zeros(3), np.zeros(1 << 20), np.zeros(4)]) == [[0, 2], [1]]


@given(arrays.filter(bool))
def test_packing_keeps_every_value_where_tensorflow_need_not_copy(members):
    same = [each for each in members if each.dtype == members[0].dtype]
    buffer, slots = fusion.pack(same)
    for array, slot in zip(same, slots, strict=True):
        np.testing.assert_array_equal(array, slot)
        assert slot.ctypes.data % fusion.ALIGNMENT == 0 or not slot.size
    assert np.isfinite(buffer.astype(np.float64)).all()


def test_a_buffer_in_use_is_never_given_out_again():
    pool = fusion._Pool()
    first = pool.take(1000)
    first[:] = 7
    view = first[10:20].view(np.uint8)
    del first
    second = pool.take(1000)
    second[:] = 9
    assert (view == 7).all()
    del view
    third = pool.take(1000)
    assert not np.shares_memory(second, third)
    assert len(pool._owners[1000]) == 2


def test_sizes_out_of_use_are_forgotten():
    pool = fusion._Pool()
    for size in range(3 * fusion._REQUESTS_KEPT):
        pool.take(size)
    assert len(pool._owners) <= 2 * fusion._REQUESTS_KEPT
