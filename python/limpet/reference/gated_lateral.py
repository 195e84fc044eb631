"""The gated lateral connection between columns, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide


def gated_lateral(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    h: Tensor,  # as x
    weight: Tensor,  # [H, H]
    bias: Tensor | None = None,  # [H]
    channel_dim: int = -1,
) -> Tensor:  # as x
    """``y = x g + h (1 - g)`` with the gate ``g = sigmoid(h W^T + b)``: a variant of our own."""
    gate, wide_x, wide_h = _wide(x, h, bias, gate_product(h, weight, channel_dim), channel_dim)
    return (wide_x * gate + wide_h * (1 - gate)).to(x.dtype)


def gate_product(
    h: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    weight: Tensor,  # [H, H]
    channel_dim: int = -1,
) -> Tensor:  # as h
    """``h W^T`` along the channels."""
    return (h.movedim(channel_dim, -1) @ weight.T).movedim(-1, channel_dim)


def gated_lateral_backward(
    grad: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    x: Tensor,  # as grad
    h: Tensor,  # as grad
    weight: Tensor,  # [H, H]
    bias: Tensor | None,  # [H]
    product: Tensor,  # as grad
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as grad, as grad, [H, H], [H]
    """The gradients of :func:`gated_lateral` at ``x``, ``h``, ``weight``, ``bias``; ``product`` is ``h W^T``."""
    gate, wide_x, wide_h = _wide(x, h, bias, product, channel_dim)
    d = grad.to(gate.dtype)
    logit_grad = d * (wide_x - wide_h) * gate * (1 - gate)
    narrow = logit_grad.to(x.dtype)  # what is multiplied by matrices
    rows, inputs, unrounded = (_rows(t, channel_dim) for t in (narrow, h, logit_grad))
    through_gate = gate_product(narrow, weight.T, channel_dim).to(gate.dtype)
    return (
        (d * gate).to(x.dtype),
        (d * (1 - gate) + through_gate).to(x.dtype),
        rows.T @ inputs,
        unrounded.sum(dim=0).to(x.dtype),
    )


def gated_laterals(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    hs: Sequence[Tensor],  # as x, each
    weights: Sequence[Tensor],  # [H, H] each
    biases: Sequence[Tensor | None],  # [H] each
    combine: str,
    channel_dim: int = -1,
) -> Tensor:  # as x
    """One after another, each on what the one before gave (``"chain"``), or ``x`` and what each adds (``"sum"``)."""
    result = x
    for h, weight, bias in zip(hs, weights, biases, strict=True):
        if combine == "chain":
            result = gated_lateral(result, h, weight, bias, channel_dim)
        else:
            result = result + (gated_lateral(x, h, weight, bias, channel_dim) - x)
    return result


def _wide(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim 1
    h: Tensor,  # as x
    bias: Tensor | None,  # [H]
    product: Tensor,  # as x
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # as x, each
    """The gate, ``x`` and ``h`` in the dtype they are combined in."""
    dtype = wide(x.dtype)
    logits = product.to(dtype).movedim(channel_dim, -1)
    if bias is not None:
        logits = logits + bias.to(dtype)
    return torch.sigmoid(logits).movedim(-1, channel_dim), x.to(dtype), h.to(dtype)


def _rows(value: Tensor, channel_dim: int) -> Tensor:  # [*, H] or [N, H, *] -> [rows, H]
    value = value.movedim(channel_dim, -1)
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])
