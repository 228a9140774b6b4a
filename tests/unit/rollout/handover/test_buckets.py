"""Buckets of a weight stream."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tip.rollout.handover.buckets import weight_buckets

new_buffer = partial(torch.empty, dtype=torch.uint8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def unpacked(bucket):
    """What a receiver makes of a bucket: tensors one after another, without gaps."""
    tensors, start = {}, 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        kind = DTYPES[dtype]
        size = torch.Size(shape).numel() * kind.itemsize
        tensors[name] = bucket.data[start : start + size].view(kind).reshape(shape).clone()
        start += size
    assert start == bucket.data.numel()
    return tensors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from(sorted(DTYPES))), max_size=12),
    st.integers(1, 400),
)
def test_every_tensor_arrives_once_in_order_in_buckets_within_the_bound(sizes, bucket_bytes):
    generator = torch.Generator().manual_seed(0)
    weights = [
        (f"weight_{place}", torch.randn(rows, columns, generator=generator).to(DTYPES[dtype]))
        for place, (rows, columns, dtype) in enumerate(sizes)
    ]
    names, received = [], {}
    for bucket in weight_buckets(iter(weights), bucket_bytes, new_buffer):
        assert bucket.data.numel() <= bucket_bytes or len(bucket.names) == 1
        names += bucket.names
        received |= unpacked(bucket)
    assert names == [name for name, _ in weights]
    for name, tensor in weights:
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_a_bucket_is_a_copy_that_is_not_the_models_memory():
    weight = torch.zeros(4)
    (bucket,) = weight_buckets(iter([("a", weight)]), 100, new_buffer)
    bucket.data.fill_(255)
    assert torch.equal(weight, torch.zeros(4))


def test_a_transposed_tensor_arrives_in_its_own_order():
    weight = torch.arange(6.0).reshape(2, 3).t()
    (bucket,) = weight_buckets(iter([("a", weight)]), 100, new_buffer)
    assert torch.equal(unpacked(bucket)["a"], weight)


def test_a_wider_type_begins_at_a_multiple_of_its_size():
    weights = [("narrow", torch.ones(3, dtype=torch.bfloat16)), ("wide", torch.ones(2))]
    buckets = list(weight_buckets(iter(weights), 100, new_buffer))
    assert [bucket.names for bucket in buckets] == [["narrow"], ["wide"]]


@pytest.mark.parametrize("reuse", [True, False])
def test_a_buffer_is_reused_only_where_nobody_may_still_read_it(reuse):
    weights = [(f"weight_{place}", torch.full((8,), float(place))) for place in range(3)]
    first, second, third = weight_buckets(iter(weights), 32, new_buffer, reuse=reuse)
    assert (first.data.data_ptr() == second.data.data_ptr() == third.data.data_ptr()) == reuse
