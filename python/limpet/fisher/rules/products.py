"""Matrix products with a parameter, written as linear layers: matmul, addmm, bilinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.rules.base import Find, Match, Rule
from limpet.fisher.rules.linear import linear


def matmul(find: Find, input: Any, other: Any) -> Match | None:
    """``torch.matmul``, ``@``, ``mm``, ``bmm`` and ``mv`` with one operand, a matrix or a vector, on either side."""
    if find(other) is not None:
        if other.dim() == 1:
            match = linear(find, input, other.unsqueeze(0))
            return None if match is None else Match(input, match.call, lambda y: y.squeeze(-1))
        return linear(find, input, other.t()) if other.dim() == 2 else None
    if find(input) is None or input.dim() > 2 or not isinstance(other, Tensor):
        return None
    if input.dim() == 1:  # [I] @ [*, I, T]
        match = linear(find, other.mT, input.unsqueeze(0)) if other.dim() > 1 else None
        return None if match is None else Match(match.x, match.call, lambda y: y.squeeze(-1))
    if other.dim() == 1:
        return linear(find, other, input)
    match = linear(find, other.mT, input)  # [O, I] @ [*, I, T]
    return None if match is None else Match(match.x, match.call, lambda y: y.mT)


def _rmatmul(find: Find, other: Any, input: Any) -> Match | None:
    return matmul(find, input, other)


def addmm(find: Find, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Match | None:
    """``torch.addmm`` with a bias ``[O]`` and a weight ``[I, O]``."""
    if beta != 1 or alpha != 1 or find(mat2) is None:
        return None
    return linear(find, mat1, mat2.t(), input)


def bilinear(find: Find, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Match | None:
    """``F.bilinear``: linear in the outer products of its inputs."""
    if find(weight) is None or weight.dim() != 3:
        return None
    return linear(find, (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1), bias)


# --- a matrix for each head or expert: one product each ---------------------------------------------------------------

MOST = 64  # matrices


def _is_stack(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.dim() == 3 and value.shape[0] <= MOST


def batched_matmul(input: Any, other: Any) -> Tensor | None:
    """``[*, E, N, I] @ [E, I, O]``, as the products of each of the E matrices: each is a region of the parameter."""
    if not _is_stack(other) or input.dim() < 3 or input.shape[-3] != other.shape[0]:
        return None
    return torch.stack([x @ w for x, w in zip(input.unbind(-3), other.unbind(0), strict=True)], dim=-3)


# --- as other products ------------------------------------------------------------------------------------------------


def product(input: Any, other: Any) -> Tensor | None:
    """A matrix product with what is computed from parameters, or with each matrix of a stack."""
    if other.dim() == 1:
        return F.linear(input, other.unsqueeze(0)).squeeze(-1)
    if other.dim() == 2 and input.dim() > 1:
        return F.linear(input, other.t())
    return batched_matmul(input, other)


def added(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm``, ``baddbmm`` and ``addmv``: a product, and a sum."""
    y = torch.matmul(mat1, mat2)
    return torch.add(y if alpha == 1 else alpha * y, input, alpha=beta)


def inner(input: Tensor, other: Tensor) -> Tensor | None:
    """``torch.inner``, over the last dimensions."""
    return F.linear(input, other) if other.dim() == 2 else None


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """``torch.outer``."""
    return input.unsqueeze(-1) * vec2


def to_a_number(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear`` with a weight ``[I]``."""
    if weight.dim() != 1:
        return None
    y = torch.matmul(input, weight)
    return y if bias is None else y + bias


OPENED: dict[object, Callable[..., Any]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), product),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.mv, Tensor.mv), product),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), added),
    **dict.fromkeys((torch.addmv, Tensor.addmv), added),
    **dict.fromkeys((torch.inner, Tensor.inner), inner),
    **dict.fromkeys((torch.outer, Tensor.outer), outer),
    F.linear: to_a_number,
}

RULES: dict[object, Rule] = {
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.mv: matmul,
    Tensor.mv: matmul,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    F.bilinear: bilinear,
    torch.bilinear: bilinear,
}
