"""Reservoirs of several processes become one: a uniform sample of all their streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed

from limpet import _checks, ops
from limpet.buffers.structure import Structure
from limpet.ops.reservoir import sample_unchecked

if TYPE_CHECKING:
    from limpet.buffers.reservoir import ReservoirBuffer


class _Described(NamedTuple):
    """What every process knows of each."""

    capacity: int
    seed: int
    seen: int
    draws: int
    structure: Structure | None
    rows: list[tuple[torch.dtype, torch.Size]]
    device: str | None


def shares(seen: list[int], capacity: int, seed: int, draw: int) -> list[int]:
    """How many items of each stream a uniform sample of all of them holds: a multivariate hypergeometric draw.

    >>> shares([1000, 10, 0], 100, seed=0, draw=0)
    [98, 2, 0]
    """
    held = min(capacity, sum(seen))
    if held == 0:
        return [0] * len(seen)
    places = ops.sample_without_replacement(sum(seen), held, seed=seed, draw=draw, device="cpu")
    stream = torch.bucketize(places, torch.tensor(seen).cumsum(0), right=True)
    counts: list[int] = stream.bincount(minlength=len(seen)).tolist()
    return counts


def merge(buffer: ReservoirBuffer, group: distributed.ProcessGroup | None) -> None:
    """As :meth:`limpet.ReservoirBuffer.merge_ranks` says."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError("merge_ranks needs torch.distributed.init_process_group before it")
    group = distributed.group.WORLD if group is None else group
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group must be a process group of this process or None, got {_checks.describe(group)}")
    device = None if buffer.device is None else buffer.device.type
    mine = _Described(
        buffer.capacity, buffer.seed, buffer.seen, buffer._draws, buffer._structure, buffer._rows, device
    )
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, mine, group)
    _require_alike(every)
    first = next((one for one in every if one.structure is not None), None)
    if first is None:
        return
    if buffer._structure is None:
        empty = [torch.empty(0, *shape, dtype=dtype, device=first.device) for dtype, shape in first.rows]
        buffer._begin(first.structure.batch(empty))
    _exchange(buffer, every, group)


def _require_alike(every: list[_Described]) -> None:
    if len(capacities := {one.capacity for one in every}) > 1:
        raise ValueError(f"capacity must be the same in all processes, got {sorted(capacities)}")
    passed_over = [one.seed for one in every if one.seen > one.capacity]
    if len(set(passed_over)) < len(passed_over):
        raise ValueError(f"seed must be another in each process, or all pass over the same items, got {passed_over}")
    known = [one for one in every if one.structure is not None]
    for one in known[1:]:
        if one.structure != known[0].structure or one.rows != known[0].rows:
            raise ValueError(
                f"items must be alike in all processes, got {known[0].structure} of {known[0].rows} "
                f"and {one.structure} of {one.rows}"
            )


def _exchange(buffer: ReservoirBuffer, every: list[_Described], group: distributed.ProcessGroup) -> None:
    """Let each process send the rows that are its share, into their places in all others."""
    seen = [one.seen for one in every]
    seed, draw = every[0].seed, every[0].draws  # the first process's draws serve all
    counts = shares(seen, buffer.capacity, seed, draw)
    tensors, number = buffer._empty(buffer.capacity, buffer._items.device)
    begin = 0
    for rank, count in enumerate(counts):
        into = [tensor[begin : begin + count] for tensor in tensors]
        if count and rank == distributed.get_rank(group):
            index = sample_unchecked(len(buffer), count, seed, draw + 1 + rank, buffer._items.device)
            ops.gather_rows([*buffer._notes(), *buffer._fields], index, into=into)
        if count:
            for rows in into:
                _broadcast(rows, distributed.get_global_rank(group, rank), group)
            into[0] += sum(seen[:rank])
        begin += count
    for _ in range(1 + len(every)):  # draws that are used up
        buffer._next_draw()
    buffer._take(buffer.capacity, tensors, number, sum(seen))


def _broadcast(rows: Tensor, source: int, group: distributed.ProcessGroup) -> None:
    if rows.numel():
        distributed.broadcast(rows.view(-1).view(torch.uint8), source, group=group)
