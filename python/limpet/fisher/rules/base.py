"""What every rule provides: a call of an intercepted function, with its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from limpet.fisher.contributions import Contribution

Split = Callable[[Tensor], Tensor]  # [*lead, *features] -> [N, *, *features]
Saved = tuple[Tensor, ...]


class Call(ABC):
    """One call of a function that uses tracked parameters directly.

    Attributes:
        weight: name of the tracked weight, or None.
        bias: name of the tracked bias, or None.
        lead: leading dimensions of input and output that count rows; the others are features.
    """

    function: ClassVar[str]
    weight_kind: type[Contribution]
    bias_kind: type[Contribution]

    def __init__(self, weight: str | None, bias: str | None, lead: int) -> None:
        self.weight, self.bias, self.lead = weight, bias, lead

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        """The function's value, and what backward needs."""

    @abstractmethod
    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:
        """The gradient at the input."""

    @abstractmethod
    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[str, Contribution]]:
        """Each tracked parameter's name and contribution; ``split`` brings the samples to the front."""

    def uses(self) -> Iterator[tuple[str, type[Contribution]]]:
        """Each tracked parameter's name and the kind of its contribution."""
        if self.weight is not None:
            yield self.weight, self.weight_kind
        if self.bias is not None:
            yield self.bias, self.bias_kind

    def accepts(self, places: int) -> bool:
        """Whether rows flattened with ``places`` rows per sample can be contracted."""
        return True

    def drop(self, names: Mapping[str, object]) -> None:
        """Contribute nothing to these parameters."""
        if self.weight in names:
            self.weight = None
        if self.bias in names:
            self.bias = None


# A rule reads the function's own arguments and returns the input (which may have been padded) and the call; or None
# where it does not apply: the function then runs as it is.
Rule = Callable[..., tuple[Tensor, Call] | None]


def tracked(
    names: Mapping[int, str], weight: Tensor | None, bias: Tensor | None
) -> tuple[str | None, str | None] | None:
    """The names of both; None unless one is tracked and the other is tracked too or needs no gradient."""
    weight_name, bias_name = names.get(id(weight)), names.get(id(bias))
    if weight_name is None:
        if bias_name is None or (weight is not None and weight.requires_grad):
            return None
    elif bias_name is None and bias is not None and bias.requires_grad:
        return None
    return weight_name, bias_name
