"""Tensors of channels as matrices, in whatever order they lie in memory, and the products of a map over channels."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def aligned(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    h: Tensor,  # as x
    channel_dim: int,
) -> tuple[Tensor, Tensor, bool]:
    """Both without gaps and in one order in memory, and whether the channels come last there."""
    if channel_dim == -1:
        return x.contiguous(), h.contiguous(), True
    channels_last = _CHANNELS_LAST.get(h.dim())
    if channels_last and not h.is_contiguous() and h.is_contiguous(memory_format=channels_last):
        return x.contiguous(memory_format=channels_last), h, True
    return x.contiguous(), h.contiguous(), h.dim() == 2


def matrix(value: Tensor, channel_dim: int, last: bool) -> Tensor:  # -> [rows, H], or [N, H, places]
    """A view of what :func:`aligned` gave: of rows where the channels come last, else of samples."""
    if value.dim() == 2:
        return value
    if not last:
        return value.flatten(2)
    if channel_dim == 1:
        value = value.movedim(1, -1)
    return value.view(value.shape[:-1].numel(), value.shape[-1])


# Products are written where they are told to: autocast leaves those alone.


def map_channels(h: Tensor, weight: Tensor, out: Tensor) -> None:  # [rows, H] or [N, H, P]; [H, H]; as h
    """``out = h W^T`` along the channels."""
    if h.dim() == 2:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.bmm(weight.expand(h.shape[0], *weight.shape), h, out=out)


def add_input_grad_(total: Tensor, grad: Tensor, weight: Tensor) -> None:  # [rows, H] or [N, H, P]; as total; [H, H]
    """``total += grad W`` along the channels."""
    if total.dim() == 2:
        torch.addmm(total, grad, weight, out=total)
    else:
        torch.baddbmm(total, weight.t().expand(total.shape[0], *weight.shape), grad, out=total)


def weight_grad(grad: Tensor, h: Tensor) -> Tensor:  # [rows, H] or [N, H, P]; as grad -> [H, H]
    """``grad^T h``, summed over everything but the channels."""
    channels = h.shape[1]
    if h.dim() == 2:
        return torch.mm(grad.t(), h, out=h.new_empty((channels, channels)))
    if h.numel() == 0:
        return h.new_zeros((channels, channels))
    # The convolution's own kernel: faster than products sample by sample, and than copies with the channels last.
    convolution = [1], [0], [1], False, [0], 1, [False, True, False]
    filters = h.new_empty((channels, channels, 1))
    result: Tensor = torch.ops.aten.convolution_backward(grad, h, filters, None, *convolution)[1].squeeze(2)
    return result.contiguous()
