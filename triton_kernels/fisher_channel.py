"""The Fisher sums of biases and scales: reductions of each sample's places, squared and added."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import OPTIONS, add_partial_sums_, partial_sums, share


@triton.jit
def channel_kernel(
    d_ptr,  # [N, A, C, B]
    x_ptr,  # [N, A, C, B]; not read unless SCALE
    shift_ptr,  # [C], contiguous; not read unless CENTRED
    partial_ptr,  # [shares, C], contiguous; [C], added to, if ADD
    N,
    A,
    C,
    B,
    d_stride_n,
    d_stride_a,
    d_stride_c,
    d_stride_b,
    x_stride_n,
    x_stride_a,
    x_stride_c,
    x_stride_b,
    samples_each,
    SCALE: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ADD: tl.constexpr,
):
    """``partial[s,c] = sum_{n in share s} (sum_{a,b} d[n,a,c,b] (x[n,a,c,b] - shift[c]))^2``.

    Without SCALE the second factor is 1, without CENTRED the shift is 0.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    b = tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * samples_each
    blocks_b = tl.cdiv(B, BLOCK_B)
    d_tile = d_ptr + c.to(tl.int64)[:, None] * d_stride_c + b.to(tl.int64)[None, :] * d_stride_b
    x_tile = x_ptr + c.to(tl.int64)[:, None] * x_stride_c + b.to(tl.int64)[None, :] * x_stride_b
    if CENTRED:
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[:, None]

    squares = tl.zeros((BLOCK_C,), tl.float32)
    for sample in range(first, tl.minimum(first + samples_each, N)):
        n = tl.cast(sample, tl.int64)
        grad = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
        for step in range(A * blocks_b):
            a = tl.cast(step // blocks_b, tl.int64)
            start = tl.cast(step % blocks_b * BLOCK_B, tl.int64)
            inside = (c < C)[:, None] & (start + b < B)[None, :]
            d = tl.load(d_tile + (n * d_stride_n + a * d_stride_a + start * d_stride_b), mask=inside, other=0.0).to(
                tl.float32
            )
            if SCALE:
                x = tl.load(x_tile + (n * x_stride_n + a * x_stride_a + start * x_stride_b), mask=inside, other=0.0)
                x = x.to(tl.float32)
                if CENTRED:
                    x -= shift
                d *= x
            grad += d
        total = tl.sum(grad, axis=1)
        squares += total * total

    out = partial_ptr + tl.program_id(1).to(tl.int64) * C + c
    if ADD:
        squares += tl.load(out, mask=c < C, other=0.0)
    tl.store(out, squares, mask=c < C)


def _add_channel_sums_(
    total: Tensor,  # [C], float32
    d: Tensor,  # [N, A, C, B]
    x: Tensor | None = None,  # [N, A, C, B]
    shift: Tensor | None = None,  # [C], float32
) -> None:
    if d.numel() == 0:
        return
    if d.shape[3] < d.shape[1]:  # the longer run of places is the one read in blocks
        d, x = d.transpose(1, 3), None if x is None else x.transpose(1, 3)
    N, A, C, B = d.shape
    # A block is 2048 elements of one sample, longest along the dimension that lies densest in memory.
    if d.stride(2) < d.stride(3):
        block_c = min(128, triton.next_power_of_2(C))
        block_b = min(2048 // block_c, triton.next_power_of_2(B))
    else:
        block_b = min(512, triton.next_power_of_2(B))
        block_c = min(2048 // block_b, triton.next_power_of_2(C))
    programs = triton.cdiv(C, block_c)
    each, shares = share(N, programs, 2 / (A * B))  # a partial sum against the places it sums
    partial = partial_sums(total, shares)
    channel_kernel[(programs, shares)](
        d, d if x is None else x, total if shift is None else shift, partial,
        N, A, C, B, *d.stride(), *(d if x is None else x).stride(), each,
        SCALE=x is not None, CENTRED=shift is not None, BLOCK_C=block_c, BLOCK_B=block_b, ADD=shares == 1,
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    add_partial_sums_(total, partial)


def sum_grad_squared_bias_(
    total: Tensor,  # [C], float32
    output_grad: Tensor,  # [N, A, C, B]
) -> None:
    """Add ``sum_n (sum_{a,b} d[n,a,:,b])^2`` to ``total``."""
    _add_channel_sums_(total, output_grad)


def sum_grad_squared_scale_(
    total: Tensor,  # [C], float32
    output_grad: Tensor,  # [N, A, C, B]
    input: Tensor,  # [N, A, C, B]
    shift: Tensor | None = None,  # [C], float32
) -> None:
    """Add ``sum_n (sum_{a,b} d[n,a,:,b] (x[n,a,:,b] - shift))^2`` to ``total``."""
    _add_channel_sums_(total, output_grad, input, shift)
