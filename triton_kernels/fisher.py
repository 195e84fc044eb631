"""Fisher family in Triton: the sum over samples of squared per-sample gradients of a linear weight.

Launchers have the signatures of the ops in :mod:`limpet.ops.fisher` and add to ``total``, float32 and
contiguous, in place. Inputs are float32, bfloat16 or float16 with any strides. Products have float32's precision
(:func:`._tiles.arithmetic` says how) and sums are float32. Where programs share the samples, each writes a
partial sum and these are added in order, without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import (
    add_partial_sums_,
    arithmetic,
    merge_cost,
    partial_sums,
    share,
    store_tile,
    tiles,
)
from limpet.triton_kernels._tuning import launch


@triton.jit
def linear_kernel(
    d_ptr,  # [N, T, O]
    a_ptr,  # [N, T, I]
    partial_ptr,  # [shares, O, I], contiguous; [O, I], added to, if ADD
    N,
    T,
    rows,
    columns,
    d_stride_n,
    d_stride_t,
    d_stride_o,
    a_stride_n,
    a_stride_t,
    a_stride_i,
    samples_each,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ADD: tl.constexpr,
):
    """``partial[s] = sum_{n in share s} (sum_t d[n,t,:]^T a[n,t,:])^2``, one tile of ``[O, I]`` a program.

    The gradient of a sample exists only as a tile in registers: it is squared and added when its last place
    is in. Samples and places are one loop, so that the loads of the next sample overlap the products of this
    one.
    """
    tiles_i = tl.cdiv(columns, BLOCK_I)
    o = (tl.program_id(0) // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    i = (tl.program_id(0) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    t = tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * samples_each
    samples = tl.minimum(samples_each, N - first)
    blocks_t = tl.cdiv(T, BLOCK_T)

    # Offsets are 64 bits wide: an index times a stride may pass 2**31.
    d_tile = d_ptr + o.to(tl.int64)[:, None] * d_stride_o + t.to(tl.int64)[None, :] * d_stride_t
    a_tile = a_ptr + t.to(tl.int64)[:, None] * a_stride_t + i.to(tl.int64)[None, :] * a_stride_i
    o_in, i_in = (o < rows)[:, None], (i < columns)[None, :]

    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for step in range(samples * blocks_t):
        n = (first + step // blocks_t).to(tl.int64)
        start = (step % blocks_t) * BLOCK_T
        t_in = start + t < T
        at = start.to(tl.int64)
        d_at, a_at = n * d_stride_n + at * d_stride_t, n * a_stride_n + at * a_stride_t
        d = tl.load(d_tile + d_at, mask=o_in & t_in[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        a = tl.load(a_tile + a_at, mask=t_in[:, None] & i_in, other=0.0)  # [BLOCK_T, BLOCK_I]
        grad = tl.dot(d, a, grad, input_precision=PRECISION)
        if start + BLOCK_T >= T:
            squares += grad * grad
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)

    share_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * rows * columns
    store_tile(share_ptr, squares, o, i, rows, columns, ADD)


@triton.jit
def linear_single_kernel(
    d_ptr,  # [N, O]
    a_ptr,  # [N, I]
    partial_ptr,  # [shares, O, I], contiguous; [O, I], added to, if ADD
    N,
    rows,
    columns,
    d_stride_n,
    d_stride_o,
    a_stride_n,
    a_stride_i,
    samples_each,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ADD: tl.constexpr,
):
    """``partial[s] = sum_{n in share s} (d[n,:]^2)^T (a[n,:]^2)``: one place a sample.

    The squares are taken in float32 on the way in, so that 16-bit inputs lose nothing.
    """
    tiles_i = tl.cdiv(columns, BLOCK_I)
    o = (tl.program_id(0) // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    i = (tl.program_id(0) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    first = tl.program_id(1) * samples_each
    last = tl.minimum(first + samples_each, N)
    d_tile = d_ptr + o.to(tl.int64)[:, None] * d_stride_o
    a_tile = a_ptr + i.to(tl.int64)[None, :] * a_stride_i
    o_in, i_in = (o < rows)[:, None], (i < columns)[None, :]

    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(first, last, BLOCK_T):
        n = start + tl.arange(0, BLOCK_T)
        n_in = n < last
        n = n.to(tl.int64)
        d = tl.load(d_tile + n[None, :] * d_stride_n, mask=o_in & n_in[None, :], other=0.0).to(tl.float32)
        a = tl.load(a_tile + n[:, None] * a_stride_n, mask=n_in[:, None] & i_in, other=0.0).to(tl.float32)
        squares = tl.dot(d * d, a * a, squares, input_precision=PRECISION)

    share_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * rows * columns
    store_tile(share_ptr, squares, o, i, rows, columns, ADD)


def sum_grad_squared_linear_(
    total: Tensor,  # [O, I], float32
    output_grad: Tensor,  # [N, T, O]
    input: Tensor,  # [N, T, I]
) -> None:
    """Add ``sum_n (sum_t d[n,t,:] a[n,t,:]^T)^2`` to ``total``."""
    N, T, rows = output_grad.shape
    columns = input.shape[2]
    if output_grad.numel() == 0 or input.numel() == 0:
        return
    single = T == 1
    # Squares of 16-bit inputs need more than 16 bits.
    units = arithmetic(torch.float32 if single else output_grad.dtype, total.device)
    blocks = tiles(units, rows, columns)
    each, shares = share(N, blocks[0].count(rows, columns), merge_cost(units, T))
    partial = partial_sums(total, shares)
    if single:
        d, a = output_grad[:, 0], input[:, 0]
        kernel, sizes = linear_single_kernel, (N, rows, columns)
    else:
        d, a = output_grad, input
        kernel, sizes = linear_kernel, (N, T, rows, columns)
    launch(
        kernel,
        blocks,
        (d, a, partial, *sizes, *d.stride(), *a.stride(), each),
        {"PRECISION": units.input_precision, "ADD": shares == 1},
        weight=(1, rows, columns),
        shares=shares,
        places=T,
        samples=N,
    )
    add_partial_sums_(total, partial)
