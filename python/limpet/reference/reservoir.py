"""Which items of a stream a reservoir keeps, and which rows are taken out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.random import WORD, philox

_RESERVOIR, _SAMPLE = 1, 2  # what a draw is for, so that those of one seed are independent


def _bounded(
    ranges: Tensor,  # int64 [n], each in [1, 2^63)
    second: Tensor,  # bool [n], whether a draw takes the second half of its block
    counter: Tensor,  # int64 [n, 4], of its block
    seed: int,
) -> Tensor:  # int64 [n]
    """Uniform integers in [0, range): 2^63 values cut into ``range`` equal runs, what is left over drawn again."""
    key, largest = (seed & WORD, seed >> 32), 2**63 - 1
    result = torch.where(ranges == 1, 0, -1)  # its one run of 2^63 values is more than int64 holds
    runs = torch.div(largest - (ranges - 1), ranges, rounding_mode="floor") + 1
    attempt = 0
    while (missing := result < 0).any():
        words = philox(counter[missing] + counter.new_tensor([0, 0, 0, attempt]), key)
        high, low = torch.where(second[missing, None], words[:, 2:], words[:, :2]).unbind(1)
        values = torch.div((high << 31) | (low >> 1), runs[missing], rounding_mode="floor")
        result[missing] = torch.where(values < ranges[missing], values, -1)
        attempt += 1
    return result


def reservoir_slots_(
    slots: Tensor,  # int64 [count], written
    seen: int,
    capacity: int,
    seed: int,
) -> None:
    """Algorithm R (Vitter 1985): item t goes to slot t while there are free ones, then to a uniform u in {0..t} if that
    is a slot (u < capacity), else nowhere (-1). The draw depends on (seed, t) alone.
    """
    items = seen + torch.arange(slots.numel(), device=slots.device)
    pairs = items >> 1
    counter = torch.stack([pairs & WORD, pairs >> 32, 0 * pairs, 0 * pairs + (_RESERVOIR << 16)], dim=1)
    drawn = _bounded(items + 1, items % 2 == 1, counter, seed)
    slots.copy_(torch.where(items < capacity, items, torch.where(drawn < capacity, drawn, -1)))


def reservoir_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each, written
    items: Tensor,  # int64 [capacity], the number of the item in each slot or -1, written
    seen: Tensor,  # int64 [], raised by count
    batch: Sequence[Tensor],  # [count, *] each
    seed: int,
) -> None:
    """Give each item of the batch its slot; of those that get the same, the last one stays."""
    count = batch[0].shape[0]
    numbers = seen + torch.arange(count, device=items.device)
    slots = torch.empty_like(numbers)
    reservoir_slots_(slots, int(seen), items.numel(), seed)
    kept = slots >= 0
    items.scatter_reduce_(0, slots[kept], numbers[kept], "amax")
    kept[kept.clone()] = items[slots[kept]] == numbers[kept]
    for rows, new in zip(stored, batch, strict=True):
        rows[slots[kept]] = new[kept]
    seen += count


def sample_without_replacement_(
    sample: Tensor,  # int64 [count], written
    population: int,
    seed: int,
    draw: int,
) -> None:
    """The first places of a Fisher-Yates shuffle of [0, population); step i depends on (seed, draw, i) alone."""
    steps = torch.arange(sample.numel())
    pairs = steps >> 1
    counter = torch.stack(
        [0 * pairs + (draw & WORD), 0 * pairs + (draw >> 32), pairs, 0 * pairs + (_SAMPLE << 16)], dim=1
    )
    targets = (steps + _bounded(population - steps, steps % 2 == 1, counter, seed)).tolist()
    moved: dict[int, int] = {}
    values = []
    for step, target in enumerate(targets):
        values.append(moved.get(target, target))
        moved[target] = moved.get(step, step)
    sample.copy_(torch.tensor(values, dtype=torch.int64))


def gather_rows_(
    rows: Sequence[Tensor],  # [count, *] each, written
    stored: Sequence[Tensor],  # [capacity, *] each
    index: Tensor,  # int64 [count]
) -> None:
    """Rows of every field by their places."""
    for out, field in zip(rows, stored, strict=True):
        out.copy_(field[index])
