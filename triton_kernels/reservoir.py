"""Reservoir family in Triton: which items are kept, which rows are sampled; the same draws as everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._tiles import OPTIONS, cdiv, next_power_of_2

BLOCK = 1024  # items of a program
ROW_BYTES = 4096  # copied at a time

RESERVOIR = tl.constexpr(1)  # what a draw is for
SAMPLE = tl.constexpr(2)


@triton.jit
def _bits63(seed, number, index, second, purpose: tl.constexpr, attempt):
    """63 random bits: the first or the second half of a block of four words."""
    zero = number * 0
    a, b, c, d = tl.philox(
        seed,
        (number & 0xFFFFFFFF).to(tl.uint32),
        ((number >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (index + zero).to(tl.uint32),
        (zero + (purpose << 16) + attempt).to(tl.uint32),
        n_rounds=10,
    )
    high, low = tl.where(second, c, a).to(tl.int64), tl.where(second, d, b).to(tl.int64)
    return (high << 31) | (low >> 1)


@triton.jit
def _bounded(ranges, seed, number, index, second, purpose: tl.constexpr):
    """Uniform in [0, range): 2^63 values cut into equal runs, those left over drawn again."""
    # The one run of a range of 1 is more than int64 holds.
    runs = (0x7FFFFFFFFFFFFFFF - (ranges - 1)) // tl.maximum(ranges, 2) + 1
    values = _bits63(seed, number, index, second, purpose, 0) // runs
    values = tl.where(ranges == 1, 0, values)
    attempt = 1
    while tl.max((values >= ranges).to(tl.int32)) > 0:
        drawn = _bits63(seed, number, index, second, purpose, attempt) // runs
        values = tl.where(values >= ranges, drawn, values)
        attempt += 1
    return values


@triton.jit
def _slots(items, capacity, seed):
    """Algorithm R (Vitter 1985)."""
    drawn = _bounded(items + 1, seed, items >> 1, 0, (items & 1) == 1, RESERVOIR)
    return tl.where(items < capacity, items, tl.where(drawn < capacity, drawn, -1))


@triton.jit
def slots_kernel(
    slots_ptr,  # [count] int64, written
    seen,
    count,
    capacity,
    seed,
    BLOCK: tl.constexpr,
):
    """``slots[k]`` = where item ``seen + k`` goes."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(slots_ptr + k, _slots(seen + k, capacity, seed), mask=k < count)


@triton.jit
def decide_kernel(
    slots_ptr,  # [count] int64, written
    items_ptr,  # [capacity] int64, raised to the numbers of the items that stay
    seen_ptr,  # [] int64
    count,
    capacity,
    seed,
    BLOCK: tl.constexpr,
):
    """Slots, and the last item of each: a maximum, which depends on no order."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    items = tl.load(seen_ptr) + k
    slots = _slots(items, capacity, seed)
    inside = k < count
    tl.store(slots_ptr + k, slots, mask=inside)
    tl.atomic_max(items_ptr + slots, items, mask=inside & (slots >= 0))


@triton.jit
def copy_kernel(
    stored_ptr,  # [capacity, row_bytes] bytes
    batch_ptr,  # [count, row_bytes] bytes
    slots_ptr,  # [count] int64
    items_ptr,  # [capacity] int64
    seen_ptr,  # [] int64
    row_bytes,
    BLOCK_BYTES: tl.constexpr,
):
    """Copy the row of one item, if it stays."""
    k = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + k)
    last = tl.load(items_ptr + tl.maximum(slot, 0))
    if (slot >= 0) & (last == tl.load(seen_ptr) + k):
        for first in range(0, row_bytes, BLOCK_BYTES):
            at = first + tl.arange(0, BLOCK_BYTES)
            row = tl.load(batch_ptr + k * row_bytes + at, mask=at < row_bytes)
            tl.store(stored_ptr + slot * row_bytes + at, row, mask=at < row_bytes)


@triton.jit
def targets_kernel(
    targets_ptr,  # [count] int64, written
    population,
    count,
    seed,
    draw,
    BLOCK: tl.constexpr,
):
    """The place that each step of a Fisher-Yates shuffle swaps its own with."""
    step = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ranges = tl.maximum(population - step, 1)
    offset = _bounded(ranges, seed, draw + 0 * step, step >> 1, (step & 1) == 1, SAMPLE)
    tl.store(targets_ptr + step, step + offset, mask=step < count)


@triton.jit
def follow_kernel(
    sample_ptr,  # [count] int64, written
    targets_ptr,  # [count] int64
    count,
    BLOCK: tl.constexpr,
):
    """What each step takes: what the latest earlier step with that target put there, and so on back."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = first + tl.arange(0, BLOCK)
    place = tl.load(targets_ptr + step, mask=step < count)
    before = tl.minimum(first + BLOCK, count) - 2
    while before >= 0:
        place = tl.where((before < step) & (tl.load(targets_ptr + before) == place), before, place)
        before -= 1
    tl.store(sample_ptr + step, place, mask=step < count)


@triton.jit
def gather_kernel(
    rows_ptr,  # [count, row_bytes] bytes, written
    stored_ptr,  # [rows, row_bytes] bytes
    index_ptr,  # [count] int64
    row_bytes,
    BLOCK_BYTES: tl.constexpr,
):
    """Copy one row."""
    k = tl.program_id(0).to(tl.int64)
    place = tl.load(index_ptr + k)
    for first in range(0, row_bytes, BLOCK_BYTES):
        at = first + tl.arange(0, BLOCK_BYTES)
        row = tl.load(stored_ptr + place * row_bytes + at, mask=at < row_bytes)
        tl.store(rows_ptr + k * row_bytes + at, row, mask=at < row_bytes)


def reservoir_slots_(
    slots: Tensor,  # int64 [count], written
    seen: int,
    capacity: int,
    seed: int,
) -> None:
    """Where each of the next items goes."""
    count = slots.numel()
    if count:
        slots_kernel[(cdiv(count, BLOCK),)](slots, seen, count, capacity, seed, BLOCK=BLOCK, **OPTIONS)


def reservoir_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each, written
    items: Tensor,  # int64 [capacity], written
    seen: Tensor,  # int64 [], raised by count
    batch: Sequence[Tensor],  # [count, *] each
    seed: int,
) -> None:
    """Give each item its slot, and copy the rows of those that stay."""
    count = batch[0].shape[0]
    if count == 0:
        return
    slots = torch.empty(count, dtype=torch.int64, device=items.device)
    decide_kernel[(cdiv(count, BLOCK),)](slots, items, seen, count, items.numel(), seed, BLOCK=BLOCK, **OPTIONS)
    for rows, new in zip(map(_bytes, stored), map(_bytes, batch), strict=True):
        if rows.numel():
            copy_kernel[(count,)](rows, new, slots, items, seen, rows.shape[1], BLOCK_BYTES=_at_once(rows), **OPTIONS)
    seen += count


def sample_without_replacement_(
    sample: Tensor,  # int64 [count], written
    population: int,
    seed: int,
    draw: int,
) -> None:
    """The first places of a shuffle."""
    count = sample.numel()
    if count:
        targets = torch.empty_like(sample)
        targets_kernel[(cdiv(count, BLOCK),)](targets, population, count, seed, draw, BLOCK=BLOCK, **OPTIONS)
        follow_kernel[(cdiv(count, 128),)](sample, targets, count, BLOCK=128, **OPTIONS)


def gather_rows_(
    rows: Sequence[Tensor],  # [count, *] each, written
    stored: Sequence[Tensor],  # [rows, *] each
    index: Tensor,  # int64 [count]
) -> None:
    """Rows of every field by their places."""
    for out, field in zip(map(_bytes, rows), map(_bytes, stored), strict=True):
        if out.numel():
            gather_kernel[(index.numel(),)](out, field, index, out.shape[1], BLOCK_BYTES=_at_once(out), **OPTIONS)


def _bytes(rows: Tensor) -> Tensor:  # [n, *] -> [n, row_bytes] uint8, the same memory if there are no gaps
    row_bytes = rows[0].numel() * rows.element_size() if rows.shape[0] else 0
    return rows.contiguous().reshape(-1).view(torch.uint8).view(rows.shape[0], row_bytes)


def _at_once(rows: Tensor) -> int:  # [n, row_bytes]
    return min(ROW_BYTES, next_power_of_2(rows.shape[1]))
