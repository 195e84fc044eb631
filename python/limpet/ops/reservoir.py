"""Reservoir family: which items of a stream a buffer keeps, and which rows are taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _core, _launch, reference
from limpet.ops._library import LIBRARY, define, serve_by_triton

# --- schema, reference backend, fake ---------------------------------------------------------------------------------


def _fake(*args: Any) -> None:
    return None


define(
    "reservoir_slots_(Tensor(a!) slots, int seen, int capacity, int seed) -> ()",
    default=reference.reservoir_slots_,
    fake=_fake,
)
define(
    "reservoir_insert_(Tensor(a!)[] stored, Tensor(b!) items, Tensor(c!) seen, Tensor[] batch, int seed) -> ()",
    default=reference.reservoir_insert_,
    fake=_fake,
)
define(
    "sample_without_replacement_(Tensor(a!) sample, int population, int seed, int draw) -> ()",
    default=reference.sample_without_replacement_,
    fake=_fake,
)
define(
    "gather_rows_(Tensor(a!)[] rows, Tensor[] stored, Tensor index) -> ()",
    default=reference.gather_rows_,
    fake=_fake,
)


# --- launch ----------------------------------------------------------------------------------------------------------


def _rows(stored: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Addresses of stored fields and of a batch's, and bytes of a row."""
    return _addresses(stored), _addresses(batch), [t.nbytes // t.shape[0] for t in stored]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _contiguous(batch: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in batch]


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device and stream of a launch."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _slots_cpu(slots: Tensor, seen: int, capacity: int, seed: int) -> None:
    _core.reservoir_slots(seen, slots.numel(), capacity, seed, slots.data_ptr(), _launch.threads())


def _slots_cuda(slots: Tensor, seen: int, capacity: int, seed: int) -> None:
    _core.cuda_reservoir_slots(seen, slots.numel(), capacity, seed, slots.data_ptr(), *_where(slots))


def _insert_cpu(stored: Sequence[Tensor], items: Tensor, seen: Tensor, batch: Sequence[Tensor], seed: int) -> None:
    rows = _contiguous(batch)
    reservoir = items.data_ptr(), seen.data_ptr(), items.shape[0], rows[0].shape[0], seed
    _core.reservoir_insert(*_rows(stored, rows), *reservoir, _launch.threads())


def _insert_cuda(stored: Sequence[Tensor], items: Tensor, seen: Tensor, batch: Sequence[Tensor], seed: int) -> None:
    rows = [t.contiguous() for t in batch]
    reservoir = items.data_ptr(), seen.data_ptr(), items.shape[0], rows[0].shape[0], seed
    workspace = _launch.workspace(_core.cuda_reservoir_workspace(rows[0].shape[0]), items.device)
    _core.cuda_reservoir_insert(*_rows(stored, rows), *reservoir, workspace.data_ptr(), *_where(items))


def _sample_cpu(sample: Tensor, population: int, seed: int, draw: int) -> None:
    _core.sample_without_replacement(population, sample.numel(), seed, draw, sample.data_ptr())


def _sample_cuda(sample: Tensor, population: int, seed: int, draw: int) -> None:
    workspace = torch.empty_like(sample)
    _core.cuda_sample_without_replacement(
        population, sample.numel(), seed, draw, sample.data_ptr(), workspace.data_ptr(), *_where(sample)
    )


def _gather_cpu(rows: Sequence[Tensor], stored: Sequence[Tensor], index: Tensor) -> None:
    places = stored[0].shape[0], index.data_ptr(), index.shape[0]
    _core.gather_rows(*_rows(stored, rows), *places, _launch.threads())


def _gather_cuda(rows: Sequence[Tensor], stored: Sequence[Tensor], index: Tensor) -> None:
    places = stored[0].shape[0], index.data_ptr(), index.shape[0]
    _core.cuda_gather_rows(*_rows(stored, rows), *places, *_where(index))


LIBRARY.impl("reservoir_slots_", _slots_cpu, "CPU")
LIBRARY.impl("reservoir_insert_", _insert_cpu, "CPU")
LIBRARY.impl("sample_without_replacement_", _sample_cpu, "CPU")
LIBRARY.impl("gather_rows_", _gather_cpu, "CPU")
if _core.build_info()["cuda"] and torch.version.cuda is not None:  # on AMD the CUDA key is HIP
    LIBRARY.impl("reservoir_slots_", _slots_cuda, "CUDA")
    LIBRARY.impl("reservoir_insert_", _insert_cuda, "CUDA")
    LIBRARY.impl("sample_without_replacement_", _sample_cuda, "CUDA")
    LIBRARY.impl("gather_rows_", _gather_cuda, "CUDA")
    _BY_TRITON = ["XPU"]
else:
    _BY_TRITON = ["CUDA", "XPU"]
for _name in ("reservoir_slots_", "reservoir_insert_", "sample_without_replacement_", "gather_rows_"):
    serve_by_triton(_name, "limpet.triton_kernels.reservoir", keys=_BY_TRITON)

_slots = torch.ops.limpet.reservoir_slots_.default
insert_dispatched_ = torch.ops.limpet.reservoir_insert_.default
_sample = torch.ops.limpet.sample_without_replacement_.default
_gather = torch.ops.limpet.gather_rows_.default


# --- without checks: buffers call these thousands of times a second, with tensors that they know ----------------------


Row = tuple[torch.dtype, tuple[int, ...], int]  # a field's rows: dtype, shape, bytes


def plain_rows(container: type, stored: list[Tensor]) -> _core.PlainRows | None:  # [capacity, *] each
    """What takes batches of plain tensors and makes samples in one call of the core; ``None`` where nothing can.

    Args:
        container: what a batch is: ``Tensor``, ``tuple`` or ``list``.
        stored: the buffer's fields, on the CPU.
    """
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch has it since 2.10
    if exchange is None or any(type(field) is not Tensor or field.is_complex() for field in stored):  # conjugate views
        return None
    try:
        return _core.PlainRows(exchange, Tensor, container, stored)
    except (BufferError, RuntimeError, ValueError):  # a dtype that DLPack does not know
        return None


def mixed_unchecked(
    new: list[Tensor],  # [count, *] each
    stored: list[Tensor],  # [slots, *] each
    index: Tensor,  # int64 [replayed]
    count: int,
    pin: bool = False,
) -> list[Tensor]:  # [count + replayed, *] each
    """New rows, and stored ones behind them; ``new`` may be empty where ``count`` is 0."""
    total = count + index.shape[0]
    rows = [
        torch.empty((total, *field.shape[1:]), dtype=field.dtype, device=field.device, pin_memory=pin)
        for field in stored
    ]
    for out, tensor in zip(rows, new, strict=False):
        out[:count] = tensor
    if index.shape[0]:
        _gather([out[count:] for out in rows], stored, index)
    return rows


def sample_unchecked(
    population: int,
    count: int,
    seed: int,
    draw: int,
    device: torch.device,
) -> Tensor:  # int64 [count]
    """:func:`sample_without_replacement`, past the dispatcher where that is possible."""
    sample = torch.empty(count, dtype=torch.int64, device=device)
    if count:
        (_sample_cpu if _plain(sample) else _sample)(sample, population, seed, draw)
    return sample


def _plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


# --- public functions ------------------------------------------------------------------------------------------------


def reservoir_slots(
    seen: int, count: int, capacity: int, seed: int, *, device: torch.device | str | None = None
) -> Tensor:  # int64 [count]
    r"""Where each of the next ``count`` items of a stream goes in a reservoir, or -1 where it is passed over.

    Item :math:`t` (from 0) goes to slot :math:`t` while there are free ones, and then to a uniform
    :math:`u \in \{0, \dots, t\}` if that is a slot, :math:`u < \text{capacity}` (Vitter 1985, algorithm R). Then every
    item seen so far is in the reservoir with the same probability. The draw comes from Philox 4x32-10 keyed by
    ``(seed, t)``: it does not depend on how the stream is cut into batches, nor on the device.

    Args:
        seen: items before these.
        count: how many items.
        capacity: slots of the reservoir, at least 1.
        seed: in [0, 2^63).
        device: of the result; torch's default where ``None``.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is out of range.

    >>> reservoir_slots(0, 8, 4, seed=1)
    tensor([ 0,  1,  2,  3,  1,  0, -1, -1])
    >>> reservoir_slots(6, 2, 4, seed=1)
    tensor([-1, -1])
    """
    seen = _checks.integer("seen", seen, minimum=0)
    count = _checks.integer("count", count, minimum=0)
    capacity = _checks.integer("capacity", capacity, minimum=1)
    below_2_63("seen + count", seen + count)
    slots = torch.empty(count, dtype=torch.int64, device=device)
    _slots(slots, seen, capacity, seed_of(seed))
    return slots


def reservoir_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each
    items: Tensor,  # int64 [capacity]
    seen: Tensor,  # int64 []
    batch: Sequence[Tensor],  # [count, *] each
    *,
    seed: int,
) -> None:
    """Insert the next items of a stream into a reservoir, as :func:`reservoir_slots` says, all fields in one call.

    Only the rows of accepted items are read and written. Where several items of a batch get the same slot, the last
    one stays, as in the loop over single items.

    Args:
        stored: the reservoir's fields, written; of any dtype, without gaps.
        items: the number of the item in each slot, -1 in free ones; written.
        seen: how many items there were before; raised by ``count``.
        batch: the items' fields, of the dtypes and row shapes of ``stored``, on its device.
        seed: in [0, 2^63).

    Raises:
        TypeError: an argument is no list of tensors, or no tensor, or of another dtype; ``seed`` is no integer.
        ValueError: lengths, shapes or devices differ, or ``stored`` has gaps. Nothing has changed then.

    >>> stored, items, seen = torch.zeros(2, 3), torch.full((2,), -1), torch.tensor(0)
    >>> reservoir_insert_([stored], items, seen, [torch.arange(12.0).view(4, 3)], seed=0)
    >>> seen, items
    (tensor(4), tensor([0, 3]))
    >>> stored
    tensor([[ 0.,  1.,  2.],
            [ 9., 10., 11.]])
    """
    fields, new = row_lists("stored", stored, "batch", batch)
    capacity = fields[0].shape[0]
    int64("items", items, (capacity,), fields[0])
    int64("seen", seen, (), fields[0])
    insert_dispatched_(fields, items, seen, new, seed_of(seed))


def sample_without_replacement(
    population: int, count: int, *, seed: int, draw: int, device: torch.device | str | None = None
) -> Tensor:  # int64 [count]
    """Different integers in [0, population), in random order: every ordered choice is as likely as any other.

    These are the first ``count`` places of a Fisher-Yates shuffle, whose step ``i`` is drawn from
    ``(seed, draw, i)`` alone. Time and memory go with ``count``, not with ``population``.

    Args:
        population: in [1, 2^63).
        count: at most ``population`` and 2^32.
        seed: in [0, 2^63).
        draw: which of the draws of this seed, in [0, 2^63).
        device: of the result; torch's default where ``None``.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is out of range.

    >>> sample_without_replacement(1000, 4, seed=0, draw=0)
    tensor([497, 886,  23, 856])
    """
    population = _checks.integer("population", population, minimum=1)
    count = _checks.integer("count", count, minimum=0)
    below_2_63("population", population)
    if count > min(population, 2**32):
        raise ValueError(f"count must be at most population ({population}) and 2^32, got {count}")
    below_2_63("draw", _checks.integer("draw", draw, minimum=0))
    sample = torch.empty(count, dtype=torch.int64, device=device)
    _sample(sample, population, seed_of(seed), draw)
    return sample


def gather_rows(
    stored: Sequence[Tensor],  # [rows, *] each
    index: Tensor,  # int64 [count]
    *,
    into: Sequence[Tensor] | None = None,  # [count, *] each
) -> list[Tensor]:  # [count, *] each
    """Rows of several fields by their places, in one call.

    Args:
        stored: the fields, of any dtype, without gaps.
        index: which rows, in [0, rows).
        into: where they are to be written, without gaps; new tensors where ``None``.

    Raises:
        TypeError: an argument is no list of tensors, ``index`` is no int64 tensor, or a dtype of ``into`` is another.
        ValueError: lengths, shapes or devices differ, or a field has gaps.
        IndexError: an index is out of range (on the CPU; a GPU reports it later, as torch does). Nothing was written.

    >>> x, y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2])
    >>> gather_rows([x, y], torch.tensor([2, 0]))
    [tensor([[4., 5.],
            [0., 1.]]), tensor([2, 0])]
    """
    fields, _ = row_lists("stored", stored, "stored", stored)
    int64("index", index, None, fields[0])
    count = index.shape[0]
    rows = [t.new_empty((count, *t.shape[1:])) for t in fields] if into is None else into
    fields, rows = row_lists("stored", fields, "into", rows)
    for k, out in enumerate(rows):
        if out.shape[0] != count or not out.is_contiguous():
            raise ValueError(f"into[{k}] must have {count} rows without gaps, got {_checks.describe(out)}")
    _gather(rows, fields, index.contiguous())
    return rows


# --- checks ----------------------------------------------------------------------------------------------------------


def seed_of(value: Any) -> int:
    """Require a seed."""
    return below_2_63("seed", _checks.integer("seed", value, minimum=0))


def below_2_63(name: str, value: int) -> int:
    """Require what 64 bits with a sign can hold."""
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value}")
    return value


def int64(name: str, value: Any, shape: tuple[int, ...] | None, beside: Tensor) -> None:
    """Require an int64 tensor without gaps, of a shape (any one-dimensional for ``None``), on a tensor's device."""
    if _checks.tensor(name, value).dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {_checks.describe(value)}")
    fits = value.dim() == 1 if shape is None else value.shape == shape and value.is_contiguous()
    if not fits or value.device != beside.device:
        wanted = "[count]" if shape is None else f"{list(shape)} without gaps"
        raise ValueError(f"{name} must be of shape {wanted} on {beside.device}, got {_checks.describe(value)}")


def row_lists(name: str, stored: Any, other: str, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Require fields of rows, and beside each a field of as many or fewer rows like its own."""
    for argument, value in ((name, stored), (other, batch)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{argument} must be a list or tuple of tensors, got {_checks.describe(value)}")
    if not stored or len(stored) != len(batch):
        raise ValueError(f"{name} and {other} must have as many fields and at least one: {len(stored)}, {len(batch)}")
    for k, (rows, new) in enumerate(zip(stored, batch, strict=True)):
        _checks.tensor(f"{name}[{k}]", rows), _checks.tensor(f"{other}[{k}]", new)
        if new.dtype != rows.dtype:
            raise TypeError(f"{other}[{k}] must be {rows.dtype} as {name}[{k}] is, got {_checks.describe(new)}")
        if not rows.is_contiguous() or rows.dim() == 0 or rows.shape[0] != stored[0].shape[0] or rows.shape[0] == 0:
            raise ValueError(
                f"{name}[{k}] must have rows without gaps, as many in all fields, got {_checks.describe(rows)}"
            )
        if new.dim() == 0 or new.shape[1:] != rows.shape[1:] or new.shape[0] != batch[0].shape[0]:
            raise ValueError(
                f"{other}[{k}] must have rows of shape {list(rows.shape[1:])}, as many in all fields, "
                f"got {_checks.describe(new)}"
            )
        if new.device != rows.device or rows.device != stored[0].device:
            raise ValueError(f"{other}[{k}] must be on {stored[0].device} as {name}[0] is, got {_checks.describe(new)}")
    return list(stored), list(batch)
