"""Operands of a contraction copied to where matrix units read them as they are: padded, reordered, in parts."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import OPTIONS

BLOCK_CHANNELS, BLOCK_PLACES = 32, 64  # of a program
ALIGNED = 16  # elements: rows start where whole vectors are read


@triton.jit
def pack_kernel(
    x_ptr,  # [N, C, X0, X1, X2]
    out_ptr,  # [parts, N, C, P] by its strides; the P places are [P0, P1, P2], x with zeros around
    C,
    X0,
    X1,
    X2,
    P0,
    P1,
    P2,
    pad0,
    pad1,
    pad2,
    x_stride_n,
    x_stride_c,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    out_stride_part,
    out_stride_n,
    out_stride_c,
    out_stride_p,
    SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Copy; if SPLIT, float32 as a sum of two tf32 values.

    ``x = high + low`` up to ``2^-22 |x|``: ``high`` is ``x`` rounded to tf32's 11 bits, ``low`` what is left, rounded
    so too. Values that are not finite stay so.
    """
    places = P0 * P1 * P2
    blocks_p, blocks_c = tl.cdiv(places, BLOCK_P), tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // (blocks_p * blocks_c)).to(tl.int64)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x0, x1, x2 = p // (P1 * P2) - pad0, p // P2 % P1 - pad1, p % P2 - pad2
    inside = (x0 >= 0) & (x0 < X0) & (x1 >= 0) & (x1 < X1) & (x2 >= 0) & (x2 < X2)
    at = n * x_stride_n + x0.to(tl.int64) * x_stride_0 + x1.to(tl.int64) * x_stride_1 + x2.to(tl.int64) * x_stride_2
    c_in = (c < C)[:, None]
    x = tl.load(x_ptr + c.to(tl.int64)[:, None] * x_stride_c + at[None, :], mask=c_in & inside[None, :], other=0.0)
    out = out_ptr + n * out_stride_n + c.to(tl.int64)[:, None] * out_stride_c + p.to(tl.int64)[None, :] * out_stride_p
    out_in = c_in & (p < places)[None, :]
    if SPLIT:
        high = _tf32(x)
        tl.store(out, high, mask=out_in)
        tl.store(out + out_stride_part, _tf32(x - high), mask=out_in)
    else:
        tl.store(out, x, mask=out_in)


@triton.jit
def _tf32(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


def packed(
    x: Tensor,  # [N, C, X0, X1, X2]
    padding: Sequence[int],
    split: bool,
) -> Tensor:  # [parts, N, C, P0, P1, P2], a view
    """``x`` padded with zeros: in one part with channels innermost, or ``split`` into two with places innermost."""
    samples, channels, *sizes = x.shape
    padded = [size + 2 * pad for size, pad in zip(sizes, padding, strict=True)]
    places = padded[0] * padded[1] * padded[2]
    if split:
        length = triton.cdiv(places, ALIGNED) * ALIGNED
        out = x.new_empty(2, samples, channels, length)[..., :places]
    else:
        length = triton.cdiv(channels, ALIGNED) * ALIGNED
        out = x.new_empty(1, samples, places, length)[..., :channels].transpose(2, 3)
    if x.numel():
        grid = (samples * triton.cdiv(places, BLOCK_PLACES) * triton.cdiv(channels, BLOCK_CHANNELS),)
        pack_kernel[grid](
            x, out, channels, *sizes, *padded, *padding, *x.stride(), *out.stride(),
            SPLIT=split, BLOCK_C=BLOCK_CHANNELS, BLOCK_P=BLOCK_PLACES, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out.unflatten(3, padded)


def packed_bytes(x: Tensor, padding: Sequence[int], split: bool) -> int:  # [N, C, X0, X1, X2]
    """About how much memory a sample's copy takes."""
    places = 1
    for size, pad in zip(x.shape[2:], padding, strict=True):
        places *= size + 2 * pad
    return (2 if split else 1) * x.shape[1] * places * x.element_size()
