"""Reservoirs that hold equal shares of groups, or weighted items: both keep the items with the smallest keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, distributed

from limpet import _checks, _core, reference
from limpet.buffers import ranks
from limpet.buffers.ordered import OrderedBuffer
from limpet.buffers.stored import last_writers
from limpet.ops import keyed
from limpet.ops.reservoir import below_2_63

if TYPE_CHECKING:
    from typing_extensions import Self


class KeyedBuffer(OrderedBuffer):
    """What is common to them: :func:`limpet.ops.keyed_insert_` says what is held."""

    _NOTES: ClassVar[dict[str, torch.dtype]] = dict.fromkeys(("items", "keys", "groups"), torch.int64)

    _keys: Tensor  # int64 [capacity]
    _groups: Tensor  # int64 [capacity]
    _index: _core.KeyedIndex | None  # follows from the notes; made when it is needed

    @property
    def items(self) -> Tensor:  # int64 [len]
        """The numbers of the items held, oldest first, counted from 0 in the order in which they came."""
        return super().items.sort().values

    def resize(self, capacity: int) -> None:
        """Change the capacity without bias: a smaller buffer is what it would be, had it been so small from the start.

        Raises:
            TypeError: ``capacity`` is no integer.
            ValueError: it is below 1, or larger than now when items have been passed over: a larger buffer would have
                kept some of those. Nothing has changed then.
        """
        capacity = _checks.integer("capacity", capacity, minimum=1)
        if capacity > self.capacity < self.seen:
            raise ValueError(
                f"capacity must be at most {self.capacity}: {self.seen - self.capacity} items have been passed over, "
                f"some of which a larger buffer would have kept, got {capacity}"
            )
        held = [note[: len(self)] for note in self._notes()]
        self._keep(reference.keyed_order(*held)[:capacity], capacity)

    def merge(self, other: Self) -> None:
        """Become what one buffer would hold of both streams together, as if ``other``'s items had come later.

        ``other``'s items keep the keys that they have drawn. So it must have another seed, and so must all buffers
        that are merged into one: item by item, the same seed would have drawn the same keys. ``other`` does not change.

        Raises:
            TypeError: ``other`` is no buffer of this kind.
            ValueError: it has the same seed, its items have another structure, dtype or shape, or it passed over items
                and holds fewer than this buffer's capacity. Nothing has changed then.
        """
        if not isinstance(other, type(self)):
            raise TypeError(f"other must be a {type(self).__name__}, got {_checks.describe(other)}")
        if other.seen == 0:
            return
        if self.seen and (
            other.seed == self.seed or torch.isin(self._keys, other._keys[: len(other)].to(self._seen.device)).any()
        ):
            raise ValueError(
                f"other must have another seed than this buffer and those merged into it, got {other.seed}"
            )
        rows, first, held = self._rows_to_merge(other), self.seen, len(self)
        items, keys, groups = (note[: len(other)].to(self._seen.device) for note in other._notes())
        together = (
            torch.cat([mine[:held], more])
            for mine, more in zip(self._notes(), (items + first, keys, groups), strict=True)
        )
        kept = reference.keyed_order(*together)[: self.capacity]
        parts = [
            ([*self._notes(), *self._fields], kept[kept < held]),
            ([items + first, keys, groups, *rows], kept[kept >= held] - held),
        ]
        self._replace(self.capacity, first + other.seen, parts)

    def merge_ranks(self, group: distributed.ProcessGroup | None = None) -> None:
        """Become, on every process of a group, what one buffer would hold of the streams of all of them together.

        It is called as :meth:`limpet.ReservoirBuffer.merge_ranks` is, but nothing is drawn: the items with the smallest
        keys are held, and no other rows are sent.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            TypeError: ``group`` is no process group.
            ValueError: structures, dtypes, shapes or capacities differ, two processes have the same seed, or they have
                items in common. It is raised on all of them, and nothing has changed then.
        """
        ranks.merge(self, group, ranks.keyed_parts)

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles
        return {**super().__getstate__(), "_index": None}

    def _insert(self, batch: Any, fields: list[Tensor], group: Tensor | None, weight: Tensor | None) -> None:
        """Insert items, whose groups and weights have been checked."""
        if self._structure is None:
            self._begin(batch)
            fields = self._fields_of(batch)
        index, count = self._present_index(), fields[0].shape[0]
        if index is None:
            fields = self._moved(fields)
            group, weight = (None if t is None else t.to(self._device) for t in (group, weight))
            keyed.insert_dispatched_(self._fields, *self._notes(), self._seen, fields, group, weight, self.seed)
            self._count += count
            return
        group, weight = (None if t is None else t.cpu() for t in (group, weight))
        if not self._by_rows():
            fields = self._moved(fields)
            keyed.index_insert_(index, self._fields, self._notes(), self._seen, fields, group, weight, self.seed)
            self._count += count
            return
        self._index = None  # made anew if what follows does not come to its end
        chosen = keyed.index_choose(index, self._count, count, group, weight, self.seed)
        slots, last = last_writers(chosen[1])
        places, _, keys, groups = chosen[:, last]
        self._write(slots, [places + self._count, keys, groups, *self._picked(fields, places)], count)
        self._index = index

    def _present_index(self) -> _core.KeyedIndex | None:
        if self._index is None and keyed.plain(self._items):
            if self._folder is not None:
                self._items[len(self) :] = -1  # a batch that does not count may have filled them
            self._index = keyed.index_of(self._notes())
        return self._index

    def _slots_of(self, places: Tensor) -> Tensor:  # int64 [count] -> int64 [count]
        index = self._present_index()
        if index is None:
            return self._items[: len(self)].argsort()[places]
        return keyed.index_select(index, places)

    def _set_notes(self, notes: list[Tensor]) -> None:
        super()._set_notes(notes)
        self._index = None

    def _fields_of(self, batch: Any) -> list[Tensor]:
        """A batch's fields, before anything of it is taken in."""
        structure = self._structure
        if structure is None:
            return self._first(batch)[1]
        fields = structure.fields(batch)
        if (plain := self._core_rows()) is not None and plain.count(batch if structure.direct else fields) >= 0:
            return fields
        return [field.resolve_conj().resolve_neg() for field in self._checked(batch)]  # what is read is memory


class ClassBalancedReservoir(KeyedBuffer):
    r"""A buffer that holds as many items of each class, whatever the stream's proportions and order.

    Classes need not be known beforehand: with each new one the shares of the others shrink. While a class has had
    fewer items than its share, all of them are held, and the others divide what it leaves: class :math:`c` has
    :math:`\min(n_c, \ell)` of its :math:`n_c` items (one more for some, so that no slot is empty). They are an exactly
    uniform sample of the items seen of that class, which CBRS (Chrysakis and Moens 2020), whose shares are the same,
    only approximates: every item draws a key from the seed and its number, and a class keeps those with the smallest.
    So what is held depends on the items seen alone, not on how the stream is cut into batches, on the device, or on
    where it was resumed.

    With the task as its group it divides the buffer equally among tasks: ``buffer.add(batch, group=task)``.

    >>> buffer = ClassBalancedReservoir(90, seed=0)
    >>> buffer.add((torch.randn(1000, 8), torch.zeros(1000, dtype=torch.int64)))
    >>> buffer.add((torch.randn(70, 8), torch.tensor([3, 5]).repeat_interleave(torch.tensor([10, 60]))))
    >>> buffer.counts()
    {0: 40, 3: 10, 5: 40}
    """

    _KIND = "class-balanced"

    @property
    def groups(self) -> Tensor:  # int64 [len]
        """The class of each item held, oldest item first."""
        return self._groups[self._order()]

    def counts(self) -> dict[int, int]:
        """How many items are held of each class."""
        values, counts = self._groups[: len(self)].unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def add(self, batch: Any, *, group: Tensor | int | None = None) -> None:  # tensors [count, *]; int64 [count]
        """Let the buffer see the next items of the stream.

        Args:
            batch: the items.
            group: the class of each, or of all; for ``None`` it is the one field of ``batch`` that has a single
                integer for each item, such as ``y`` in ``(x, y)``.

        Raises:
            TypeError: the batch holds something else than tensors, or a dtype differs from the first batch's; or
                ``group`` is neither an integer nor a tensor of integers.
            ValueError: its structure or the shape of its rows differs from the first batch's, its tensors have not as
                many rows, or (for the first batch) there is not enough memory; or ``group`` has another shape, or is
                not given and there is no such field, or more than one. Nothing has changed then.
        """
        fields = self._fields_of(batch)
        self._insert(batch, fields, _groups_of(fields, group), None)


class WeightedReservoir(KeyedBuffer):
    r"""A buffer of items drawn by their weights, without replacement, from everything seen so far.

    It is as if items were drawn one after another from the whole stream, each time with probabilities proportional to
    the weights of those that are left (Efraimidis and Spirakis 2006, algorithm A-ES): an item of weight :math:`w`
    draws the key :math:`-\log(u) / w`, and the smallest keys are held. Equal weights give a uniform sample. Keys depend
    on the seed, the item's number and its weight alone, and so what is held does not depend on how the stream is cut
    into batches, on the device, or on where it was resumed.

    >>> buffer = WeightedReservoir(100, seed=0)
    >>> loss = torch.linspace(0, 1, 1000)
    >>> buffer.add(loss, weight=loss)
    >>> bool(buffer.sample(50).mean() > 0.5)
    True
    """

    _KIND = "weighted"

    def add(self, batch: Any, *, weight: Tensor | float = 1.0) -> None:  # tensors [count, *]; [count]
        """Let the buffer see the next items of the stream.

        Args:
            batch: the items.
            weight: of each item, or of all; finite and at least 0. An item of weight 0 is held only while there is
                room for it, and gives way to all that have a weight.

        Raises:
            TypeError: the batch holds something else than tensors, or a dtype differs from the first batch's; or
                ``weight`` is neither a number nor a floating tensor.
            ValueError: its structure or the shape of its rows differs from the first batch's, its tensors have not as
                many rows, or (for the first batch) there is not enough memory; or ``weight`` has another shape, or one
                is negative, infinite or NaN (on a GPU that is reported later). Nothing has changed then.
        """
        fields = self._fields_of(batch)
        count, device = fields[0].shape[0], fields[0].device
        if isinstance(weight, Tensor):
            weight = keyed.weights("weight", weight, count, weight.device)
        else:
            number = _checks.finite_number("weight", weight, minimum=0.0)
            weight = torch.full((count,), number, dtype=torch.float64, device=device)
        self._insert(batch, fields, None, weight)


def _groups_of(fields: list[Tensor], group: Tensor | int | None) -> Tensor:  # int64 [count]
    count, device = fields[0].shape[0], fields[0].device
    if group is None:
        labels = [field for field in fields if field.dim() == 1 and _integers(field)]
        if len(labels) != 1:
            raise ValueError(f"group must be given: {len(labels)} fields of batch have a single integer for each item")
        return labels[0].to(torch.int64)
    if isinstance(group, Tensor):
        if not _integers(group):
            raise TypeError(f"group must be a tensor of integers, got {_checks.describe(group)}")
        return keyed.of_count("group", group, count).to(torch.int64)
    number = below_2_63("group", _checks.integer("group", group, minimum=-(2**63)))
    return torch.full((count,), number, dtype=torch.int64, device=device)


def _integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
