"""What stands in the place of a parameter in a call: a parameter, a view of one, or a tensor computed from parameters.

By the chain rule a tensor ``w = f(parameters)`` may stand for a parameter: each sample's gradient at ``w`` pulls back
through ``f`` to that sample's gradients at the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """A view of a contiguous parameter, as ``torch.as_strided`` describes it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another contiguous tensor of the parameter's shape."""
        return whole.as_strided(self.size, self.stride, self.offset)

    def bounds(self) -> tuple[int, int]:
        """First and last element."""
        return self.offset, self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))


class Operand(NamedTuple):
    """A tracked parameter, a region of it, or (``name`` empty) the tensor computed at one place of the forward pass."""

    name: str
    region: Region | None = None
    computed: int | None = None


class Operands:
    """Finds the operands among the tensors of one forward pass."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names  # id of each tracked parameter
        self._computed: dict[int, int] = {}  # id of a tensor to its place in:
        self.computed: list[Tensor] = []
        self._versions: list[int] = []

    def find(self, value: Any) -> Operand | None:
        """The operand that a value is, if it is one."""
        name = self._names.get(id(value))
        if name is not None:
            return Operand(name)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        place = self._computed.get(id(value))
        if place is not None:
            return Operand("", None, place)
        return None if value._base is None else self._region(value)

    def among(self, args: Iterable[Any]) -> bool:
        """Whether there is an operand among the arguments, or in a list among them."""
        return any(self.find(value) is not None for value in _tensors(args))

    def compute(self, args: Iterable[Any], result: Any) -> bool:
        """Note the result of a function of operands alone; whether it is one."""
        operands = False
        for value in args:
            if isinstance(value, Tensor):
                if self.find(value) is not None:
                    operands = True
                elif value.requires_grad:
                    return False
            elif isinstance(value, (list, tuple)) and value:
                inner = list(_tensors(value))
                if any(v.requires_grad and self.find(v) is None for v in inner):
                    return False
                operands = operands or any(self.find(v) is not None for v in inner)
        if not operands:
            return False
        for tensor in _tensors([result]):
            if tensor.requires_grad and self._region(tensor) is None:
                self._computed[id(tensor)] = len(self.computed)
                self.computed.append(tensor)
                self._versions.append(tensor._version)
        return True

    def changed(self, place: int) -> bool:
        """Whether a computed tensor was changed in place since."""
        return self.computed[place]._version != self._versions[place]

    def _region(self, value: Tensor) -> Operand | None:
        base = value._base
        name = None if base is None else self._names.get(id(base))
        if base is None or name is None or not base.is_contiguous() or value.dtype != base.dtype:
            return None
        region = Region(tuple(value.shape), value.stride(), int(value.storage_offset() - base.storage_offset()))
        return Operand(name, region) if _injective(region) else None


def disjoint(a: Region | None, b: Region | None) -> bool:
    """Whether two regions of a parameter are known to share no element; None is the whole."""
    if a is None or b is None:
        return False
    (first_a, last_a), (first_b, last_b) = a.bounds(), b.bounds()
    return last_a < first_b or last_b < first_a or _columns_apart(a, b)


def _columns_apart(a: Region, b: Region) -> bool:
    """Blocks of columns of the same rows."""
    if len(a.size) != len(b.size) or a.stride != b.stride or not a.stride or a.stride[-1] != 1:
        return False
    period = min((s for n, s in zip(a.size[:-1], a.stride[:-1], strict=True) if n > 1), default=0)
    start_a, start_b = (a.offset % period, b.offset % period) if period else (0, 0)
    end_a, end_b = start_a + a.size[-1], start_b + b.size[-1]
    return period > 0 and max(end_a, end_b) <= period and (end_a <= start_b or end_b <= start_a)


def _injective(region: Region) -> bool:
    """Whether no element appears twice (as in an expanded tensor)."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(region.size, region.stride, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
