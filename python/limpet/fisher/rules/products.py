"""Matrix products with a parameter, written as linear layers: matmul, addmm, einsum, bilinear."""

from __future__ import annotations

import string
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


def einsum(find: Find, equation: Any, *operands: Any) -> Match | None:
    """``torch.einsum`` of a parameter and another tensor, where every index of the parameter is summed or put out."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or (find(operands[0]) is None) == (find(operands[1]) is None)
    ):
        return None
    terms = _terms(equation, operands)
    if terms is None:
        return None
    (first, second), out = terms
    (w, of_w), (x, of_x) = (operands[0], first), (operands[1], second)
    if find(x) is not None:
        (w, of_w), (x, of_x) = (x, of_x), (w, of_w)
    summed = [i for i in of_w if i in of_x and i not in out]
    put_out = [i for i in of_w if i in out and i not in of_x]
    rows = [i for i in of_x if i in out and i not in of_w]
    if len(summed) + len(put_out) != len(of_w) or len(summed) + len(rows) != len(of_x):
        return None
    sizes = {**dict(zip(of_w, w.shape, strict=True)), **dict(zip(of_x, x.shape, strict=True))}
    matrix = w.permute([of_w.index(i) for i in put_out + summed])
    try:
        matrix = matrix.view(_size(put_out, sizes), _size(summed, sizes))
    except RuntimeError:  # not a view of the parameter
        return None
    x = x.permute([of_x.index(i) for i in rows + summed]).reshape(*[sizes[i] for i in rows], _size(summed, sizes))
    match = linear(find, x, matrix)
    if match is None:
        return None
    order = [(rows + put_out).index(i) for i in out]
    return Match(x, match.call, lambda y: y.reshape([sizes[i] for i in rows + put_out]).permute(order))


# --- a matrix for each head or expert: one product each ---------------------------------------------------------------

_MOST = 64  # matrices


def _is_stack(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.dim() == 3 and value.shape[0] <= _MOST


def batched_matmul(input: Any, other: Any) -> Tensor | None:
    """``[*, E, N, I] @ [E, I, O]``, as the products of each of the E matrices: each is a region of the parameter."""
    if not _is_stack(other) or input.dim() < 3 or input.shape[-3] != other.shape[0]:
        return None
    return torch.stack([x @ w for x, w in zip(input.unbind(-3), other.unbind(0), strict=True)], dim=-3)


def batched_einsum(equation: Any, *operands: Any) -> Tensor | None:
    """``torch.einsum`` of a tensor and a stack of matrices, with one index that all three have in common."""
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    first, second = left.split(",")
    common = [i for i in out if i in first and i in second]
    if len(common) != 1 or not any(_is_stack(x) for x in operands):
        return None
    (i,) = common
    parts = zip(operands[0].unbind(first.index(i)), operands[1].unbind(second.index(i)), strict=True)
    each = f"{first.replace(i, '')},{second.replace(i, '')}->{out.replace(i, '')}"
    return torch.stack([torch.einsum(each, a, b) for a, b in parts], dim=out.index(i))


OPENED: dict[object, Callable[..., Any]] = {
    torch.matmul: batched_matmul,
    Tensor.matmul: batched_matmul,
    Tensor.__matmul__: batched_matmul,
    torch.bmm: batched_matmul,
    Tensor.bmm: batched_matmul,
    torch.einsum: batched_einsum,
}


# --- einsum's notation ------------------------------------------------------------------------------------------------


def _terms(equation: str, operands: tuple[Any, ...]) -> tuple[list[str], str] | None:
    """The indices of each operand and of the result, with letters for the dimensions of an ellipsis."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    most = max((x.dim() - len(term) + 3 for term, x in zip(terms, operands, strict=True) if "..." in term), default=0)
    if any("..." in term for term in terms) and sum("..." in term for term in terms) > 1:
        return None  # broadcast against each other
    filled = "".join(free[:most])
    if not arrow:
        letters = sorted(c for c in set(left) - {",", "."} if left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(letters)
    terms, out = [term.replace("...", filled) for term in terms], out.replace("...", filled)
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return None  # diagonals
    return terms, out


def _size(indices: list[str], sizes: dict[str, int]) -> int:
    size = 1
    for index in indices:
        size *= sizes[index]
    return size


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
    torch.einsum: einsum,
    torch.functional.einsum: einsum,
}
