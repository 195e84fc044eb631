"""Calls that can bring one sample's row to another's place without an index: products, sums, flips.

Multiplied by a permutation matrix, rows change places, and no function that searches or moves is called. Such a call
runs along a dimension that the samples lie in, so its size there follows the number of samples. That is how it is
told from the product of a layer: the sizes along which each function ran on a few samples are compared with those on
a batch. Most models have no such call, as it would mix samples; where one does, values decide which row is whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, ...]  # the sizes of the dimensions along which a call combines or moves rows
Spans = Mapping[str, Sequence[Span]]  # by the functions' names, in the order of the calls


class Mixing:
    """Which functions were seen to combine rows of several samples."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._mixing: set[str] = set()

    def learn(self, few: Spans, many: Spans) -> None:
        """Compare the calls of two forward passes, on so many samples and on more or fewer."""
        self._known |= few.keys() & many.keys()
        self._mixing |= {name for name in self._known if _differ(few.get(name, ()), many.get(name, ()))}

    def possible(self, spans: Spans, samples: int) -> bool:
        """Whether values may have decided in a pass over ``samples`` which row is whose."""
        if not self._mixing.isdisjoint(spans):
            return True
        return any(size % samples == 0 for name in spans.keys() - self._known for one in spans[name] for size in one)


def _differ(few: Sequence[Span], many: Sequence[Span]) -> bool:
    if len(few) == len(many):
        return list(few) != list(many)
    return set(few) != set(many)  # called in a loop over the samples


def may_mix(func: Any) -> bool:
    """Whether some calls of a function combine or move rows."""
    return getattr(func, "__name__", "") in _SPANS


def span(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, Span] | None:
    """A function's name and the sizes along which this call of it combines or moves rows; None if it cannot."""
    name = getattr(func, "__name__", "")
    read = _SPANS.get(name)
    if read is None:
        return None
    try:
        sizes = read(*args, **kwargs)
    except (TypeError, ValueError):  # arguments named otherwise: any dimension may be the one
        sizes = tuple(size for one in (*args, *kwargs.values()) if isinstance(one, Tensor) for size in one.shape)
    return None if sizes is None else (name, sizes)


# --- the sizes, by arguments named as the functions name them --------------------------------------------------------


def _of_first(input: Tensor, *_: Any, **__: Any) -> Span:  # [*, M, K] @ [*, K, N]
    return input.shape[-1:]


def _of_right(right: Tensor, *_: Any) -> Span:  # __rmatmul__
    return right.shape[-2:-1] if right.dim() > 1 else right.shape


def _of_second(input: Tensor, *rest: Tensor, **named: Any) -> Span:  # addmm and its like
    first = rest[0] if rest else next(named[name] for name in ("mat1", "mat", "batch1") if name in named)
    return tuple(first.shape[-1:])


def _of_addbmm(input: Tensor, batch1: Tensor, *_: Any, **__: Any) -> Span:
    return batch1.shape[0], batch1.shape[-1]


def _of_chain(matrices: Any, *more: Any, **__: Any) -> Span:
    chain = (matrices, *more) if isinstance(matrices, Tensor) else tuple(matrices)
    return tuple(matrix.shape[-1] for matrix in chain[:-1])


def _of_tensordot(a: Tensor, b: Tensor, dims: Any = 2, *_: Any, **__: Any) -> Span:
    if isinstance(dims, int):
        return tuple(a.shape[a.dim() - dims :])
    first = dims[0].tolist() if isinstance(dims, Tensor) else dims[0]
    return _sizes(a, first)


def _of_einsum(equation: Any, *operands: Any) -> Span:
    if isinstance(equation, str):
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        terms: list[Any] = inputs.split(",")
        tensors = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
        kept: Any = output if arrow else None
    else:  # operand, labels, operand, labels, ..., and the output's labels
        every = (equation, *operands)
        tensors, terms = every[0 : len(every) // 2 * 2 : 2], list(every[1::2])
        kept = every[-1] if len(every) % 2 else None
    size: dict[Any, int] = {}
    times: dict[Any, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        before, after = _around(*((term.replace("...", "."), ".") if isinstance(term, str) else (term, ...)))
        labels = [*zip(before, tensor.shape, strict=False)]
        labels += [*zip(reversed(after), reversed(tensor.shape), strict=False)]
        for label, length in labels:
            size[label] = max(length, size.get(label, 1))
            times[label] = times.get(label, 0) + 1
    return tuple(n for label, n in size.items() if (label not in kept if kept is not None else times[label] > 1))


def _around(labels: Sequence[Any], dots: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The labels before an ellipsis and after it."""
    if dots not in labels:
        return labels, labels[:0]
    at = labels.index(dots)
    return labels[:at], labels[at + 1 :]


def _of_attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> Span:
    return key.shape[-2:-1]


def _of_convolution(input: Tensor, *_: Any, **__: Any) -> Span:  # with a kernel that was computed
    return tuple(input.shape[1:])


def _of_reduction(
    input: Tensor, dim: Any = None, *_: Any, axis: Any = None, other: Any = None, **__: Any
) -> Span | None:
    dims = axis if dim is None else dim
    if isinstance(dims, Tensor) or other is not None:  # the larger of two
        return None
    if dims is None or isinstance(dims, bool) or dims in ((), []):
        return tuple(input.shape) if input.is_floating_point() else None  # one count or truth value moves no rows
    return _sizes(input, dims)


def _of_norm(input: Tensor, p: Any = None, dim: Any = None, *_: Any, axis: Any = None, **__: Any) -> Span | None:
    return _of_reduction(input, dim, axis=axis)


def _of_flip(input: Tensor, *dims: Any, **named: Any) -> Span:
    return _sizes(input, named["dims"] if "dims" in named else dims[0] if len(dims) == 1 else dims)


def _of_roll(input: Tensor, shifts: Any = 0, dims: Any = None, *_: Any) -> Span:
    return tuple(input.shape) if dims in (None, (), []) else _sizes(input, dims)


def _of_whole(input: Tensor, *_: Any, **__: Any) -> Span:
    return tuple(input.shape)


def _sizes(tensor: Tensor, dims: Any) -> Span:
    shape = tensor.shape or (1,)  # dimension 0 of a number is allowed
    return tuple(shape[d] for d in (dims if isinstance(dims, (tuple, list, torch.Size)) else (dims,)))


_READERS: dict[Callable[..., Span | None], tuple[str, ...]] = {
    _of_first: ("matmul", "__matmul__", "mm", "bmm", "mv", "dot", "vdot", "inner", "linear", "_sparse_mm", "smm",
                "hspmm", "linalg_matmul", "linalg_vecdot", "linalg_solve", "linalg_lstsq", "linalg_solve_triangular"),
    _of_right: ("__rmatmul__",),
    _of_second: ("addmm", "addmv", "baddbmm", "addmm_", "addmv_", "baddbmm_", "sspaddmm"),
    _of_addbmm: ("addbmm", "addbmm_"),
    _of_chain: ("linalg_multi_dot", "chain_matmul"),
    _of_tensordot: ("tensordot",),
    _of_einsum: ("einsum",),
    _of_attention: ("scaled_dot_product_attention",),
    _of_convolution: tuple(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
    _of_reduction: ("sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "max", "min", "aminmax", "median",
                    "nanmedian", "mode", "any", "all", "count_nonzero", "logsumexp", "std", "var", "std_mean",
                    "var_mean", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
    _of_norm: ("norm", "linalg_norm", "linalg_vector_norm"),
    _of_flip: ("flip",),
    _of_roll: ("roll",),
    _of_whole: ("fliplr", "flipud", "rot90"),
}  # fmt: skip
_SPANS = {name: read for read, names in _READERS.items() for name in names}
