"""Arithmetic with a broadcast parameter: sums, products, quotients, and the expansion of a parameter over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from limpet.fisher.contributions import Contribution, Vector
from limpet.fisher.operands import Operand
from limpet.fisher.rules.base import Call, Find, Match, Rule, Saved, Split


def _vector(w: Tensor, d: Tensor, x: Tensor | None, lead: int, gain: Tensor | None = None) -> Vector:
    """The contribution of a parameter whose elements lie behind ``lead`` broadcast dimensions.

    The features are one dimension; where they lay in the middle (channels of images), the view says so.
    """

    def flat(rows: Tensor) -> Tensor:  # [N, *, *features] -> [N, *, C]
        features = rows.dim() - _features(w)
        return rows.unsqueeze(-1) if features == rows.dim() else rows.flatten(features)

    return Vector(flat(d), None if x is None else flat(x), -1, gain)


def _features(w: Tensor) -> int:
    return sum(size != 1 for size in w.shape)


class Shift(Call):
    """``y = p x + q w`` for numbers p and q and a broadcast ``w``."""

    function = "add"
    weight_kind = Vector
    w: Tensor

    def __init__(self, name: Operand, lead: int, w: Tensor, p: float, q: float) -> None:  # w [*features]
        super().__init__((name, None), lead, w, None)
        self.p, self.q = p, q

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        if self.p == 1:
            return torch.add(x, self.w, alpha=self.q), ()
        return torch.add(self.q * self.w, x, alpha=self.p), ()

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        return dy if self.p == 1 else dy * self.p

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        if self.weight is not None:
            gain = None if self.q == 1 else dy.new_full((), self.q)
            yield self.weight, _vector(self.w, split(dy), None, self.lead, gain)


class Scale(Call):
    """``y = x w``, or ``x / w``, for a broadcast ``w``."""

    function = "mul"
    weight_kind = Vector
    w: Tensor

    def __init__(self, name: Operand, lead: int, w: Tensor, divide: bool) -> None:  # w [*features]
        super().__init__((name, None), lead, w, None)
        self.divide = divide

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        saved = (x,) if self.weight is not None else ()
        return torch.div(x, self.w) if self.divide else torch.mul(x, self.w), saved

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        return dy / self.w if self.divide else dy * self.w

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        if self.weight is None:
            return
        d, x = split(dy), split(saved[0])
        x = x.to(d.dtype)
        gain = -self.w.detach().reshape(-1).square().reciprocal() if self.divide else None
        yield self.weight, _vector(self.w, d, x, self.lead, gain)


class Expand(Call):
    """``w`` repeated along new or single dimensions; an input says no more than which rows change with which sample."""

    function = "expand"
    weight_kind = Vector
    w: Tensor

    def __init__(self, name: Operand, lead: int, w: Tensor, sizes: Sequence[int]) -> None:  # w [*features]
        super().__init__((name, None), lead, w, None)
        self.sizes = tuple(sizes)  # of the result, broadcast dimensions in front

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        return self.w.expand(self.sizes).clone(), ()

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        if self.weight is not None:
            yield self.weight, _vector(self.w, split(dy), None, self.lead)


def _order(w: Tensor, dims: int) -> list[int]:
    """The dimensions of a broadcast result, those along which ``w`` is repeated in front."""
    sizes = (1,) * (dims - w.dim()) + tuple(w.shape)
    return [d for d in range(dims) if sizes[d] == 1] + [d for d in range(dims) if sizes[d] != 1]


def _restored(order: list[int]) -> Callable[[Tensor], Tensor] | None:
    if order == list(range(len(order))):
        return None
    back = [order.index(d) for d in range(len(order))]
    return lambda y: y.permute(back)


def _broadcast(find: Find, w: Tensor, other: Any, call: Callable[[Operand, int, Tensor], Call]) -> Match | None:
    """Arrange ``other`` so that the dimensions along which ``w`` is repeated come first."""
    name = find(w)
    if name is None or not isinstance(other, Tensor):
        return None
    x = other.expand(torch.broadcast_shapes(w.shape, other.shape))
    order = _order(w, x.dim())
    features = [size for size in w.shape if size != 1]
    after = _restored(order)
    return Match(
        x if after is None else x.permute(order),
        call(name, x.dim() - len(features), w.detach().reshape(features)),
        after,
    )


def _one(find: Find, a: Any, b: Any) -> tuple[Tensor, Any, bool] | None:
    """The operand, the other one, and whether the operand came second; a parameter comes before what is computed."""
    of_a, of_b = find(a), find(b)
    if of_a is None and of_b is None:
        return None
    second = of_a is None or (of_a.computed is not None and of_b is not None)
    return (b, a, True) if second else (a, b, False)


def add(find: Find, input: Any, other: Any, *, alpha: float = 1) -> Match | None:
    """``input + alpha other``."""
    found = _one(find, input, other)
    if found is None:
        return None
    w, x, second = found
    p, q = (1, alpha) if second else (alpha, 1)
    return _broadcast(find, w, x, lambda name, lead, w: Shift(name, lead, w, p, q))


def sub(find: Find, input: Any, other: Any, *, alpha: float = 1) -> Match | None:
    """``input - alpha other``."""
    return add(find, input, other, alpha=-alpha)


def _rsub(find: Find, input: Any, other: Any, alpha: float = 1) -> Match | None:
    return sub(find, other, input, alpha=alpha) if isinstance(other, Tensor) else None


def mul(find: Find, input: Any, other: Any) -> Match | None:
    """``input other``."""
    found = _one(find, input, other)
    if found is None:
        return None
    w, x, _ = found
    return _broadcast(find, w, x, lambda name, lead, w: Scale(name, lead, w, divide=False))


def div(find: Find, input: Any, other: Any, *, rounding_mode: str | None = None) -> Match | None:
    """``input / other``, the parameter below."""
    if rounding_mode is not None or find(other) is None:
        return None
    return _broadcast(find, other, input, lambda name, lead, w: Scale(name, lead, w, divide=True))


def _rdiv(find: Find, input: Any, other: Any) -> Match | None:
    return div(find, other, input) if isinstance(other, Tensor) else None


def _in_place(rule: Rule) -> Rule:
    """The rule of an in-place function: its first argument, no parameter, takes the result's values."""

    def in_place(find: Find, input: Any, *args: Any, **options: Any) -> Match | None:
        match = rule(find, input, *args, **options) if find(input) is None else None
        if match is None or match.x is None or match.x.numel() != input.numel():
            return None
        _, call, after = match
        kept = match.x.clone() if isinstance(call, Scale) else match.x  # it is saved for backward
        return Match(kept, call, lambda y: input.copy_(y if after is None else after(y)))

    return in_place


def _expanded(find: Find, w: Any, sizes: Sequence[int], beside: Tensor | None = None) -> Match | None:
    name = find(w)
    if name is None:
        return None
    sizes = list(sizes)
    for d, size in enumerate(w.shape[::-1]):
        if sizes[-1 - d] == -1:
            sizes[-1 - d] = size
    order = _order(w, len(sizes))
    features = [size for size in w.shape if size != 1]
    call = Expand(name, len(sizes) - len(features), w.detach().reshape(features), [sizes[d] for d in order])
    return Match(None if beside is None else beside.permute(order), call, _restored(order))


def expand(find: Find, input: Any, *sizes: Any, implicit: bool = False) -> Match | None:
    """``Tensor.expand`` and ``broadcast_to``."""
    return _expanded(find, input, sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)


def _broadcast_to(find: Find, input: Any, size: Sequence[int]) -> Match | None:
    return _expanded(find, input, size)


def _expand_as(find: Find, input: Any, other: Tensor) -> Match | None:
    return _expanded(find, input, other.shape)


def repeated_beside(w: Tensor, other: Tensor) -> Tensor:  # broadcast against each other, [*] -> [*]
    """``w.expand_as(other)``, for a function of the elements of both.

    Where that function picks but some of the elements of ``w``, gradients tell little of whose rows are whose; the rows
    of ``other`` tell more.
    """
    if has_torch_function((w, other)):
        repeated: Tensor = handle_torch_function(repeated_beside, (w, other), w, other)
        return repeated
    return w.expand_as(other)


def _beside(find: Find, w: Tensor, other: Tensor) -> Match | None:
    return _expanded(find, w, other.shape, other)


def repeat(find: Find, input: Any, *repeats: Any) -> Match | None:
    """``Tensor.repeat`` along new or single dimensions."""
    if find(input) is None:
        return None
    times = repeats[0] if isinstance(repeats[0], (tuple, list)) else repeats
    own = (1,) * (len(times) - input.dim()) + tuple(input.shape)
    if any(size != 1 and n != 1 for size, n in zip(own, times, strict=True)):
        return None
    return _expanded(find, input, [size * n for size, n in zip(own, times, strict=True)])


_FUNCTIONS: list[tuple[Rule, tuple[str, ...]]] = [
    (add, ("add", "__add__", "__radd__")),
    (sub, ("sub", "subtract", "__sub__")),
    (_rsub, ("rsub", "__rsub__")),
    (mul, ("mul", "multiply", "__mul__", "__rmul__")),
    (div, ("div", "divide", "true_divide", "__truediv__")),
    (_rdiv, ("__rtruediv__", "__rdiv__")),
    (_in_place(add), ("add_", "__iadd__")),
    (_in_place(sub), ("sub_", "subtract_", "__isub__")),
    (_in_place(mul), ("mul_", "multiply_", "__imul__")),
    (_in_place(div), ("div_", "divide_", "__itruediv__", "__idiv__")),
    (expand, ("expand",)),
    (_broadcast_to, ("broadcast_to",)),
    (_expand_as, ("expand_as",)),
    (repeat, ("repeat",)),
]

RULES: dict[object, Rule] = {
    getattr(owner, name): rule
    for rule, names in _FUNCTIONS
    for name in names
    for owner in (torch, Tensor)
    if hasattr(owner, name)
}
RULES[repeated_beside] = _beside
