"""Running sums of squared per-sample gradients, one tensor per parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from limpet.reference import wide

_FLUSH = 256  # batches summed before they go to the totals, so that rounding grows with 256 + batches / 256
_CHECK = 8  # batches between two checks for NaN and infinity, each of which reads every sum


class Sums:
    """``sum_n g_n^2`` per parameter, in float32 (float64 for float64 parameters)."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.running = {name: torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device) for name, p in params.items()}
        self._totals: dict[str, Tensor] | None = None
        self._batches = self._checked = 0

    def end_batch(self) -> None:
        """Check for NaN and infinity now and then, and keep the running sums small."""
        self._batches += 1
        if self._batches % _CHECK == 1:
            self._check()
        if self._batches % _FLUSH == 0:
            self._flush()

    def mean(self, samples: int) -> dict[str, Tensor]:
        """The sums over ``samples``, checked."""
        if self._checked < self._batches:
            self._check()
        if self._totals is not None:
            self._flush()
            self.running, self._totals = self._totals, None
        for total in self.running.values():
            total.div_(samples)
        return self.running

    def _flush(self) -> None:
        if self._totals is None:
            self._totals = {name: total.clone() for name, total in self.running.items()}
        else:
            torch._foreach_add_(list(self._totals.values()), list(self.running.values()))
        torch._foreach_zero_(list(self.running.values()))

    def _check(self) -> None:
        filled = [(name, total.amax()) for name, total in self.running.items() if total.numel()]
        largest = torch.stack([value.double() for _, value in filled]) if filled else torch.zeros(())
        if not torch.isfinite(largest).all():
            name = next(name for name, value in filled if not torch.isfinite(value))
            first, last = self._checked, self._batches - 1
            where = f"batch {last}" if first >= last else f"one of the batches {first} to {last}"
            raise RuntimeError(f"the squared gradient of {name!r} is not finite in {where}")
        self._checked = self._batches
