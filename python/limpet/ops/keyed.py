"""Keyed reservoirs: which items of a stream a buffer keeps of each group, and by which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _core, _launch, reference
from limpet.ops._library import LIBRARY, define
from limpet.ops.reservoir import _plain, _rows, int64, row_lists, seed_of

# --- schema, reference backend (which serves GPUs: its sorts are a library's work), fake ------------------------------


def _fake(*args: Any) -> None:
    return None


define(
    "keyed_insert_(Tensor(a!)[] stored, Tensor(b!) items, Tensor(c!) keys, Tensor(d!) groups, Tensor(e!) seen, "
    "Tensor[] batch, Tensor? group, Tensor? weight, int seed) -> ()",
    default=reference.keyed_insert_,
    fake=_fake,
)


# --- launch ----------------------------------------------------------------------------------------------------------


def _insert_cpu(
    stored: Sequence[Tensor],
    items: Tensor,
    keys: Tensor,
    groups: Tensor,
    seen: Tensor,
    batch: Sequence[Tensor],
    group: Tensor | None,
    weight: Tensor | None,
    seed: int,
) -> None:
    notes = [items, keys, groups]
    index_insert_(index_of(notes), stored, notes, seen, batch, group, weight, seed)


LIBRARY.impl("keyed_insert_", _insert_cpu, "CPU")
insert_dispatched_ = torch.ops.limpet.keyed_insert_.default


# --- without checks: buffers keep the index between batches -----------------------------------------------------------

plain = _plain


def index_of(notes: list[Tensor]) -> _core.KeyedIndex:  # int64 [capacity] each: items, keys, groups
    """What the CPU needs to find the row that is given up, made of what is noted of the slots."""
    return _core.KeyedIndex([note.data_ptr() for note in notes], notes[0].shape[0])


def index_insert_(
    index: _core.KeyedIndex,
    stored: Sequence[Tensor],  # [capacity, *] each
    notes: list[Tensor],  # int64 [capacity] each: items, keys, groups
    seen: Tensor,  # int64 []
    batch: Sequence[Tensor],  # [count, *] each
    group: Tensor | None,  # int64 [count]
    weight: Tensor | None,  # float64 [count]
    seed: int,
) -> None:
    """:func:`keyed_insert_` for the rows that an index knows."""
    rows = [t if t.is_contiguous() else t.contiguous() for t in batch]
    group, weight = (None if t is None else t.contiguous() for t in (group, weight))
    index.insert(
        *_rows(stored, rows),
        [note.data_ptr() for note in notes],
        0 if group is None else group.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        seen.data_ptr(),
        rows[0].shape[0],
        seed,
        _launch.threads(),
    )


def index_choose(
    index: _core.KeyedIndex,
    seen: int,
    count: int,
    group: Tensor | None,  # int64 [count]
    weight: Tensor | None,  # float64 [count]
    seed: int,
) -> Tensor:  # int64 [4, chosen]
    """Places, slots, keys and groups of the items that get a slot, in their order; no note or row has changed then."""
    group, weight = (None if t is None else t.contiguous() for t in (group, weight))
    group_address, weight_address = (0 if t is None else t.data_ptr() for t in (group, weight))
    chosen = index.choose(group_address, weight_address, seen, count, seed, _launch.threads())
    return torch.tensor(chosen, dtype=torch.int64, device="cpu").view(4, -1)


def index_select(index: _core.KeyedIndex, places: Tensor) -> Tensor:  # int64 [count] -> int64 [count]
    """The slots of items by their places among those held, from the oldest on; places must be in range."""
    slots = torch.empty_like(places)
    index.select(places.data_ptr(), places.shape[0], slots.data_ptr())
    return slots


# --- public function -------------------------------------------------------------------------------------------------


def keyed_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each
    items: Tensor,  # int64 [capacity]
    keys: Tensor,  # int64 [capacity]
    groups: Tensor,  # int64 [capacity]
    seen: Tensor,  # int64 []
    batch: Sequence[Tensor],  # [count, *] each
    *,
    seed: int,
    group: Tensor | None = None,  # int64 [count]
    weight: Tensor | None = None,  # [count]
) -> None:
    r"""Insert the next items of a stream into a reservoir that holds equal shares of groups, or weighted items.

    Every item draws a key from Philox 4x32-10 keyed by ``(seed, number)`` alone: 63 random bits, or with weights the
    exponential :math:`-\log(u) / w` (Efraimidis and Spirakis 2006, algorithm A-ES; as the bits of a float64). Order
    all items by their rank within their group (by key), then by the group's value: the first ``capacity`` are held. So

    - a group's items are a uniform sample of those seen of it (weighted: as drawn one after another without
      replacement, each time with probabilities proportional to the weights);
    - how many it has depends on the numbers seen of each group alone: all groups as many, or all they have;
    - what is held depends on the items seen alone, not on how the stream is cut, on threads or devices. In which slot
      a row lies is not told.

    Args:
        stored: the reservoir's fields, written; of any dtype, without gaps.
        items: the number of the item in each slot, -1 in free ones, which lie behind all others; written.
        keys: the key of the item in each slot; written.
        groups: its group; written.
        seen: how many items there were before; raised by ``count``.
        batch: the items' fields, of the dtypes and row shapes of ``stored``, on its device.
        seed: in [0, 2^63).
        group: of each item; all are of group 0 where ``None``.
        weight: of each item, finite and at least 0; 0 is the limit of small weights: such items give way to all
            others. Either all batches of a stream have weights or none: keys of both kinds cannot be compared.

    Raises:
        TypeError: an argument is no list of tensors, or no tensor, or of another dtype; ``seed`` is no integer.
        ValueError: lengths, shapes or devices differ, ``stored`` has gaps, or a weight is negative, infinite or NaN (on
            the CPU; a GPU reports it later). Nothing has changed then.

    >>> stored, seen = torch.zeros(4), torch.tensor(0)
    >>> items, keys, groups = (torch.full((4,), -1) for _ in range(3))
    >>> label = torch.tensor([7, 7, 7, 7, 7, 3, 7, 7, 3, 7])
    >>> keyed_insert_([stored], items, keys, groups, seen, [torch.arange(10.0)], seed=0, group=label)
    >>> groups.sort().values
    tensor([3, 3, 7, 7])
    """
    fields, new = row_lists("stored", stored, "batch", batch)
    for name, note in (("items", items), ("keys", keys), ("groups", groups)):
        int64(name, note, (fields[0].shape[0],), fields[0])
    int64("seen", seen, (), fields[0])
    if group is not None:
        int64("group", group, None, fields[0])
        of_count("group", group, new[0].shape[0])
    if weight is not None:
        weight = weights("weight", weight, new[0].shape[0], fields[0].device)
    insert_dispatched_(fields, items, keys, groups, seen, new, group, weight, seed_of(seed))


# --- checks ----------------------------------------------------------------------------------------------------------


def of_count(name: str, value: Tensor, count: int) -> Tensor:
    """Require one number for each item."""
    if value.shape != (count,):
        raise ValueError(f"{name} must be of shape {[count]}, got {_checks.describe(value)}")
    return value


def weights(name: str, value: Any, count: int, device: torch.device) -> Tensor:  # [count] -> float64 [count]
    """Require a weight for each item, finite and at least 0."""
    value = of_count(name, _checks.float_tensor(name, value), count).detach().to(device, torch.float64)
    value = value.resolve_neg()  # what is read is memory
    if not count:
        return value
    low, high = value.aminmax()
    if value.device.type != "cpu":  # looking would wait for the device
        torch._assert_async((low >= 0) & (high < torch.inf))
    elif not (low.item() >= 0 and high.item() < torch.inf):
        raise ValueError(f"{name} must be finite and at least 0, got values from {low.item():g} to {high.item():g}")
    return value
