"""Bags of embeddings: rows of a table, read by the rule for embeddings and reduced as torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding_bag(
    input: Tensor,  # [N, T], or [R] with offsets
    weight: Tensor,  # [V, E]
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """``F.embedding_bag``; with ``scale_grad_by_freq``, which counts over the batch, only per sample."""
    if scale_grad_by_freq or input.is_floating_point() or input.is_nested:
        return None
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        return None  # which torch refuses
    absent = None
    if input.dim() == 1 and offsets is not None:
        at, absent = _ragged(len(input), offsets, include_last_offset)
        input = input[at]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[at]
    if input.dim() != 2 or (offsets is not None and absent is None):
        return None
    if padding_idx is not None:
        is_padding = input == padding_idx % len(weight)
        absent = is_padding if absent is None else absent | is_padding
    rows = F.embedding(input, weight, max_norm=max_norm, norm_type=norm_type)  # [N, T, E]
    return _reduced(rows, mode, per_sample_weights, absent)


def _ragged(rows: int, offsets: Tensor, include_last_offset: bool) -> tuple[Tensor, Tensor]:  # int64, bool [N, T]
    """Where each bag's rows lie, and which of these places are beyond its end."""
    starts = offsets[:-1] if include_last_offset else offsets
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([rows])])
    longest = max(1, int((ends - starts).max())) if len(starts) else 1
    at = starts[:, None] + torch.arange(longest, device=offsets.device)
    absent = at >= ends[:, None]
    return at.masked_fill(absent, 0), absent


def _reduced(rows: Tensor, mode: str, weights: Tensor | None, absent: Tensor | None) -> Tensor:
    if mode == "max":
        if absent is None:
            return rows.max(dim=1).values
        largest = rows.masked_fill(absent.unsqueeze(-1), -torch.inf).max(dim=1).values
        return largest.masked_fill(absent.all(dim=1, keepdim=True), 0)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    if absent is not None:
        rows = rows.masked_fill(absent.unsqueeze(-1), 0)
    total = rows.sum(dim=1)
    if mode == "sum":
        return total
    count = rows.shape[1] if absent is None else (~absent).sum(dim=1, keepdim=True).clamp_min(1)
    return total / count


OPENED: dict[object, Callable[..., Any]] = {F.embedding_bag: embedding_bag}
