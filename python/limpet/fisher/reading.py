"""Numbers read from the device: each reading waits for all that was launched before, so they are read together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Look(Protocol):
    """Something that is read when a batch's loss is."""

    def flags(self) -> Sequence[Tensor]:
        """Tensors of one element, still on the device."""

    def heed(self, flags: Sequence[float]) -> None:
        """Take their values; raises what is to be raised."""


def waits(device: torch.device) -> bool:
    """Whether reading a number waits for what was launched before."""
    return device.type != "cpu"


def read(tensors: Sequence[Tensor]) -> list[float]:
    """The values of tensors of one element, in one wait for each device."""
    if len(tensors) == 1 or not any(waits(t.device) for t in tensors):
        return [t.item() for t in tensors]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    values: dict[int, float] = {}
    for device in {t.device for t in tensors}:
        here = [n for n, t in enumerate(tensors) if t.device == device]
        together = torch.cat([tensors[n].to(wide).reshape(1) for n in here])  # of one dtype: one kernel
        values.update(zip(here, together.tolist(), strict=True))
    return [values[n] for n in range(len(tensors))]
