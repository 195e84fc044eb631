"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.contributions import Contribution, Matrix, Table, Vector
from limpet.fisher.operands import Operand
from limpet.fisher.rules.base import Call, Find, Match, Names, Rule, Saved, Split, tracked


class Linear(Call):
    """``y = x W^T + b``."""

    function = "linear"
    weight_kind, bias_kind = Matrix, Vector
    autocast = True
    repeatable = True
    w: Tensor

    def __init__(self, names: Names, lead: int, w: Tensor, b: Tensor | None) -> None:  # [O, I], [O]
        super().__init__(names, lead, w, b)

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        return F.linear(x, self.w, self.b), (x,) if self.weight is not None else ()

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        return dy @ self.w

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        d = split(dy)
        if self.weight is not None:
            yield self.weight, Matrix(d, split(saved[0]))
        if self.bias is not None:
            yield self.bias, Vector(d, None, -1)


def linear(find: Find, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Match | None:
    """``F.linear``; a bias of another shape than ``[O]`` goes per sample."""
    found = tracked(find, weight, bias)
    if found is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return Match(input, Linear(found, input.dim() - 1, weight, bias))


class Embedding(Call):
    """``y = W[indices]``."""

    function = "embedding"
    weight_kind = Table
    repeatable = True
    w: Tensor

    def __init__(self, name: Operand, lead: int, w: Tensor, padding_idx: int | None) -> None:  # w [V, E]
        super().__init__((name, None), lead, w, None)
        self.padding_idx = padding_idx

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        return F.embedding(x, self.w), (x,)

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        if self.weight is not None:
            yield self.weight, Table(split(dy), split(saved[0]), self.padding_idx)


def embedding(
    find: Find,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Match | None:
    """``F.embedding``; with ``scale_grad_by_freq``, which counts over the batch, only per sample."""
    name = find(weight)
    if name is None or weight.dim() != 2:
        return None
    if max_norm is not None:
        raise RuntimeError(
            f"{name.name!r} is an embedding with max_norm={max_norm}, which changes the weights in forward"
        )
    if scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return Match(input, Embedding(name, input.dim(), weight, padding_idx))


def rows(find: Find, input: Any, index: Any) -> Match | None:
    """``W[index]`` with one tensor of integers."""
    integers = (torch.int64, torch.int32)
    if not isinstance(index, Tensor) or index.dtype not in integers or find(input) is None or input.dim() != 2:
        return None
    return embedding(find, torch.where(index < 0, index + input.shape[0], index), input)


def index_select(find: Find, input: Any, dim: int, index: Tensor) -> Match | None:
    """``torch.index_select`` of a matrix's rows."""
    return rows(find, input, index) if dim == 0 else None


RULES: dict[object, Rule] = {
    F.linear: linear,
    F.embedding: embedding,
    Tensor.__getitem__: rows,
    torch.index_select: index_select,
    Tensor.index_select: index_select,
}
