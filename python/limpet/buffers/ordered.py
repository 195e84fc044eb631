"""Buffers that give their items oldest first, whichever slots they lie in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from limpet.buffers.base import Buffer


class OrderedBuffer(Buffer):
    """A buffer whose items, samples and iteration do not show in which slots its rows lie."""

    @abstractmethod
    def _slots_of(self, places: Tensor) -> Tensor:  # int64 [count] -> int64 [count]
        """Where items lie, by their places among those held, from the oldest on."""

    def _order(self) -> Tensor:  # int64 [len]
        """The slots of all items."""
        return self._slots_of(torch.arange(len(self), device=self._seen.device))

    def __iter__(self) -> Iterator[Any]:
        """The items held, oldest first, as rows of the structure that was added."""
        for slot in self._order().tolist():
            yield self._structured([field[slot] for field in self._fields])

    def _drawn(self, count: int) -> Tensor:  # int64 [count]
        return self._slots_of(super()._drawn(count))
