"""What every rule provides: a call of an intercepted function, with its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from limpet.fisher.contributions import Contribution
from limpet.fisher.operands import Operand

Find = Callable[[Any], Operand | None]  # the operand that a value is
Split = Callable[[Tensor], Tensor]  # [*lead, *features] -> [N, *, *features]
Saved = tuple[Tensor, ...]
Names = tuple[Operand | None, Operand | None]


class Call(ABC):
    """One call of a function that uses operands directly.

    Attributes:
        weight: the operand used as weight, or None.
        bias: the operand used as bias, or None.
        lead: leading dimensions of input and output that count rows; the others are features.
        w: the weight's value, or None.
        b: the bias's value, or None.
    """

    function: ClassVar[str]
    weight_kind: type[Contribution]
    bias_kind: type[Contribution]
    autocast: ClassVar[bool | None] = None  # True: computed in autocast's dtype; False: in float32; None: as it comes
    sizes: tuple[int, ...] = ()  # of the result, for calls without an input
    repeatable: ClassVar[bool] = False  # whether it depends on the function's arguments alone, and may serve again

    def __init__(self, names: Names, lead: int, w: Tensor | None, b: Tensor | None) -> None:
        self.weight, self.bias = names
        self.lead, self.w, self.b = lead, w, b

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        """The function's value, and what backward needs."""

    def preparation(self) -> Callable[[Sequence[Any]], object] | None:
        """What computes, for several calls at a time, what their backward needs; the same function for all that can."""
        return None

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:
        """The gradient at the input; not asked of calls whose input cannot have one."""
        raise TypeError(f"{self.function} has no input that a gradient could reach")

    @abstractmethod
    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:
        """Each operand and its contribution; ``split`` brings the samples to the front."""

    def uses(self) -> Iterator[tuple[Operand, type[Contribution]]]:
        """Each operand and the kind of its contribution."""
        if self.weight is not None:
            yield self.weight, self.weight_kind
        if self.bias is not None:
            yield self.bias, self.bias_kind

    def drop(self, unwanted: Callable[[Operand], bool]) -> None:
        """Contribute nothing to these operands."""
        if self.weight is not None and unwanted(self.weight):
            self.weight = None
        if self.bias is not None and unwanted(self.bias):
            self.bias = None

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Bring weight, bias and input to one dtype, as autocast does; the input."""
        self.w = None if self.w is None else self.w.to(dtype)
        self.b = None if self.b is None else self.b.to(dtype)
        return x.to(dtype) if x.is_floating_point() else x


def prepare(calls: Iterable[Call]) -> None:
    """Prepare calls for backward, those of a kind together."""
    kinds: dict[Callable[[Sequence[Any]], object], list[Call]] = {}
    for call in calls:
        preparation = call.preparation()
        if preparation is not None:
            kinds.setdefault(preparation, []).append(call)
    for preparation, same in kinds.items():
        preparation(same)


class Match(NamedTuple):
    """A function's call as a rule reads it."""

    x: Tensor | None  # the input, [*lead, *features], rearranged where need be; None if operands are all there is
    call: Call
    after: Callable[[Tensor], Tensor] | None = None  # makes the function's result of the call's


# A rule reads the function's own arguments; None where it does not apply: the function then runs as it is.
Rule = Callable[..., Match | None]


def tracked(find: Find, weight: Tensor | None, bias: Tensor | None) -> Names | None:
    """Both operands; None unless one is an operand and the other is one too or needs no gradient."""
    w, b = find(weight), find(bias)
    if w is None:
        if b is None or (weight is not None and weight.requires_grad):
            return None
    elif b is None and bias is not None and bias.requires_grad:
        return None
    return w, b
