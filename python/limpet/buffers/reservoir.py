"""A uniform sample of everything seen, of fixed size, on the device where the training is."""

from __future__ import annotations

from typing import Any

import torch

from limpet import _checks, ops
from limpet.buffers.base import Buffer
from limpet.ops.reservoir import insert_unchecked_


class ReservoirBuffer(Buffer):
    r"""A buffer in which each of the items seen so far is with the same probability (reservoir sampling).

    Item :math:`t` (from 0) goes to a free slot while there is one, and then to slot
    :math:`u \sim \mathrm{U}\{0, \dots, t\}` if :math:`u < \text{capacity}` (Vitter 1985, algorithm R). Every draw
    depends on the seed and the item's number alone: the same stream leaves the same buffer however it is cut into
    batches, on every device, with any number of threads, and when it is resumed from a saved state.

    A batch is a tensor, or a tuple, list, dict or other pytree of tensors that have as many rows; the first one fixes
    the structure, the dtypes and the shapes of rows. Rows of any dtype and shape are copied once, and only those of
    accepted items; the batch itself is not kept.

    Args:
        capacity: how many items are kept, at least 1.
        seed: of all draws, in [0, 2^63).
        device: where the items lie; where the first batch does for ``None``.

    Attributes:
        capacity: as given.
        seed: as given.
        seen: items seen so far.

    Raises:
        TypeError: ``capacity`` or ``seed`` is no integer.
        ValueError: one of them is out of range.

    >>> buffer = ReservoirBuffer(100, seed=0)
    >>> for _ in range(10):
    ...     buffer.add((torch.randn(64, 8), torch.randint(10, (64,))))
    >>> len(buffer), buffer.seen
    (100, 640)
    >>> x, y = buffer.sample(32)
    >>> x.shape, y.shape
    (torch.Size([32, 8]), torch.Size([32]))
    """

    _KIND = "reservoir"

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, batch: Any) -> None:  # tensors [count, *]
        """Let the buffer see the next items of the stream.

        Raises:
            TypeError: the batch holds something else than tensors, or a dtype differs from the first batch's.
            ValueError: its structure or the shape of its rows differs from the first batch's, its tensors have not as
                many rows, or (for the first batch) there is not enough memory. Nothing has changed then.
        """
        if self._structure is None:
            self._begin(batch)
        fields = self._like_first(batch)
        if fields[0].shape[0]:
            insert_unchecked_(self._fields, self._items, self._seen, fields, self.seed)
            self._count += fields[0].shape[0]

    def resize(self, capacity: int) -> None:
        """Change the capacity without bias: a smaller reservoir keeps a uniform choice of what it holds.

        Raises:
            TypeError: ``capacity`` is no integer.
            ValueError: it is below 1, or larger than now when items have been passed over: no choice among those held
                is a uniform sample of so many. Nothing has changed then.
        """
        capacity = _checks.integer("capacity", capacity, minimum=1)
        if capacity > self.capacity < self.seen:
            raise ValueError(
                f"capacity must be at most {self.capacity}: {self.seen - self.capacity} items have been passed over, "
                f"and a larger sample would hold too few of them, got {capacity}"
            )
        if self._structure is not None:
            held = len(self)
            if capacity < held:
                self._keep(self._drawn(capacity), capacity)
            else:
                self._keep(torch.arange(held, device=self._items.device), capacity)
        self.capacity = capacity

    def merge(self, other: ReservoirBuffer) -> None:
        """Become a uniform sample of both streams together, as if ``other``'s items had come after this one's.

        How many rows each gives is drawn from the hypergeometric distribution: a share rounded from the streams'
        lengths would be biased. ``other`` does not change.

        Raises:
            TypeError: ``other`` is no :class:`ReservoirBuffer`.
            ValueError: it is this buffer itself, its items have another structure, dtype or shape, or it passed over
                items and holds fewer than this buffer's capacity. Nothing has changed then.
        """
        if not isinstance(other, ReservoirBuffer):
            raise TypeError(f"other must be a ReservoirBuffer, got {_checks.describe(other)}")
        if other is self:
            raise ValueError("other must be another buffer: this one's items would count twice")
        if other.seen == 0:
            return
        if other.capacity < min(self.capacity, other.seen):
            raise ValueError(
                f"other must hold {min(self.capacity, other.seen)} items to be merged into {self.capacity} slots, "
                f"got a capacity of {other.capacity}"
            )
        theirs = other._structured([field[: len(other)] for field in other._fields])
        if self._structure is None:
            self._begin(theirs)
        fields, device = self._like_first(theirs), self._items.device
        first, second = self.seen, other.seen
        held = min(self.capacity, first + second)
        # Of so many places in the two streams together, those in the first: a hypergeometric draw.
        places = ops.sample_without_replacement(first + second, held, seed=self.seed, draw=self._next_draw())
        from_first = int((places < first).sum())
        mine = self._choice(len(self), from_first, device)
        others = self._choice(len(other), held - from_first, device)
        rows = [torch.cat([field[mine], new[others]]) for field, new in zip(self._fields, fields, strict=True)]
        items = torch.cat([self._items[mine], other._items.to(device)[others] + first])
        for field, new in zip(self._fields, rows, strict=True):
            field[:held] = new
        self._items[:held] = items
        self._set_seen(first + second)
