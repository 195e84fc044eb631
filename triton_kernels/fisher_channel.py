"""The Fisher sums of biases and scales: reductions of each sample's places, squared and added.

Samples may be few and their places many: programs share a sample's places, write their sums, and a second kernel adds
these, squares and adds over samples, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import PROCESSORS, cdiv, next_power_of_2
from limpet.triton_kernels._tuning import run

ENOUGH = 8 * PROCESSORS  # programs that fill a large GPU


@triton.jit
def sums_kernel(
    d_ptr,  # [N, A, C, B]
    x_ptr,  # [N, A, C, B]; read if SCALE
    shift_ptr,  # [C], contiguous; read if CENTRED
    mean_ptr,  # [N, B], contiguous; read if NORM
    rstd_ptr,  # [N, B], contiguous; read if NORM
    sums_ptr,  # [1 or 2, N, chunks, C], contiguous
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
    chunks,
    blocks_each,
    SCALE: tl.constexpr,
    CENTRED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """``sums[n,s,c] = sum_{a,b in chunk s} d[n,a,c,b] f(x[n,a,c,b])``; if BIAS, the sums of ``d`` alone behind them.

    ``f`` is 1 without SCALE, ``(x - shift[c])`` if CENTRED, ``(x - mean[n,b]) rstd[n,b]`` if NORM (A is 1 then).
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    b = tl.arange(0, BLOCK_B)
    n = (tl.program_id(1) // chunks).to(tl.int64)
    chunk = tl.program_id(1) % chunks
    blocks_b = tl.cdiv(B, BLOCK_B)
    d_tile = d_ptr + n * d_stride_n + c.to(tl.int64)[:, None] * d_stride_c + b.to(tl.int64)[None, :] * d_stride_b
    x_tile = x_ptr + n * x_stride_n + c.to(tl.int64)[:, None] * x_stride_c + b.to(tl.int64)[None, :] * x_stride_b
    if CENTRED:
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[:, None]

    grad = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    bias = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    for step in range(chunk * blocks_each, tl.minimum((chunk + 1) * blocks_each, A * blocks_b)):
        a = tl.cast(step // blocks_b, tl.int64)
        start = tl.cast(step % blocks_b * BLOCK_B, tl.int64)
        b_in = start + b < B
        inside = (c < C)[:, None] & b_in[None, :]
        d = tl.load(d_tile + (a * d_stride_a + start * d_stride_b), mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            bias += d
        if SCALE:
            x = tl.load(x_tile + (a * x_stride_a + start * x_stride_b), mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                x -= shift
            if NORM:
                at = n * B + start + b
                x -= tl.load(mean_ptr + at, mask=b_in, other=0.0)[None, :]
                x *= tl.load(rstd_ptr + at, mask=b_in, other=0.0)[None, :]
            d *= x
        grad += d

    out = sums_ptr + tl.program_id(1).to(tl.int64) * C + c
    tl.store(out, tl.sum(grad, axis=1), mask=c < C)
    if BIAS:
        tl.store(out + tl.cast(N, tl.int64) * chunks * C, tl.sum(bias, axis=1), mask=c < C)


@triton.jit
def squares_kernel(
    sums_ptr,  # [1 or 2, N, chunks, C], contiguous
    total_ptr,  # [C], contiguous, added to by the programs of the first part
    bias_ptr,  # [C], contiguous, by those of the second
    N,
    chunks,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``total[c] += sum_n (sum_s sums[n,s,c])^2``."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = sums_ptr + ((tl.cast(part, tl.int64) * N + n) * chunks)[:, None] * C + c[None, :]
        inside = (n < N)[:, None] & (c < C)[None, :]
        grad = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for chunk in range(chunks):
            grad += tl.load(row + tl.cast(chunk, tl.int64) * C, mask=inside, other=0.0)
        squares += grad * grad
    added = tl.sum(squares, axis=0)
    if part == 0:
        tl.store(total_ptr + c, tl.load(total_ptr + c, mask=c < C, other=0.0) + added, mask=c < C)
    else:
        tl.store(bias_ptr + c, tl.load(bias_ptr + c, mask=c < C, other=0.0) + added, mask=c < C)


def _add_channel_sums_(
    total: Tensor,  # [C], float32
    d: Tensor,  # [N, A, C, B]
    x: Tensor | None = None,  # [N, A, C, B]
    shift: Tensor | None = None,  # [C], float32
    norm: tuple[Tensor, Tensor] | None = None,  # [N, A B] each, float32, one of A and B being 1
    bias_total: Tensor | None = None,  # [C], float32
) -> None:
    if d.numel() == 0:
        return
    if d.shape[3] < d.shape[1]:  # the longer run of places is the one read in blocks
        d, x = d.transpose(1, 3), None if x is None else x.transpose(1, 3)
    N, A, C, B = d.shape
    # A block is 2048 elements of one sample, longest along the dimension that lies densest in memory.
    if d.stride(2) < d.stride(3):
        block_c = min(128, next_power_of_2(C))
        block_b = min(2048 // block_c, next_power_of_2(B))
    else:
        block_b = min(512, next_power_of_2(B))
        block_c = min(2048 // block_b, next_power_of_2(C))
    columns, blocks = cdiv(C, block_c), A * cdiv(B, block_b)
    each = cdiv(blocks, min(blocks, cdiv(ENOUGH, columns * N)))
    chunks = cdiv(blocks, each)
    sums = total.new_empty(1 if bias_total is None else 2, N, chunks, C)
    mean, rstd = norm or (total, total)
    run(
        sums_kernel,
        (columns, N * chunks),
        (d, d if x is None else x, total if shift is None else shift, mean, rstd, sums),
        (
            N, A, C, B, *d.stride(), *(d if x is None else x).stride(), chunks, each,
        ),
        {
            "SCALE": x is not None, "CENTRED": shift is not None, "NORM": norm is not None,
            "BIAS": bias_total is not None, "BLOCK_C": block_c, "BLOCK_B": block_b,
        },
        num_warps=4,
    )  # fmt: skip
    run(
        squares_kernel,
        (cdiv(C, 32), len(sums)),
        (sums, total, total if bias_total is None else bias_total),
        (N, chunks, C),
        {"BLOCK_N": min(32, next_power_of_2(N)), "BLOCK_C": 32},
        num_warps=4,
    )


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
    bias_total: Tensor | None = None,  # [C], float32
) -> None:
    """Add ``sum_n (sum_{a,b} d[n,a,:,b] (x[n,a,:,b] - shift))^2`` to ``total``, the bias's to its own."""
    _add_channel_sums_(total, output_grad, input, shift, bias_total=bias_total)


def sum_grad_squared_norm_(
    total: Tensor,  # [C], float32
    bias_total: Tensor | None,  # [C], float32
    output_grad: Tensor,  # [N, T, C]
    input: Tensor,  # [N, T, C]
    mean: Tensor,  # [N, T], float32
    rstd: Tensor,  # [N, T], float32
) -> None:
    """Add ``sum_n (sum_t d[n,t,:] (x[n,t,:] - mean[n,t]) rstd[n,t])^2`` to ``total``, the bias's to its own."""
    d, x = output_grad.unsqueeze(3), input.unsqueeze(3)
    _add_channel_sums_(total, d, x, norm=(mean.contiguous(), rstd.contiguous()), bias_total=bias_total)
