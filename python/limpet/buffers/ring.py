"""The latest items of a stream."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from limpet import _checks, _core
from limpet.buffers.ordered import OrderedBuffer


class RingBuffer(OrderedBuffer):
    """A buffer of the latest items (a deque of rows): the newest takes the place of the oldest.

    For streams whose past is to be forgotten, and for transitions (state, action, reward, next state, done). Nothing
    is random but the samples, which are uniform among the items held.

    Rings of several streams are not merged, over ranks or otherwise: an item's number says how late it came in its own
    stream, and nothing says which of two streams' items are the later ones.

    >>> buffer = RingBuffer(3)
    >>> for step in range(5):
    ...     buffer.add({"state": torch.full((1, 2), float(step)), "action": torch.tensor([step])})
    >>> [int(item["action"]) for item in buffer]
    [2, 3, 4]
    """

    _KIND = "ring"
    _NOTES: ClassVar[dict[str, torch.dtype]] = {}  # which item lies where follows from the number seen

    _FULL = False  # it may have grown since it let items go

    def __len__(self) -> int:
        return min(self._count - self._lost, self.capacity)

    @property
    def items(self) -> Tensor:  # int64 [len]
        """The numbers of the items held, oldest first, counted from 0 in the order in which they came."""
        return torch.arange(self.seen - len(self), self.seen, device=self._seen.device)

    def add(self, batch: Any) -> None:  # tensors [count, *]
        """Let the buffer see the next items of the stream.

        Raises:
            TypeError: the batch holds something else than tensors, or a dtype differs from the first batch's.
            ValueError: its structure or the shape of its rows differs from the first batch's, its tensors have not as
                many rows, or (for the first batch) there is not enough memory. Nothing has changed then.
        """
        structure = self._structure or self._begin(batch)
        rows = batch if structure.direct else structure.fields(batch)
        plain = None if self._folder is not None else self._core_rows()
        count = -1 if plain is None else plain.count(rows)
        if count < 0:
            rows, plain = self._checked(batch), None
            count = rows[0].shape[0]
        new = min(count, self.capacity)  # of a larger batch only its end
        begin = count - new
        slot = self._slot_of(self._count + begin)
        ahead = min(new, self.capacity - slot)  # rows until the end of the ring
        if plain is None and self._by_rows():
            places = torch.arange(begin, count, device="cpu").roll(new - ahead)  # so that the slots ascend
            slots = torch.cat([torch.arange(new - ahead, device="cpu"), torch.arange(slot, slot + ahead, device="cpu")])
            self._write(slots, self._picked(rows, places), count)
            return
        self._put(plain, rows, begin, ahead, slot)
        if ahead < new:
            self._put(plain, rows, begin + ahead, new - ahead, 0)
        self._count += count

    def resize(self, capacity: int) -> None:
        """Change the capacity; a smaller ring keeps the newest items.

        Raises:
            TypeError: ``capacity`` is no integer.
            ValueError: it is below 1. Nothing has changed then.
        """
        capacity = _checks.integer("capacity", capacity, minimum=1)
        self._keep(self._order()[-capacity:], capacity)

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs: numbers, text, and tensors of what is held (copies)."""
        order = self._order()
        return super().state_dict() | {"fields": [field[order] for field in self._fields]}

    def _slot_of(self, item: int) -> int:
        """Where the item of a number lies."""
        return (item - self._lost) % self.capacity

    def _slots_of(self, places: Tensor) -> Tensor:  # int64 [count] -> int64 [count]
        oldest = self._slot_of(self._count - len(self))
        return (places + oldest) % self.capacity if oldest else places

    def _put(self, plain: _core.PlainRows | None, rows: Any, begin: int, count: int, slot: int) -> None:
        """Copy rows of a batch, from ``begin`` on, into the slots from ``slot`` on."""
        if plain is not None:
            plain.put(rows, begin, count, slot, torch.get_num_threads())
            return
        for field, new in zip(self._fields, rows, strict=True):
            field[slot : slot + count] = new.detach()[begin : begin + count].to(field.device)
