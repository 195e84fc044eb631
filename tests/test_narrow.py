"""Narrow storage: what the formats keep of the values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limpet import ops
from limpet.reference import NARROW_BLOCK

SIZES = [0, 1, 15, 16, 17, NARROW_BLOCK - 1, NARROW_BLOCK, NARROW_BLOCK + 1, 3 * NARROW_BLOCK + 5]
# Relative error within so many octaves of the block's largest value (pack_importance).
LOG8_ERRORS = {1: 0.022, 4: 0.045, 16: 0.085, 31: 0.125}


def kept_importance(values):
    return ops.unpack_importance(ops.pack_importance(values), values.shape)


def kept_anchor(values, format="fixed16"):
    return ops.unpack_anchor(ops.pack_anchor(values, format), values.shape)


def blocks(values):
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % NARROW_BLOCK)).view(-1, NARROW_BLOCK)


@pytest.mark.parametrize("numel", SIZES)
def test_bytes_an_element(numel):
    values, count = torch.rand(numel), math.ceil(numel / NARROW_BLOCK)
    assert 0 <= ops.pack_importance(values).numel() - (numel + 2 * count) <= 15
    fixed16, split24 = ops.pack_anchor(values), ops.pack_anchor(values, "split24")
    assert 0 <= 2 * fixed16.numel() - (2 * numel + 2 * count) <= 15
    assert 0 <= split24.numel() - 3 * numel <= 15


def test_importance_and_anchor_take_little_more_than_three_bytes():
    values = torch.rand(1_000_000)
    bytes_held = sum(t.numel() * t.element_size() for t in (ops.pack_importance(values), ops.pack_anchor(values)))
    assert bytes_held <= 3.004 * values.numel()


@given(
    numel=st.sampled_from(SIZES),
    top=st.floats(2.0**-80, 2.0**100, width=32),
    octaves=st.floats(0.1, 60),
    seed=st.integers(0, 2**31),
)
def test_importances_over_many_decades(numel, top, octaves, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(-octaves * torch.rand(numel, generator=generator, dtype=torch.float64))
    values = (top * spread).float() * (torch.rand(numel, generator=generator) > 0.1)
    got, want = blocks(kept_importance(values)).double(), blocks(values).double()
    largest = want.amax(dim=1, keepdim=True)
    assert (got <= largest).all()
    assert (got[want == 0] == 0).all()
    depth = torch.log2(largest / want)
    error = ((got - want).abs() / want).nan_to_num()
    for within, bound in LOG8_ERRORS.items():
        assert (error[depth <= within] <= bound).all()
    assert (got[(depth > 33) & (want > 0)] == 0).all()


@given(st.lists(st.floats(0, 2.0**126, width=32), min_size=1, max_size=40))
def test_any_importances(values):
    values = torch.tensor(values)
    got = kept_importance(values)
    assert got.isfinite().all()
    assert (got <= values.max()).all()
    assert (got[values == 0] == 0).all()
    assert torch.equal(got[values.argsort()].sort().values, got[values.argsort()])  # the order stays
    assert torch.equal(kept_importance(got), got)
    top = values.max()
    if top >= 2.0**-90:
        assert abs(got.max() - top) <= 0.008 * top


def test_denormal_importances():
    values = torch.tensor([1e-38, 3e-39, 1e-42, 0.0])
    got = kept_importance(values)
    assert (got[:2] - values[:2]).abs().max() <= 2e-40
    assert got[3] == 0
    assert kept_importance(torch.tensor([1e-44])).item() == 0


def test_rounding_at_random_is_right_on_average():
    values = torch.cat([torch.ones(1), torch.full((1023,), 0.0123)]).repeat(200)
    packed = ops.pack_importance(values, generator=torch.Generator().manual_seed(1))
    got = ops.unpack_importance(packed, values.shape)[values < 1]
    neighbours = got.unique()
    assert len(neighbours) == 2
    assert neighbours[0] < 0.0123 < neighbours[1]
    assert abs(got.double().mean() - 0.0123) < 5 * got.double().std() / len(got) ** 0.5
    again = ops.pack_importance(values, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, packed)


def test_rounding_at_random_keeps_the_sum_of_many_tasks():
    generator = torch.Generator().manual_seed(2)
    task, kept = torch.exp2(-8 * torch.rand(20_000)), {None: torch.zeros(20_000), generator: torch.zeros(20_000)}
    for _ in range(60):
        for rounding in kept:
            packed = ops.pack_importance(kept[rounding] + task, generator=rounding)
            kept[rounding] = ops.unpack_importance(packed, task.shape)
    assert abs(kept[generator].sum() / (60 * task.sum()) - 1) < 0.01
    assert kept[None].sum() < 0.95 * 60 * task.sum()  # why the generator is there


def test_a_negative_zero_is_zero():
    assert torch.equal(kept_importance(torch.tensor([-0.0, 1.0])).signbit(), torch.tensor([False, False]))


@given(numel=st.sampled_from(SIZES[1:]), scale=st.floats(2.0**-100, 2.0**100), seed=st.integers(0, 2**31))
def test_anchors(numel, scale, seed):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale
    error = (blocks(kept_anchor(values)) - blocks(values)).double().abs()
    assert (error <= 1.54e-5 * blocks(values).abs().amax(dim=1, keepdim=True)).all()
    split = kept_anchor(values, "split24")
    assert ((split - values).double().abs() <= 2.0**-16 * values.abs()).all()
    assert torch.equal(kept_anchor(split, "split24"), split)


def test_split24_rounds_to_even():
    one = 0x3F800000
    bits = torch.tensor([one + 0x80, one + 0x180, one + 0x7F, one + 0x81, one + 0x7FFF80], dtype=torch.int32)
    got = kept_anchor(-bits.view(torch.float32), "split24").neg().view(torch.int32)
    assert (got - one).tolist() == [0, 0x200, 0, 0x100, 0x800000]


def test_an_anchor_of_zeros_beside_a_tiny_one():
    values = torch.zeros(2 * NARROW_BLOCK)
    values[-1] = 1e-42
    assert (kept_anchor(values) - values).abs().max() <= 1e-42
    assert torch.equal(kept_anchor(values[:NARROW_BLOCK]), values[:NARROW_BLOCK])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_layout(dtype):
    values = torch.rand(6, 4, 8, 8).to(dtype)
    strided = values.to(memory_format=torch.channels_last)
    assert torch.equal(ops.pack_importance(strided), ops.pack_importance(values.float()))
    for format in ("fixed16", "split24"):
        assert torch.equal(ops.pack_anchor(strided, format), ops.pack_anchor(values.float(), format))


def test_a_packed_tensor_at_an_odd_address():
    values = torch.rand(33)
    packed = ops.pack_importance(values)
    assert torch.equal(ops.unpack_importance(torch.cat([packed[:1], packed])[1:], [33]), kept_importance(values))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_importance([1.0]), TypeError, "importance must be a torch.Tensor, got list"),
        (lambda: ops.pack_importance(torch.ones(2, dtype=torch.float64)), TypeError, "importance must be a float32, b"),
        (lambda: ops.pack_importance(torch.tensor([1.0, -2.0])), ValueError, "got values from -2 to 1"),
        (lambda: ops.pack_importance(torch.tensor([1.0, math.nan])), ValueError, "importance must be finite and at"),
        (lambda: ops.pack_importance(torch.tensor([1.0, math.inf])), ValueError, "got values from 1 to inf"),
        (lambda: ops.pack_anchor(torch.tensor([1.0, -math.inf])), ValueError, "anchor must be finite, got values fr"),
        (lambda: ops.pack_anchor(torch.ones(2, dtype=torch.int32)), TypeError, "anchor must be a float32"),
        (lambda: ops.pack_anchor(torch.ones(2), "int8"), ValueError, "format must be one of 'fixed16', 'split24'"),
        (lambda: ops.unpack_importance(torch.ones(18), [2]), TypeError, "packed must be a torch.uint8 tensor"),
        (lambda: ops.unpack_anchor(torch.ones(18), [2]), TypeError, "packed must be a torch.int16 or torch.uint8"),
        (
            lambda: ops.unpack_importance(ops.pack_importance(torch.ones(2)), [17]),
            ValueError,
            r"packed must be of shape \[34\] to hold \[17\] as log8, got a torch.uint8 tensor of shape \[18\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
