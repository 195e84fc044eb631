"""Operands of a contraction copied as matrix units read them: places innermost, in parts, patches unfolded."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import cdiv
from limpet.triton_kernels._tuning import run

BLOCK_CHANNELS, BLOCK_PLACES = 32, 64  # of a program
ALIGNED = 16  # elements: rows start where whole vectors are read
VECTOR_BYTES = 16


class Patches(NamedTuple):
    """How output places look at the input, in three dimensions; those of a linear layer look at themselves."""

    output: tuple[int, ...]
    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)

    @property
    def are_places(self) -> bool:
        """Whether every output place is the input place of the same number."""
        return max(self.kernel) == max(self.stride) == 1 and max(self.padding) == 0

    def shifted(self, itemsize: int) -> tuple[int | None, int]:
        """The dimension along which other places of the kernel see the same copy, and how many elements further on.

        Along the outermost dimension an output's rows lie one after the other, so that those which the kernel's next
        place sees are a row further: where that is whole vectors of ``itemsize`` bytes each. Other dimensions need a
        copy for each place of the kernel.
        """
        lead = next((i for i in range(2) if self.output[i] > 1 or self.kernel[i] > 1), 2)
        shift = self.dilation[lead] * math.prod(self.output[lead + 1 :])
        if lead < 2 and self.stride[lead] == 1 and shift * itemsize % VECTOR_BYTES == 0:
            return lead, shift
        return None, 0


@triton.jit
def pack_kernel(
    x_ptr,  # [N, C, X0, X1, X2]
    out_ptr,  # [parts, N, C, U0, U1, U2, P], contiguous but for gaps after P places, which are [P0, P1, P2]
    C,
    X0,
    X1,
    X2,
    U0,
    U1,
    U2,
    P0,
    P1,
    P2,
    step0,
    step1,
    step2,
    pad0,
    pad1,
    pad2,
    dilation0,
    dilation1,
    dilation2,
    x_stride_n,
    x_stride_c,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    out_stride_part,
    out_stride_n,
    out_stride_c,
    out_stride_u,
    SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``out[n,c,u,p] = x[n,c,p step - pad + u dilation]``; if SPLIT, float32 as a sum of two tf32 values.

    ``x = high + low`` up to ``2^-22 |x|``: ``high`` is ``x`` rounded to tf32's 11 bits, ``low`` what is left, rounded
    so too. Values that are not finite stay so.
    """
    places = P0 * P1 * P2
    blocks_p, blocks_c = tl.cdiv(places, BLOCK_P), tl.cdiv(C, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    rest = tl.program_id(0) // blocks_p
    u = rest % (U0 * U1 * U2)
    rest = rest // (U0 * U1 * U2)
    c = rest % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    n = (rest // blocks_c).to(tl.int64)
    x0 = p // (P1 * P2) * step0 + u // (U1 * U2) * dilation0 - pad0
    x1 = p // P2 % P1 * step1 + u // U2 % U1 * dilation1 - pad1
    x2 = p % P2 * step2 + u % U2 * dilation2 - pad2
    inside = (x0 >= 0) & (x0 < X0) & (x1 >= 0) & (x1 < X1) & (x2 >= 0) & (x2 < X2)
    at = n * x_stride_n + x0.to(tl.int64) * x_stride_0 + x1.to(tl.int64) * x_stride_1 + x2.to(tl.int64) * x_stride_2
    c_in = (c < C)[:, None]
    x = tl.load(x_ptr + c.to(tl.int64)[:, None] * x_stride_c + at[None, :], mask=c_in & inside[None, :], other=0.0)
    out = out_ptr + n * out_stride_n + u.to(tl.int64) * out_stride_u + c.to(tl.int64)[:, None] * out_stride_c
    out += p[None, :]
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
    patches: Patches,
    split: bool,
) -> Tensor:  # [parts, N, C, U, P], a view
    """What the output's places see: a copy ``u`` for each place of the kernel, but along ``patches.shifted``.

    Along that dimension copies hold the input with its padding. ``split`` makes two parts of float32.
    """
    copies, places = _copies_and_places(patches, x.element_size())
    total, unfolded = math.prod(places), math.prod(copies)
    samples, channels, *sizes = x.shape
    length = cdiv(total, ALIGNED) * ALIGNED
    out = x.new_empty(2 if split else 1, samples, channels, unfolded, length)
    if x.numel():
        blocks = cdiv(total, BLOCK_PLACES) * cdiv(channels, BLOCK_CHANNELS)
        run(
            pack_kernel,
            (samples * unfolded * blocks,),
            (x, out),
            (
                channels, *sizes, *copies, *places, *patches.stride, *patches.padding, *patches.dilation,
                *x.stride(), *out.stride()[:4],
            ),
            {"SPLIT": split, "BLOCK_C": BLOCK_CHANNELS, "BLOCK_P": BLOCK_PLACES},
            num_warps=4,
        )  # fmt: skip
    return out[..., :total]


def packed_bytes(x: Tensor, patches: Patches, split: bool) -> int:  # [N, C, X0, X1, X2]
    """About how much memory a sample's copies take."""
    copies, places = _copies_and_places(patches, x.element_size())
    return (2 if split else 1) * x.shape[1] * math.prod(copies) * math.prod(places) * x.element_size()


@functools.lru_cache(maxsize=4096)
def _copies_and_places(patches: Patches, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each dimension, how many places of the kernel have copies of their own, and how many places a copy has."""
    copies, places = list(patches.kernel), list(patches.output)
    lead, _ = patches.shifted(itemsize)
    if lead is not None:
        places[lead] += (copies[lead] - 1) * patches.dilation[lead]
        copies[lead] = 1
    return tuple(copies), tuple(places)
