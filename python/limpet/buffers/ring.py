"""The latest items of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from limpet import _checks, _core
from limpet.buffers.ordered import OrderedBuffer


class RingBuffer(OrderedBuffer):
    """A buffer of the latest items (a deque of rows): the newest takes the place of the oldest.

    For streams whose past is to be forgotten, and for transitions (state, action, reward, next state, done). Nothing
    is random but the samples, which are uniform among the items held.

    A batch is a tensor, or a tuple, list, dict or other pytree of tensors that have as many rows; the first one fixes
    the structure, the dtypes and the shapes of rows.

    Args:
        capacity: how many items are kept, at least 1.
        seed: of the samples, in [0, 2^63).
        device: where the items lie; where the first batch does for ``None``.

    Attributes:
        capacity: as given.
        seed: as given.
        seen: items seen so far.

    Raises:
        TypeError: ``capacity`` or ``seed`` is no integer.
        ValueError: one of them is out of range.

    >>> buffer = RingBuffer(3)
    >>> for step in range(5):
    ...     buffer.add({"state": torch.full((1, 2), float(step)), "action": torch.tensor([step])})
    >>> [int(item["action"]) for item in buffer]
    [2, 3, 4]
    """

    _KIND = "ring"
    _NOTES: ClassVar[dict[str, torch.dtype]] = {}  # which item lies where follows from the number seen

    _FULL = False  # it may have grown since it let items go

    _held: int = 0
    _oldest: int = 0  # its slot

    def __init__(self, capacity: int, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__(capacity, seed=seed, device=device)

    def __len__(self) -> int:
        return self._held

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
        rows, plain = structure.for_core(batch), self._core_rows()
        count = -1 if plain is None else plain.count(rows)
        if count < 0:
            rows, plain = self._like_first(batch), None
            count = rows[0].shape[0]
        held = self._held
        new = min(count, self.capacity)  # of a larger batch only its end
        first = (self._oldest + held + count - new) % self.capacity
        ahead = min(new, self.capacity - first)  # rows until the end of the ring
        self._put(plain, rows, count - new, ahead, first)
        if ahead < new:
            self._put(plain, rows, count - new + ahead, new - ahead, 0)
        self._oldest = (self._oldest + max(0, held + count - self.capacity)) % self.capacity
        self._held = min(self.capacity, held + count)
        self._count += count

    def _put(self, plain: _core.PlainRows | None, rows: Any, begin: int, count: int, slot: int) -> None:
        """Copy rows of a batch, from ``begin`` on, into the slots from ``slot`` on."""
        if plain is not None:
            plain.put(rows, begin, count, slot, torch.get_num_threads())
            return
        for field, new in zip(self._fields, rows, strict=True):
            field[slot : slot + count] = new.detach()[begin : begin + count]

    def resize(self, capacity: int) -> None:
        """Change the capacity; a smaller ring keeps the newest items.

        Raises:
            TypeError: ``capacity`` is no integer.
            ValueError: it is below 1. Nothing has changed then.
        """
        capacity = _checks.integer("capacity", capacity, minimum=1)
        if self._structure is not None:
            self._keep(self._order()[-capacity:], capacity)
        self.capacity, self._held, self._oldest = capacity, min(self._held, capacity), 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs: numbers, text, and tensors of what is held (copies)."""
        order = self._order()
        return super().state_dict() | {"fields": [field[order] for field in self._fields]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, onto this buffer's device; then the same stream leaves the same buffer.

        Raises:
            TypeError: a number or a tensor of the state is none.
            ValueError: keys are missing or unknown, or numbers and tensors do not fit each other. Nothing has been
                taken over then.
        """
        super().load_state_dict(state)
        self._held = state["fields"][0].shape[0] if state["fields"] else 0
        self._oldest = 0

    def _slots_of(self, places: Tensor) -> Tensor:  # int64 [count] -> int64 [count]
        return (places + self._oldest) % self.capacity if self._oldest else places
