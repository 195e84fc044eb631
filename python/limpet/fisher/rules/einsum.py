"""Einstein sums with parameters, written as linear layers, products of elements, or sums of two operands each."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.rules.base import Find, Match, Rule
from limpet.fisher.rules.linear import linear
from limpet.fisher.rules.products import MOST


def einsum(find: Find, equation: Any, *operands: Any) -> Match | None:
    """``torch.einsum`` of a parameter and another tensor, where every index of the parameter is summed or put out."""
    operands = _operands(operands)
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


# --- what is no linear layer at once ----------------------------------------------------------------------------------


def opened(equation: Any, *operands: Any) -> Tensor | None:
    """``torch.einsum`` as other functions that have rules."""
    operands = _operands(operands)
    terms = _terms(equation, operands) if isinstance(equation, str) else None
    if terms is None or len(operands) < 2:
        return None
    of, out = terms
    if len(operands) > 2:
        return _pairwise(of, out, operands)
    (first, second), (a, b) = of, operands
    if set(first) < set(second):
        first, second, a, b = second, first, b, a
    if set(second) <= set(first):
        return _elements(first, second, out, a, b)
    common = [i for i in out if i in first and i in second]
    if not common:
        return _matrix(first, second, out, a, b) if len(second) <= len(first) else _matrix(second, first, out, b, a)
    if len(common) != 1 or not any(_is_stack(x) for x in (a, b)):
        return None
    (i,) = common
    each = f"{first.replace(i, '')},{second.replace(i, '')}->{out.replace(i, '')}"
    parts = zip(a.unbind(first.index(i)), b.unbind(second.index(i)), strict=True)
    return torch.stack([torch.einsum(each, *pair) for pair in parts], dim=out.index(i))


def _is_stack(value: Any) -> bool:
    """A matrix for each head or expert: one product each."""
    return isinstance(value, Tensor) and value.requires_grad and value.dim() == 3 and value.shape[0] <= MOST


def _pairwise(of: list[str], out: str, operands: tuple[Any, ...]) -> Tensor:
    """The first two operands' sum, in the order of torch, with the next one's, and so on."""
    y, indices = operands[0], of[0]
    for k in range(1, len(operands)):
        later = {*out, *"".join(of[k + 1 :])}
        left = out if k == len(operands) - 1 else "".join(i for i in dict.fromkeys(indices + of[k]) if i in later)
        y, indices = torch.einsum(f"{indices},{of[k]}->{left}", y, operands[k]), left
    return y


def _elements(first: str, second: str, out: str, a: Tensor, b: Tensor) -> Tensor:
    """A sum of products of elements, where the first operand has every index."""
    b = b.permute([second.index(i) for i in first if i in second])
    for d, i in enumerate(first):
        if i not in second:
            b = b.unsqueeze(d)
    y = a * b
    summed = [d for d, i in enumerate(first) if i not in out]
    y = y.sum(dim=summed) if summed else y
    left = [i for i in first if i in out]
    return y.permute([left.index(i) for i in out])


def _matrix(first: str, second: str, out: str, a: Tensor, b: Tensor) -> Tensor | None:
    """A linear layer whose weight is computed from the second operand."""
    rows, put_out = [i for i in first if i in out], [i for i in second if i in out]
    summed = [i for i in first if i in second]
    if len(rows) + len(summed) != len(first) or len(put_out) + len(summed) != len(second):
        return None
    sizes = {**dict(zip(first, a.shape, strict=True)), **dict(zip(second, b.shape, strict=True))}
    x = a.permute([first.index(i) for i in rows + summed]).reshape(*[sizes[i] for i in rows], _size(summed, sizes))
    weight = b.permute([second.index(i) for i in put_out + summed]).reshape(_size(put_out, sizes), _size(summed, sizes))
    y = F.linear(x, weight).reshape([sizes[i] for i in rows + put_out])
    return y.permute([(rows + put_out).index(i) for i in out])


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Tensor | None:
    """``torch.tensordot`` in einsum's notation."""
    if out is not None or isinstance(dims, Tensor):
        return None
    of_a, of_b = (range(a.dim() - dims, a.dim()), range(dims)) if isinstance(dims, int) else map(list, dims)
    first, second = string.ascii_lowercase[: a.dim()], list(string.ascii_uppercase[: b.dim()])
    for i, j in zip(of_a, of_b, strict=True):
        second[j] = first[i]
    left = [i for i in first if i not in second] + [i for i in second if i not in first]
    y: Tensor = torch.einsum(f"{first},{''.join(second)}->{''.join(left)}", a, b)
    return y


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


def _operands(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given


def _size(indices: list[str], sizes: dict[str, int]) -> int:
    size = 1
    for index in indices:
        size *= sizes[index]
    return size


RULES: dict[object, Rule] = {torch.einsum: einsum, torch.functional.einsum: einsum}

OPENED: dict[object, Callable[..., Any]] = {
    torch.einsum: opened,
    torch.functional.einsum: opened,
    torch.tensordot: tensordot,
}
