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

from limpet.triton_kernels._contraction import contract_
from limpet.triton_kernels._packing import Patches
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
    if T > 1:
        d, x = output_grad.transpose(1, 2), input.transpose(1, 2)[:, :, None, None]
        contract_(total[:, :, None], d, x, Patches((1, 1, T)), 1, arithmetic(d.dtype, total.device))
        return
    units = arithmetic(torch.float32, total.device)  # squares of 16-bit inputs need more than 16 bits
    blocks = tiles(units, rows, columns)
    each, shares = share(N, blocks[0].count(rows, columns), merge_cost(units, 1))
    partial = partial_sums(total, shares)
    d, a = output_grad[:, 0], input[:, 0]
    launch(
        linear_single_kernel,
        blocks,
        (d, a, partial),
        (N, rows, columns, *d.stride(), *a.stride(), each),
        {"PRECISION": units.input_precision, "ADD": shares == 1},
        weight=(1, rows, columns),
        shares=shares,
        places=1,
        samples=N,
    )
    add_partial_sums_(total, partial)
