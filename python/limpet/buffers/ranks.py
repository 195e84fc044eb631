"""Buffers of several processes become one: what a single buffer would hold of all their streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed

from limpet import _checks, ops, reference
from limpet.buffers.structure import Structure
from limpet.ops.reservoir import Row, sample_unchecked

if TYPE_CHECKING:
    from limpet.buffers.base import Buffer


class Described(NamedTuple):
    """What every process knows of each."""

    capacity: int
    seed: int
    seen: int
    draws: int
    structure: Structure | None
    rows: list[Row]
    device: str | None


#: Which rows are sent: how many by each process, and the slots of one's own; int64 [count].
Parts = Callable[["Buffer", list[Described], "distributed.ProcessGroup"], tuple[list[int], Tensor]]


def shares(seen: list[int], capacity: int, seed: int, draw: int) -> list[int]:
    """How many items of each stream a uniform sample of all of them holds: a multivariate hypergeometric draw.

    >>> shares([1000, 10, 0], 100, seed=0, draw=0)
    [99, 1, 0]
    """
    held = min(capacity, sum(seen))
    if held == 0:
        return [0] * len(seen)
    places = ops.sample_without_replacement(sum(seen), held, seed=seed, draw=draw, device="cpu")
    stream = torch.bucketize(places, torch.tensor(seen, device="cpu").cumsum(0), right=True)
    counts: list[int] = stream.bincount(minlength=len(seen)).tolist()
    return counts


def uniform_parts(
    buffer: Buffer, every: list[Described], group: distributed.ProcessGroup
) -> tuple[list[int], Tensor]:  # int64 [count]
    """A uniform sample of all streams together, by the first process's draws."""
    passed_over = [one.seed for one in every if one.seen > one.capacity]
    if len(set(passed_over)) < len(passed_over):
        raise ValueError(f"seed must be another in each process, or all pass over the same items, got {passed_over}")
    rank, seed, draw = distributed.get_rank(group), every[0].seed, every[0].draws
    counts = shares([one.seen for one in every], buffer.capacity, seed, draw)
    slots = sample_unchecked(len(buffer), counts[rank], seed, draw + 1 + rank, buffer._items.device)
    return counts, slots


def keyed_parts(
    buffer: Buffer, every: list[Described], group: distributed.ProcessGroup
) -> tuple[list[int], Tensor]:  # int64 [count]
    """The items with the smallest keys of all groups: what is noted of all items is sent to all processes."""
    seeds = [one.seed for one in every if one.seen]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed must be another in each process, or all draw the same keys, got {seeds}")
    mine = torch.stack([note[: len(buffer)].cpu() for note in buffer._notes()])  # [3, held]: items, keys, groups
    notes: list[Any] = [None] * len(every)
    distributed.all_gather_object(notes, mine, group)
    if sum(note[1].unique().numel() for note in notes) > torch.cat([note[1] for note in notes]).unique().numel():
        raise ValueError("buffers must have no items in common: one of them was merged into another before")
    first = 0
    for note, one in zip(notes, every, strict=True):
        note[0] += first
        first += one.seen
    held = [note.shape[1] for note in notes]
    kept = reference.keyed_order(*torch.cat(notes, dim=1))[: buffer.capacity]
    ends = torch.tensor(held, device="cpu").cumsum(0)
    counts: list[int] = torch.bucketize(kept, ends, right=True).bincount(minlength=len(held)).tolist()
    rank = distributed.get_rank(group)
    begin = sum(held[:rank])
    slots = kept[(kept >= begin) & (kept < begin + held[rank])] - begin
    return counts, slots.to(buffer._seen.device)


def merge(buffer: Buffer, group: distributed.ProcessGroup | None, parts: Parts) -> None:
    """Let each process send the rows that are its part, into their places in all others."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError("merge_ranks needs torch.distributed.init_process_group before it")
    group = distributed.group.WORLD if group is None else group
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group must be a process group of this process or None, got {_checks.describe(group)}")
    device = None if buffer.device is None else buffer.device.type
    mine = Described(buffer.capacity, buffer.seed, buffer.seen, buffer._draws, buffer._structure, buffer._rows, device)
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, mine, group)
    _require_alike(every)
    counts, slots = parts(buffer, every, group)
    first = next((one for one in every if one.structure is not None), None)
    if first is None:
        return
    if buffer._structure is None:
        empty = [torch.empty(0, *shape, dtype=dtype, device=first.device) for dtype, shape, _ in first.rows]
        buffer._begin(first.structure.batch(empty))
    for _ in range(1 + len(every)):  # draws that may have been used up
        buffer._next_draw()
    _exchange(buffer, [one.seen for one in every], counts, slots, group)


def _require_alike(every: list[Described]) -> None:
    if len(capacities := {one.capacity for one in every}) > 1:
        raise ValueError(f"capacity must be the same in all processes, got {sorted(capacities)}")
    known = [one for one in every if one.structure is not None]
    for one in known[1:]:
        if one.structure != known[0].structure or one.rows != known[0].rows:
            raise ValueError(
                f"items must be alike in all processes, got {known[0].structure} of {known[0].rows} "
                f"and {one.structure} of {one.rows}"
            )


def _exchange(
    buffer: Buffer,
    seen: list[int],
    counts: list[int],
    slots: Tensor,  # int64 [count]
    group: distributed.ProcessGroup,
) -> None:
    tensors, number = buffer._empty(buffer.capacity, buffer._seen.device)
    begin = 0
    for rank, count in enumerate(counts):
        into = [tensor[begin : begin + count] for tensor in tensors]
        if count and rank == distributed.get_rank(group):
            ops.gather_rows([*buffer._notes(), *buffer._fields], slots, into=into)
        if count:
            for rows in into:
                _broadcast(rows, distributed.get_global_rank(group, rank), group)
            into[0] += sum(seen[:rank])  # the items' numbers
        begin += count
    buffer._take(buffer.capacity, tensors, number, sum(seen), begin)


def _broadcast(rows: Tensor, source: int, group: distributed.ProcessGroup) -> None:
    if rows.numel():
        distributed.broadcast(rows.view(-1).view(torch.uint8), source, group=group)
