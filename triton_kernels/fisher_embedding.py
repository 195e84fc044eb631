"""The Fisher sum of an embedding's rows: equal indices are summed per sample, squared and added in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import cdiv, next_power_of_2
from limpet.triton_kernels._tuning import run


@triton.jit
def embedding_kernel(
    d_ptr,  # [N, T, E]
    rows_ptr,  # [N T], int64: the row of each place, ascending
    places_ptr,  # [N T], int64: n T + t, ascending within a row
    ends_ptr,  # [N T], int64: where the run of equal rows ends
    total_ptr,  # [V, E], contiguous
    T,
    E,
    d_stride_n,
    d_stride_t,
    d_stride_e,
    padding_idx,
    BLOCK_E: tl.constexpr,
):
    """``total[v] += sum_n (sum_{t: indices[n,t] = v} d[n,t,:])^2``: one program walks all places of v."""
    start = tl.program_id(0)
    row = tl.load(rows_ptr + start)
    previous = tl.load(rows_ptr + start - 1, mask=start > 0, other=-1)
    if (row == previous) | (row == padding_idx):
        return
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    e_in = e < E
    d_row = d_ptr + e.to(tl.int64) * d_stride_e

    squares = tl.zeros((BLOCK_E,), tl.float32)
    grad = tl.zeros((BLOCK_E,), tl.float32)
    sample = tl.load(places_ptr + start) // T
    for at in range(start, tl.load(ends_ptr + start)):
        place = tl.load(places_ptr + at)
        n, t = place // T, place % T
        if n != sample:
            squares += grad * grad
            grad = tl.zeros((BLOCK_E,), tl.float32)
            sample = n
        grad += tl.load(d_row + (n * d_stride_n + t * d_stride_t), mask=e_in, other=0.0).to(tl.float32)
    squares += grad * grad

    out = total_ptr + row * E + e
    tl.store(out, tl.load(out, mask=e_in, other=0.0) + squares, mask=e_in)


def sum_grad_squared_embedding_(
    total: Tensor,  # [V, E], float32
    output_grad: Tensor,  # [N, T, E]
    indices: Tensor,  # [N, T], int64
    padding_idx: int,
) -> None:
    """Add ``sum_n (sum_{t: indices[n,t] = v} d[n,t,:])^2`` to every row ``v`` but ``padding_idx``."""
    if output_grad.numel() == 0:
        return
    # A stable sort keeps the places of a row, and so its samples, in order. Nothing here waits for the device.
    rows, places = torch.sort(indices.reshape(-1), stable=True)
    torch._assert_async((rows[0] >= 0) & (rows[-1] < total.shape[0]), "indices must be rows of the table")
    ends = torch.searchsorted(rows, rows, right=True)
    T, E = output_grad.shape[1:]
    block = min(256, next_power_of_2(E))
    run(
        embedding_kernel,
        (rows.numel(), cdiv(E, block)),
        (output_grad, rows, places, ends, total),
        (T, E, *output_grad.stride(), padding_idx),
        {"BLOCK_E": block},
        num_warps=4,
    )
