"""Several quadratics around anchors over the same parameter, collapsed exactly into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limpet.methods import shards
from limpet.reference import wide


class Quadratic(NamedTuple):
    """The penalty ``strength / 2 * sum F (theta - anchor)^2`` of one parameter."""

    anchor: Tensor  # [*]
    importance: Tensor  # [*]
    strength: float


@dataclass
class _Merged:
    """A quadratic computed from several, and what it was computed from."""

    parts: list[Quadratic]
    versions: list[object]
    result: Quadratic
    constant: float | None = None


class Collapse:
    """Sums of quadratics by parameter, each kept until a part of it changes."""

    def __init__(self) -> None:
        self._merged: dict[Tensor, _Merged] = {}

    def sums(self, found: Mapping[Tensor, list[Quadratic]], *, alike: bool = False) -> dict[Tensor, Quadratic]:
        """One quadratic for each parameter: its only one as it came, or the sum of several, with a strength of 1.

        Args:
            found: the quadratics of each parameter.
            alike: have an only one computed into a strength of 1 as well, so that one call takes all parameters.
        """
        several = {param for param, parts in found.items() if alike or len(parts) > 1}
        self._merged = {param: merged for param, merged in self._merged.items() if param in several}
        return {param: self._sum(param, parts) if param in several else parts[0] for param, parts in found.items()}

    def constant(self) -> float:
        """What the sums now held leave out: ``sum_k s_k F_k (a_k - anchor)^2`` over all elements, to be halved."""
        total = 0.0
        for merged in self._merged.values():
            if merged.constant is None:  # only where somebody asks: it waits for the device
                anchor = merged.result.anchor.double()
                terms = (
                    part.strength * (part.importance * (part.anchor.double() - anchor).square_()).sum()
                    for part in merged.parts
                )
                merged.constant = float(shards.reduced(torch.stack(list(terms)).sum()))
            total += merged.constant
        return total

    def _sum(self, param: Tensor, parts: list[Quadratic]) -> Quadratic:
        """``sum s F`` and the anchor ``sum s F a / sum s F``: the same gradient. Computed again when a part changed."""
        versions = [_version(tensor) for part in parts for tensor in part[:2]]
        known = self._merged.get(param)
        if known is None or known.versions != versions or not _same(known.parts, parts):
            dtype = wide(param.dtype)
            weights = [part.strength * part.importance.double() for part in parts]
            total = torch.stack(weights).sum(0)
            first = parts[0].anchor.double()
            # From the first anchor on, so that equal anchors stay what they are and unimportant ones are defined.
            offset = sum(w * (part.anchor.double() - first) for w, part in zip(weights, parts, strict=True))
            anchor = first + torch.where(total == 0, 0.0, offset / total)
            merged = [torch.empty_like(param, dtype=dtype).copy_(tensor) for tensor in (anchor, total)]
            known = self._merged[param] = _Merged(parts, versions, Quadratic(merged[0], merged[1], 1.0))
        return known.result


def _same(old: Sequence[Quadratic], new: Sequence[Quadratic]) -> bool:
    """Whether the same tensors enter with the same strengths."""
    return len(old) == len(new) and all(
        a.anchor is b.anchor and a.importance is b.importance and a.strength == b.strength
        for a, b in zip(old, new, strict=True)
    )


def _version(tensor: Tensor) -> object:
    """What differs once the tensor has been changed in place; always, for inference tensors, which do not count."""
    return object() if tensor.is_inference() else tensor._version
