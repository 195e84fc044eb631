"""Sums over samples of squared per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide


def sum_grad_squared_linear(
    output_grad: Tensor,  # [N, *, O]
    input: Tensor,  # [N, *, I]
) -> Tensor:  # [O, I]
    """``sum_n (sum_t d[n,t,:] a[n,t,:]^T)^2`` for a weight used as ``y = x W^T``."""
    samples, rows, columns = output_grad.shape[0], output_grad.shape[-1], input.shape[-1]
    dtype = wide(output_grad.dtype)
    total = output_grad.new_zeros((rows, columns), dtype=dtype)
    for n in range(samples):
        d = output_grad[n].flatten(0, -2).to(dtype) if output_grad.dim() > 2 else output_grad[n : n + 1].to(dtype)
        a = input[n].flatten(0, -2).to(dtype) if input.dim() > 2 else input[n : n + 1].to(dtype)
        total += (d.T @ a).square()
    return total


def sum_grad_squared_conv(
    output_grad: Tensor,  # [N, O, *spatial_out]
    input: Tensor,  # [N, C, *spatial_in]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # [O, C / groups, *kernel_size]
    """The sum over samples of the squared weight gradient of a convolution in 1, 2 or 3 dimensions."""
    dtype = wide(output_grad.dtype)
    shape = (output_grad.shape[1], input.shape[1] // groups, *kernel_size)
    total = output_grad.new_zeros(shape, dtype=dtype)
    if output_grad.numel() == 0 or total.numel() == 0:
        return total
    for n in range(output_grad.shape[0]):
        d, x = output_grad[n : n + 1].to(dtype), input[n : n + 1].to(dtype)
        grad = torch.ops.aten.convolution_backward(
            d,
            x,
            total,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [False, True, False],
        )[1]
        total += grad.square()
    return total


def sum_grad_squared_bias(
    output_grad: Tensor,  # [N, A, C, B]
) -> Tensor:  # [C]
    """``sum_n (sum_{a,b} d[n,a,:,b])^2`` for a bias added along the third dimension."""
    return output_grad.to(wide(output_grad.dtype)).sum(dim=(1, 3)).square().sum(dim=0)


def sum_grad_squared_scale(
    output_grad: Tensor,  # [N, A, C, B]
    input: Tensor,  # [N, A, C, B]
    shift: Tensor | None = None,  # [C], the result's dtype
) -> Tensor:  # [C]
    """``sum_n (sum_{a,b} d[n,a,:,b] (x[n,a,:,b] - shift))^2`` for a factor multiplied along the third dimension."""
    dtype = wide(output_grad.dtype)
    x = input.to(dtype) if shift is None else input.to(dtype) - shift.view(-1, 1)
    return (output_grad.to(dtype) * x).sum(dim=(1, 3)).square().sum(dim=0)


def sum_grad_squared_norm(
    output_grad: Tensor,  # [N, *, C]
    input: Tensor,  # [N, *, C]
    mean: Tensor,  # [N, *, 1], the result's dtype
    rstd: Tensor,  # [N, *, 1], the result's dtype
) -> Tensor:  # [C]
    """``sum_n (sum_t d[n,t,:] (x[n,t,:] - mean[n,t]) rstd[n,t])^2`` for the factor of a layer normalisation."""
    dtype = wide(output_grad.dtype)
    grads = output_grad.to(dtype) * ((input.to(dtype) - mean) * rstd)
    return (grads.flatten(1, -2).sum(dim=1) if grads.dim() > 2 else grads).square().sum(dim=0)


def sum_grad_squared_embedding(
    output_grad: Tensor,  # [N, T, E]
    indices: Tensor,  # [N, T], int64
    num_embeddings: int,
    padding_idx: int = -1,
) -> Tensor:  # [num_embeddings, E]
    """``sum_n (sum_{t: indices[n,t] = v} d[n,t,:])^2`` for each row ``v``; zero for ``padding_idx``."""
    dtype = wide(output_grad.dtype)
    total = output_grad.new_zeros((num_embeddings, output_grad.shape[-1]), dtype=dtype)
    for n in range(output_grad.shape[0]):
        total += torch.zeros_like(total).index_add_(0, indices[n], output_grad[n].to(dtype)).square()
    if padding_idx >= 0:
        total[padding_idx] = 0
    return total
