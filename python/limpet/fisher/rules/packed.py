"""Packed sequences: which of their rows are which sample's.

``pack_padded_sequence`` sorts the samples by length, and tells a recurrent layer's function nothing of it. So the order
is followed from the sort to the packed sequence. It is not relied on: rows brought to the wrong sample are found like
those of any other call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Packing(NamedTuple):
    order: Tensor | None  # int64 [N]: the sample at each place of a step; None: as in the batch
    steps: int  # of the padded input, whatever the lengths


_orders = WeakTensorKeyDictionary()  # of sorted lengths
_packings = WeakTensorKeyDictionary()  # of the sizes of a packed sequence's steps


class Padding:
    """Packed rows ``[R, *]`` as padded ones ``[T, N, *]``, samples in the batch's order.

    Attributes:
        running: bool ``[T, N, 1]``: where there are rows.
        reverse: int64 ``[T, N, 1]``: the step that stands at each step when each sample's own are reversed.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:  # int64 [T'], on the CPU
        order, self._steps = _packings.get(batch_sizes, _Packing(None, len(batch_sizes)))
        self._samples = int(batch_sizes[0])
        self._order = torch.arange(self._samples) if order is None else order.cpu()
        starts = self._samples * torch.arange(len(batch_sizes))
        at = (starts[:, None] + self._order)[torch.arange(self._samples) < batch_sizes[:, None]]  # [R]
        running = torch.zeros(self._steps * self._samples, dtype=torch.bool)
        running[at] = True
        running = running.view(self._steps, self._samples, 1)
        step, count = torch.arange(self._steps)[:, None, None], running.sum(dim=0)
        reverse = torch.where(running, count - 1 - step, step)
        self._at, self._order = at.to(device), self._order.to(device)
        self.running, self.reverse = running.to(device), reverse.to(device)

    def pad(self, rows: Tensor) -> Tensor:  # [R, *] -> [T, N, *]
        """Zeros where there are no rows."""
        padded = rows.new_zeros(self._steps * self._samples, *rows.shape[1:])
        return padded.index_copy(0, self._at, rows).unflatten(0, (self._steps, self._samples))

    def pack(self, padded: Tensor) -> Tensor:  # [T, N, *] -> [R, *]
        """Take the rows out again."""
        return padded.flatten(0, 1).index_select(0, self._at)

    def to_batch(self, states: Tensor) -> Tensor:  # [L, N, H], as packed
        """Bring states to the batch's order."""
        return states.index_select(1, self._order.argsort())

    def from_batch(self, states: Tensor) -> Tensor:  # [L, N, H]
        """Bring states to the packed sequence's order."""
        return states.index_select(1, self._order)


def _sorted(args: tuple[Any, ...], result: Any) -> None:
    values, order = result
    if values.dim() == 1:
        _orders[values] = order


def _packed(args: tuple[Any, ...], result: Any) -> None:
    input, lengths, batch_first = args
    _packings[result[1]] = _Packing(_orders.get(lengths), input.shape[1 if batch_first else 0])


# What is noted of a function's result, when it has run.
FOLLOWED: dict[object, Callable[[tuple[Any, ...], Any], None]] = {
    torch.sort: _sorted,
    Tensor.sort: _sorted,
    torch._pack_padded_sequence: _packed,
}
