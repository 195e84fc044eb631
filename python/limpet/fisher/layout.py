"""Which rows of a tensor belong to which sample: the layouts tried, the evidence that strikes them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples lie along ``dim``: alone, or flattened with ``places`` rows each, batch-major or time-major."""

    dim: int
    places: int = 1
    time_major: bool = False

    def fits(self, lead: Sequence[int], samples: int) -> bool:
        """Whether leading dimensions of these sizes can hold ``samples`` in this layout."""
        return self.dim < len(lead) and lead[self.dim] == samples * self.places

    def split(self, rows: Tensor, samples: int) -> Tensor:  # [*lead, *features] -> [N, *, *features]
        """A view with the samples in front."""
        if self.places == 1:
            return rows if self.dim == 0 else rows.movedim(self.dim, 0)
        if self.time_major:
            return rows.unflatten(self.dim, (self.places, samples)).movedim(self.dim + 1, 0)
        return rows.unflatten(self.dim, (samples, self.places)).movedim(self.dim, 0)


def candidates(lead: Sequence[int], samples: int) -> list[Layout]:
    """Every layout that leading dimensions of these sizes allow."""
    found = []
    for dim, size in enumerate(lead):
        if size == samples:
            found.append(Layout(dim))
        elif size > 0 and size % samples == 0:
            found += [Layout(dim, size // samples, time_major) for time_major in (False, True)]
    return found


Evidence = Sequence[tuple[Sequence[int], Tensor]]  # (samples, bool [*lead]: the rows that they were seen to touch)


def established(lead: Sequence[int], samples: int, evidence: Evidence) -> Layout | None:
    """The one layout in which each sample touches its own rows alone.

    None if that holds for several layouts or for none, or if no row was touched.
    """
    left = remaining(lead, samples, evidence)
    return left[0] if len(left) == 1 and any(bool(touched.any()) for _, touched in evidence) else None


def remaining(lead: Sequence[int], samples: int, evidence: Evidence) -> list[Layout]:
    """The layouts that the evidence leaves."""
    seen = [(some, touched) for some, touched in evidence if bool(touched.any())]
    return [
        layout
        for layout in candidates(lead, samples)
        if all(_explains(layout, samples, some, touched) for some, touched in seen)
    ]


def _explains(layout: Layout, samples: int, some: Sequence[int], touched: Tensor) -> bool:
    by_sample = layout.split(touched, samples).reshape(samples, -1).any(dim=1)  # [N]
    return not any(flag for n, flag in enumerate(by_sample.tolist()) if n not in some)


def rows_changed(before: Tensor, after: Tensor, lead: int) -> Tensor:  # [*lead, *features] twice -> bool [*lead]
    """The rows that differ by more than rounding: other kernels may be chosen, so the last bits may vary."""
    if before.is_floating_point():
        magnitude = before.abs().amax() if before.numel() else before.new_zeros(())
        different = (after - before).abs() > rounding(before.dtype) * magnitude
    else:
        different = after != before
    return any_feature(different, lead)


def any_feature(flags: Tensor, lead: int) -> Tensor:  # bool [*lead, *features] -> bool [*lead]
    """Whether any feature of a row is set."""
    return flags.flatten(lead).any(dim=-1) if flags.dim() > lead else flags


def rounding(dtype: torch.dtype) -> float:
    """The relative difference between two runs on the same shapes that counts as rounding.

    Epsilon to the 2/3: 2.4e-5 in float32, 3.7e-11 in float64, 0.04 in bfloat16.
    """
    return float(torch.finfo(dtype).eps) ** (2 / 3)
