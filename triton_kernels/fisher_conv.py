"""The Fisher sum of a convolution's weight: patches are read from the input, never unfolded."""

from __future__ import annotations

from collections.abc import Sequence

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

NARROW = 16  # channels of a group, below which a tile's columns are channels and places of the kernel together


@triton.jit
def conv_kernel(
    d_ptr,  # [N, O, Y0 Y1 Y2]
    x_ptr,  # [N, C, X0, X1, X2]
    partial_ptr,  # [shares, O, C / groups, K0, K1, K2], contiguous; without shares, added to, if ADD
    N,
    rows,  # of one group
    columns,  # (C / groups) K0 K1 K2
    C,  # of one group
    groups,
    Y0,
    Y1,
    Y2,
    X0,
    X1,
    X2,
    K0,
    K1,
    K2,
    step0,
    step1,
    step2,
    pad0,
    pad1,
    pad2,
    dilation0,
    dilation1,
    dilation2,
    d_stride_n,
    d_stride_o,
    d_stride_t,
    x_stride_n,
    x_stride_c,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    samples_each,
    PRECISION: tl.constexpr,
    PADDED: tl.constexpr,  # some of pad0, pad1, pad2 is not 0
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ADD: tl.constexpr,
):
    """``partial[s,o,c,k] = sum_{n in share s} (sum_y d[n,o,y] x[n,c,y step - pad + k dilation])^2``.

    For few channels. The sum of ``contraction_kernel`` with output places ``t = (y0 Y1 + y1) Y2 + y2`` and columns
    ``i = ((c K0 + k0) K1 + k1) K2 + k2``. An input's address is a part that depends on ``t`` plus one that depends on
    ``i``, so an element of a patch costs an addition and, with padding, a comparison per dimension.
    """
    tiles_i = tl.cdiv(columns, BLOCK_I)
    tiles = tl.cdiv(rows, BLOCK_O) * tiles_i
    group = tl.program_id(0) // tiles
    o = (tl.program_id(0) % tiles // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    i = (tl.program_id(0) % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    first = tl.program_id(1) * samples_each
    samples = tl.minimum(samples_each, N - first)
    T = Y0 * Y1 * Y2
    blocks_t = tl.cdiv(T, BLOCK_T)

    # Where column i looks, relative to a place's corner.
    at0 = i // (K1 * K2) % K0 * dilation0 - pad0
    at1 = i // K2 % K1 * dilation1 - pad1
    at2 = i % K2 * dilation2 - pad2
    channel = (group * C + i // (K0 * K1 * K2)).to(tl.int64)
    x_column = x_ptr + channel * x_stride_c
    x_column += at0.to(tl.int64) * x_stride_0 + at1.to(tl.int64) * x_stride_1 + at2.to(tl.int64) * x_stride_2
    d_row = d_ptr + (group * rows + o).to(tl.int64) * d_stride_o
    o_in, i_in = (o < rows)[:, None], (i < columns)[:, None]

    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for step in range(samples * blocks_t):
        n = (first + step // blocks_t).to(tl.int64)
        start = (step % blocks_t) * BLOCK_T
        t = start + tl.arange(0, BLOCK_T)
        t_in = t < T
        corner0 = t // (Y1 * Y2) % Y0 * step0
        corner1 = t // Y2 % Y1 * step1
        corner2 = t % Y2 * step2
        d_at = n * d_stride_n + t.to(tl.int64) * d_stride_t
        x_at = n * x_stride_n + corner0.to(tl.int64) * x_stride_0
        x_at += corner1.to(tl.int64) * x_stride_1 + corner2.to(tl.int64) * x_stride_2
        inside = i_in & t_in[None, :]
        if PADDED:  # a negative place is a large unsigned one
            inside &= (corner0[None, :] + at0[:, None]).to(tl.uint32) < tl.cast(X0, tl.uint32)
            inside &= (corner1[None, :] + at1[:, None]).to(tl.uint32) < tl.cast(X1, tl.uint32)
            inside &= (corner2[None, :] + at2[:, None]).to(tl.uint32) < tl.cast(X2, tl.uint32)
        d_in = o_in & t_in[None, :]
        d = tl.load(d_row[:, None] + d_at[None, :], mask=d_in, other=0.0)  # [BLOCK_O, BLOCK_T]
        # Read with places innermost: neighbouring threads then read neighbouring pixels.
        x = tl.load(x_column[:, None] + x_at[None, :], mask=inside, other=0.0)  # [BLOCK_I, BLOCK_T]
        grad = tl.dot(d, x.trans(), grad, input_precision=PRECISION)
        if start + BLOCK_T >= T:
            squares += grad * grad
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)

    weight = (tl.program_id(1).to(tl.int64) * groups + group) * rows * columns
    store_tile(partial_ptr + weight, squares, o, i, rows, columns, ADD)


def sum_grad_squared_conv_(
    total: Tensor,  # [O, C / groups, *kernel_size], float32
    output_grad: Tensor,  # [N, O, *spatial_out]
    input: Tensor,  # [N, C, *spatial_in]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Add the sum over samples of a convolution's squared weight gradient; 1 to 3 spatial dimensions."""
    if output_grad.numel() == 0 or input.numel() == 0:
        return
    d, x = output_grad.flatten(2), input
    # Leading dimensions of one place make every convolution a 3-d one.
    places = [1] * (5 - input.dim()) + list(output_grad.shape[2:])
    for _ in range(5 - input.dim()):
        x = x.unsqueeze(2)
    missing = 3 - len(kernel_size)
    kernel, steps, dilations = ([1] * missing + list(v) for v in (kernel_size, stride, dilation))
    pads = [0] * missing + list(padding)
    units = arithmetic(d.dtype, total.device)
    if total.shape[1] >= NARROW:
        contract_(total.flatten(2), d, x, Patches(*map(tuple, (places, kernel, steps, pads, dilations))), groups, units)
        return
    rows, columns = d.shape[1] // groups, total[0].numel()
    units = units._replace(places=min(32, units.places))
    blocks = tiles(units, rows, columns)
    each, shares = share(d.shape[0], blocks[0].count(rows, columns) * groups, merge_cost(units, d.shape[2]))
    partial = partial_sums(total, shares)
    launch(
        conv_kernel,
        blocks,
        (d, x, partial),
        (
            d.shape[0], rows, columns, x.shape[1] // groups, groups, *places, *x.shape[2:],
            *kernel, *steps, *pads, *dilations, *d.stride(), *x.stride(), each,
        ),
        {"PRECISION": units.input_precision, "PADDED": any(pads), "ADD": shares == 1},
        weight=(groups, rows, columns),
        shares=shares,
        places=d.shape[2],
        samples=d.shape[0],
    )  # fmt: skip
    add_partial_sums_(total, partial)
