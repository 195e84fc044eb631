"""A uniform sample of everything seen, of fixed size, on the device where the training is."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from limpet import _checks, _core, ops
from limpet.buffers import ranks
from limpet.buffers.base import Buffer
from limpet.buffers.stored import last_writers
from limpet.ops.reservoir import insert_dispatched_


class ReservoirBuffer(Buffer):
    r"""A buffer in which each of the items seen so far is with the same probability (reservoir sampling).

    Item :math:`t` (from 0) goes to a free slot while there is one, and then to slot
    :math:`u \sim \mathrm{U}\{0, \dots, t\}` if :math:`u < \text{capacity}` (Vitter 1985, algorithm R). Every draw
    depends on the seed and the item's number alone: the same stream leaves the same buffer however it is cut into
    batches, on every device, with any number of threads, and when it is resumed from a saved state.

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

    def add(self, batch: Any) -> None:  # tensors [count, *]
        """Let the buffer see the next items of the stream.

        Raises:
            TypeError: the batch holds something else than tensors, or a dtype differs from the first batch's.
            ValueError: its structure or the shape of its rows differs from the first batch's, its tensors have not as
                many rows, or (for the first batch) there is not enough memory. Nothing has changed then.
        """
        if self._structure is None:
            self._begin(batch)
        elif self._folder is None and (plain := self._core_rows()) is not None:
            rows = batch if self._structure.direct else self._structure.fields(batch)
            count = plain.insert(rows, self._items, self._seen, self.seed, torch.get_num_threads())
            if count >= 0:
                self._count += count
                return
        fields = self._checked(batch)
        count = fields[0].shape[0]
        if not count:
            return
        if self._by_rows():
            slots, places = last_writers(ops.reservoir_slots(self.seen, count, self.capacity, self.seed, device="cpu"))
            self._write(slots, [places + self.seen, *self._picked(fields, places)], count)
            return
        insert_dispatched_(self._fields, self._items, self._seen, self._moved(fields), self.seed)
        self._count += count

    def _rows_of(self, plain: _core.PlainRows, count: int) -> Any:
        return plain.sampled(len(self), count, self.seed, self._next_draw(), torch.get_num_threads())

    def _mixed(self, plain: _core.PlainRows, new: Any, fraction: float) -> Any:
        held = min(self._count, self.capacity)
        mixed = plain.mixed(new, fraction, held, self.seed, self._draws, torch.get_num_threads())
        if mixed is not None:
            self._next_draw()
        return mixed

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
        held = len(self)
        kept = self._drawn(capacity) if capacity < held else torch.arange(held, device=self._items.device)
        self._keep(kept, capacity)

    def merge(self, other: ReservoirBuffer) -> None:
        """Become a uniform sample of both streams together, as if ``other``'s items had come after this one's.

        How many rows each gives is drawn from the hypergeometric distribution: a share rounded from the streams'
        lengths would be biased. ``other`` does not change.

        Raises:
            TypeError: ``other`` is no :class:`ReservoirBuffer`.
            ValueError: it is this buffer itself, its items have another structure, dtype or shape, it passed over
                items and holds fewer than this buffer's capacity, or both passed over items by the same seed's draws.
                Nothing has changed then.
        """
        if not isinstance(other, ReservoirBuffer):
            raise TypeError(f"other must be a ReservoirBuffer, got {_checks.describe(other)}")
        if other is self:
            raise ValueError("other must be another buffer: this one's items would count twice")
        if other.seen == 0:
            return
        if self.seed == other.seed and self.seen > self.capacity and other.seen > other.capacity:
            raise ValueError(
                f"other must have another seed than {self.seed}: with the same draws both passed over the same items"
            )
        fields, device = self._rows_to_merge(other), self._items.device
        mine, others = ranks.shares([self.seen, other.seen], self.capacity, self.seed, self._next_draw())
        parts = [
            ([*self._notes(), *self._fields], self._choice(len(self), mine, device)),
            ([other.items.to(device) + self.seen, *fields], self._choice(len(other), others, device)),
        ]
        self._replace(self.capacity, self.seen + other.seen, parts)

    def merge_ranks(self, group: distributed.ProcessGroup | None = None) -> None:
        """Become, on every process of a group, the same uniform sample of the streams of all of them together.

        All call it, with buffers of one capacity and of different seeds, as if their streams had come one after the
        other in the order of the ranks. How many rows each gives is drawn from the multivariate hypergeometric
        distribution, and no others are sent. Seeds stay as they are: afterwards the processes sample differently.

        Do it once, at the end: buffers merged twice would count their items twice.

        Args:
            group: the processes; all of them for ``None``. Its backend must take the buffers' device.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            TypeError: ``group`` is no process group.
            ValueError: structures, dtypes, shapes or capacities differ, or two processes passed over items by the same
                seed's draws. It is raised on all of them, and nothing has changed then.
        """
        ranks.merge(self, group, ranks.uniform_parts)
