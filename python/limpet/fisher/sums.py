"""Running sums of squared per-sample gradients, one tensor per parameter."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, Sequence, ValuesView
from itertools import islice
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from limpet.fisher import reading
from limpet.ops._fisher_launch import surely_finite
from limpet.reference import wide

_FLUSH = 256  # batches summed before they go to the totals, so that rounding grows with 256 + batches / 256
_CHECK = 8  # batches between two looks for NaN and infinity in every sum
_SMALL = 1 << 16  # the size of sums that may be looked at after every batch
_FEW = 2  # of them are: the first layers' are reached by what goes wrong in any layer behind


class _Look(NamedTuple):
    """Of some sums, the largest elements; NaN if there is any."""

    names: list[str]
    first: int  # the first batch not looked at before
    last: int
    largest: tuple[Tensor, ...]  # of one element each


class Running(dict[str, Tensor]):
    """Sums by name, and whether any was taken out (to be added to) since :attr:`touched` was last set to False."""

    touched = False

    def __getitem__(self, name: str) -> Tensor:
        self.touched = True
        return super().__getitem__(name)

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """As a dict's."""
        self.touched = True
        return super().values()

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        """As a dict's."""
        self.touched = True
        return super().items()


class Sums:
    """``sum_n g_n^2`` per parameter, in float32 (float64 for float64 parameters).

    Attributes:
        running: what is added to; the sums of up to 256 batches. Whoever adds takes the tensor from here each time.
        totals: the sums of the batches before those.
        batches: how many there were.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        zeros = ((name, torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device)) for name, p in params.items())
        self.running = Running(zeros)
        self.totals: dict[str, Tensor] = {}
        self.batches = self._checked = 0
        self._looks: list[_Look] = []  # not yet read
        self._late = reading.waits(next(iter(params.values())).device)  # whether they are read with the next loss
        self._filled = [name for name, total in self.running.items() if total.numel()]
        self._small = [name for name in self._filled if self.running[name].numel() <= _SMALL][:_FEW]

    def end_batch(self) -> None:
        """Look for NaN and infinity, and keep the running sums small."""
        self._read()
        self.batches += 1
        if not all(surely_finite(self.running[name]) for name in self._small):
            self._look(self._small, self.batches - 1)
        if self.batches % _CHECK == 1:
            self._look(self._filled, self._checked)
        if not self._late:
            self._read()
        if self.batches % _FLUSH == 0:
            self.check()  # what has gone to the totals is not looked at again
            self._flush()

    def check(self) -> None:
        """Look at every sum, unless that was done after the last batch."""
        self._read()
        if self._checked < self.batches:
            self._look(self._filled, self._checked)
            self._read()

    def flags(self) -> list[Tensor]:
        """The largest elements of the sums that are to be looked at."""
        return [largest for look in self._looks for largest in look.largest]

    def heed(self, flags: Sequence[float]) -> None:
        """Raise if one of them is not finite, at every use from now on."""
        values = iter(flags)
        for look in self._looks:
            largest = [*islice(values, len(look.names))]
            if not all(map(isfinite, largest)):
                name = next(name for name, value in zip(look.names, largest, strict=True) if not isfinite(value))
                where = (
                    f"batch {look.last}"
                    if look.first >= look.last
                    else f"one of the batches {look.first} to {look.last}"
                )
                raise RuntimeError(f"the squared gradient of {name!r} is not finite in {where}")
            if look.names is self._filled:
                self._checked = look.last + 1
        self._looks.clear()

    def copies(self) -> dict[str, Tensor]:
        """The sums over all batches, checked; nothing changes."""
        self.check()
        if not self.totals:
            return {name: total.clone() for name, total in self.running.items()}
        return {name: total + self.running[name] for name, total in self.totals.items()}

    def take(self) -> dict[str, Tensor]:
        """The sums over all batches, checked, without a copy: there is nothing left to add to."""
        self.check()
        if self.totals:
            self._flush()
        taken, self.running, self.totals = self.totals or self.running, Running(), {}
        return taken

    def add(self, sums: Mapping[str, Tensor], batches: int) -> None:
        """Add the sums over other batches, which were checked."""
        self.check()
        self._flush()
        for name, total in self.totals.items():
            total.add_(sums[name].to(total.device))
        self.batches += batches
        self._checked = self.batches

    def load(self, running: Mapping[str, Tensor], totals: Mapping[str, Tensor], batches: int) -> None:
        """Become what other sums were."""
        for name, total in self.running.items():
            total.copy_(running[name])
        self.totals = {name: torch.empty_like(self.running[name]).copy_(total) for name, total in totals.items()}
        self.batches = self._checked = batches
        self._looks.clear()

    def _flush(self) -> None:
        if not self.totals:
            self.totals = {name: total.clone() for name, total in self.running.items()}
        else:
            torch._foreach_add_(list(self.totals.values()), list(self.running.values()))
        torch._foreach_zero_(list(self.running.values()))

    def _look(self, names: list[str], first: int) -> None:
        """Look at these running sums; ``first`` is the first batch that was not looked at before."""
        if names:
            largest = torch._foreach_max([self.running[name] for name in names])
            self._looks.append(_Look(names, first, self.batches - 1, largest))

    def _read(self) -> None:
        if self._looks:
            self.heed(reading.read(self.flags()))
