"""Gated lateral family in Triton: the gate and the mixture in the epilogue of the product, and one pass backward.

Launchers have the signatures of the ops in :mod:`limpet.ops.gated_lateral`. Tensors are seen as ``[N, H, P]``, samples,
channels and places, by three strides that all of them share. The forward product has float32's precision
(:func:`._tiles.arithmetic` says how); the two of backward are torch's own, which has nothing to fuse there but a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from limpet._channels import add_input_grad_, aligned, matrix, weight_grad
from limpet.triton_kernels._tiles import OPTIONS, arithmetic, cdiv, tiles
from limpet.triton_kernels._tuning import launch

GROUP = 8  # tiles of rows that are computed side by side, so that they share the weight's in the cache
BLOCK_ROWS, BLOCK_CHANNELS = 32, 128  # of a program of the backward pass


@triton.jit
def forward_kernel(
    h_ptr,  # [N, H, P]
    x_ptr,  # [N, H, P]
    weight_ptr,  # [H, H]
    bias_ptr,  # [H], read if BIAS
    partial_ptr,  # [N, H, P], y
    product_ptr,  # [N, H, P], written if KEEP
    count,  # N P
    columns,  # H
    places,  # P
    stride_n,
    stride_c,
    stride_p,
    weight_stride_o,
    weight_stride_i,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``y = x g + h (1 - g)``, ``g = sigmoid(h W^T + b)``: a tile of rows (a sample's place each) by channels."""
    tiles_r, tiles_c = tl.cdiv(count, BLOCK_O), tl.cdiv(columns, BLOCK_I)
    first = tl.program_id(0) // (GROUP * tiles_c) * GROUP
    size = tl.minimum(tiles_r - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_c)
    r = (first + within % size) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    c = within // size * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    k = tl.arange(0, BLOCK_T)
    # Offsets are 64 bits wide: an index times a stride may pass 2**31.
    row = (r // places).to(tl.int64) * stride_n + (r % places).to(tl.int64) * stride_p
    r_in, c_in = (r < count)[:, None], (c < columns)[None, :]

    h_rows = h_ptr + row[:, None]
    w_rows = weight_ptr + c.to(tl.int64)[None, :] * weight_stride_o
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, columns, BLOCK_T):
        k_in = start + k < columns
        at = (start + k).to(tl.int64)
        h = tl.load(h_rows + at[None, :] * stride_c, mask=r_in & k_in[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        w = tl.load(w_rows + at[:, None] * weight_stride_i, mask=k_in[:, None] & c_in, other=0.0)  # [BLOCK_T, BLOCK_I]
        product = tl.dot(h, w, product, input_precision=PRECISION)

    offsets = row[:, None] + c.to(tl.int64)[None, :] * stride_c
    inside = r_in & c_in
    if KEEP:
        product = product.to(product_ptr.dtype.element_ty)  # backward computes the same gate from what was rounded
        tl.store(product_ptr + offsets, product, mask=inside)
    logits = product.to(tl.float32)
    if BIAS:
        logits += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    gate = tl.sigmoid(logits)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = x * gate + h * tl.sigmoid(-logits)
    tl.store(partial_ptr + offsets, y.to(partial_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,  # [N, H, P]
    x_ptr,  # [N, H, P]
    h_ptr,  # [N, H, P]
    product_ptr,  # [N, H, P]
    bias_ptr,  # [H], read if BIAS
    x_grad_ptr,  # [N, H, P], written if WANT_X
    h_grad_ptr,  # [N, H, P], written if WANT_H; without what comes through the gate
    logit_grad_ptr,  # [N, H, P], written if WANT_LOGITS
    sums_ptr,  # [blocks of rows, H], float32, written if WANT_BIAS
    count,  # N P
    columns,  # H
    places,  # P
    stride_n,
    stride_c,
    stride_p,
    BIAS: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_H: tl.constexpr,
    WANT_LOGITS: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All gradients but the two products, with the gate computed again; a block of rows by channels."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (r // places).to(tl.int64) * stride_n + (r % places).to(tl.int64) * stride_p
    offsets = row[:, None] + c.to(tl.int64)[None, :] * stride_c
    inside = (r < count)[:, None] & (c < columns)[None, :]
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    logits = tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        logits += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    gate, closed = tl.sigmoid(logits), tl.sigmoid(-logits)
    if WANT_X:
        tl.store(x_grad_ptr + offsets, (grad * gate).to(x_grad_ptr.dtype.element_ty), mask=inside)
    if WANT_H:
        tl.store(h_grad_ptr + offsets, (grad * closed).to(h_grad_ptr.dtype.element_ty), mask=inside)
    logit_grad = grad * (x - h) * gate * closed
    if WANT_LOGITS:
        tl.store(logit_grad_ptr + offsets, logit_grad.to(logit_grad_ptr.dtype.element_ty), mask=inside)
    if WANT_BIAS:
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * columns + c
        tl.store(sums, tl.sum(logit_grad, axis=0), mask=c < columns)


def gated_lateral(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    h: Tensor,  # as x
    weight: Tensor,  # [H, H]
    bias: Tensor | None,  # [H]
    channel_dim: int,
    keep_product: bool,
) -> tuple[Tensor, Tensor]:  # as x, as x or [0]
    """The mixture, and the product if it is to be kept."""
    x, h, last = aligned(x, h, channel_dim)
    y = torch.empty_like(x)
    product = torch.empty_like(x) if keep_product else x.new_empty(0)
    if x.numel() == 0:
        return y, product
    count, columns, *strides = _geometry(matrix(h, channel_dim, last))
    units = arithmetic(x.dtype, x.device)
    if strides[2] != 1:  # channels do not lie side by side
        units = units._replace(places=min(32, units.places))
    launch(
        forward_kernel,
        tiles(units, count, columns),
        (h, x, weight, weight if bias is None else bias.contiguous(), y, product),
        (count, columns, *strides, *weight.stride()),
        {"PRECISION": units.input_precision, "BIAS": bias is not None, "KEEP": keep_product, "GROUP": GROUP},
        weight=(1, count, columns),
        shares=1,
        places=1,
        samples=columns,
        shape=(columns, strides[0]),  # how many samples a batch has does not matter
    )
    return y, product


def gated_lateral_backward(
    grad: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    x: Tensor,  # as grad
    h: Tensor,  # as grad
    weight: Tensor,  # [H, H]
    bias: Tensor | None,  # [H]
    product: Tensor,  # as grad
    channel_dim: int,
    wanted: Sequence[bool],
) -> list[Tensor]:  # as grad, as grad, [H, H], [H]; [0] where not wanted
    """The gradients at ``x``, ``h``, ``weight`` and ``bias``."""
    x, h, last = aligned(x, h, channel_dim)
    grad, _, _ = aligned(grad, h, channel_dim)
    want_x, want_h, want_weight, want_bias = wanted
    nothing = x.new_empty(0)
    x_grad, h_grad, logit_grad = (
        torch.empty_like(x) if want else nothing for want in (want_x, want_h, want_h or want_weight)
    )
    inputs = matrix(h, channel_dim, last)
    count, columns, *strides = _geometry(inputs)
    grid = cdiv(count, BLOCK_ROWS), cdiv(columns, BLOCK_CHANNELS)
    sums = x.new_empty((grid[0] if want_bias else 0, columns), dtype=torch.float32)
    if x.numel():
        backward_kernel[grid](
            *(grad, x, h, product, product if bias is None else bias.contiguous()),
            *(x_grad, h_grad, logit_grad, sums, count, columns, *strides),
            BIAS=bias is not None,
            WANT_X=want_x,
            WANT_H=want_h,
            WANT_LOGITS=want_h or want_weight,
            WANT_BIAS=want_bias,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_C=BLOCK_CHANNELS,
            num_warps=4,
            **OPTIONS,
        )
    if want_h:
        add_input_grad_(matrix(h_grad, channel_dim, last), matrix(logit_grad, channel_dim, last), weight)
    products = weight_grad(matrix(logit_grad, channel_dim, last), inputs) if want_weight else nothing
    return [x_grad, h_grad, products, sums.sum(dim=0).to(x.dtype) if want_bias else nothing]


def _geometry(matrix: Tensor) -> tuple[int, int, int, int, int, int]:  # [rows, H] or [N, H, P]
    """Rows, channels and places, and the strides of samples, channels and places."""
    if matrix.dim() == 2:
        return matrix.shape[0], matrix.shape[1], 1, matrix.stride(0), matrix.stride(1), 1
    samples, channels, places = matrix.shape
    return samples * places, channels, places, *matrix.stride()
