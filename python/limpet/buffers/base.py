"""What all buffers have in common: the structure of their batches, their rows, samples, states and files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from limpet import _checks
from limpet.buffers import files
from limpet.buffers.memory import require_room
from limpet.buffers.structure import Structure
from limpet.ops.reservoir import mixed_unchecked, sample_unchecked, seed_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Buffer(ABC):
    """Rows of all fields of a batch, as many as there are slots, and beside them what the buffer notes of each slot.

    What a kind of buffer adds is which items it keeps: :meth:`add`.
    """

    _KIND: ClassVar[str]  # its name in files
    _NOTES: ClassVar[dict[str, torch.dtype]] = {"items": torch.int64}  # of each slot; the attribute `_items`, and so on

    _FULL: ClassVar[bool] = True  # it holds as many of the items seen as it has slots for

    _items: Tensor  # int64 [capacity], the number of the item in each slot; -1 in free ones

    def __init__(self, capacity: int, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        self.capacity = _checks.integer("capacity", capacity, minimum=1)
        self.seed = seed_of(seed)
        self._device = None if device is None else torch.device(device)
        self._draws = 0  # samples taken so far
        self._count = 0  # items seen, as the host knows it: reading the device's number would wait for the device
        self._seen = torch.zeros((), dtype=torch.int64)
        self._structure: Structure | None = None
        self._fields: list[Tensor] = []  # [capacity, *] each
        self._rows: list[tuple[torch.dtype, torch.Size]] = []  # of each field: dtype and shape of a row
        self._set_notes([torch.empty(0, dtype=dtype) for dtype in self._NOTES.values()])

    @property
    def seen(self) -> int:
        """Items seen so far."""
        return self._count

    @property
    def device(self) -> torch.device | None:
        """Where the items lie; ``None`` before the first batch, where none was asked for."""
        return self._device

    @property
    def items(self) -> Tensor:  # int64 [len]
        """The number of the item in each slot, counted from 0 in the order in which they came."""
        return self._items[: len(self)]

    @abstractmethod
    def __len__(self) -> int:
        """Items held."""

    @abstractmethod
    def add(self, batch: Any) -> None:  # tensors [count, *]
        """Let the buffer see the next items of the stream."""

    def sample(self, count: int) -> Any:  # tensors [count, *]
        """Different items in random order, as a batch of the structure that was added.

        Args:
            count: how many, at most ``len(self)``.

        Raises:
            TypeError: ``count`` is no integer.
            ValueError: ``count`` is negative, or the buffer holds fewer items.
            RuntimeError: nothing was added yet, so that there is no structure to give.
        """
        index = self._drawn(count)
        if self._structure is None:
            raise RuntimeError("the buffer has seen no batch yet")
        return self._structured(mixed_unchecked([], self._fields, index, 0))

    def sample_into(
        self, batch: Any, fraction: float = 0.2, *, transform: Callable[[Any], Any] | None = None
    ) -> Any:  # tensors [count, *] -> [count + replayed, *]
        """New items followed by as many sampled ones as make up ``fraction`` of the whole; fewer if there are fewer.

        The new ones are not added: call :meth:`add` for that, usually after the step.

        Args:
            batch: new items, of the structure that was added, on any device; the result is on the buffer's.
            fraction: the sampled items' share of the result, in [0, 1).
            transform: what the batch of sampled ones goes through first: an augmentation, which keeps structure,
                shapes and dtypes.

        Raises:
            TypeError: as :meth:`add`, for the batch and for what ``transform`` gives; or ``fraction`` is no number.
            ValueError: as :meth:`add`, likewise; or ``fraction`` is out of range.
        """
        fraction = _checks.finite_number("fraction", fraction, minimum=0.0)
        if fraction >= 1.0:
            raise ValueError(f"fraction must be below 1, got {fraction}")
        if self._structure is None:
            return batch
        new = self._like_first(batch)
        count = new[0].shape[0]
        replayed = min(len(self), round(count * fraction / (1.0 - fraction)))
        if transform is None and not any(field.requires_grad for field in new):
            return self._structured(mixed_unchecked(new, self._fields, self._drawn(replayed), count))
        sampled = self.sample(replayed)
        if transform is not None and replayed:
            sampled = transform(sampled)
        return self._structured([torch.cat(pair) for pair in zip(new, self._like_first(sampled), strict=True)])

    def __iter__(self) -> Iterator[Any]:
        """The items held, slot by slot, as rows of the structure that was added."""
        for slot in range(len(self)):
            yield self._structured([field[slot] for field in self._fields])

    def to(self, device: torch.device | str) -> Self:
        """Move the buffer; gives itself."""
        device = torch.device(device)
        if self._fields:
            require_room([field.nbytes for field in self._fields], device)
        self._fields = [field.to(device) for field in self._fields]
        self._set_notes([note.to(device) for note in self._notes()])
        self._seen = self._seen.to(device)
        self._device = device
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs: numbers, text, and tensors of what is held (copies)."""
        held = len(self)
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "seen": self.seen,
            "draws": self._draws,
            "structure": None if self._structure is None else self._structure.to_text(),
            **{name: note[:held].clone() for name, note in zip(self._NOTES, self._notes(), strict=True)},
            "fields": [field[:held].clone() for field in self._fields],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, onto this buffer's device; then the same stream leaves the same buffer.

        Raises:
            TypeError: a number or a tensor of the state is none.
            ValueError: keys are missing or unknown, or numbers and tensors do not fit each other. Nothing has been
                taken over then.
        """
        read = files.checked(state, self._NOTES, full=self._FULL)
        device = self._device or (read.fields[0].device if read.fields else torch.device("cpu"))
        restored = type(self)(read.capacity, seed=read.seed, device=self._device)
        if read.structure is not None:
            restored._structure = Structure.from_text(read.structure, len(read.fields))
            restored._allocate(read.fields, device)
            for field, rows in zip([*restored._notes(), *restored._fields], [*read.notes, *read.fields], strict=True):
                field[: rows.shape[0]] = rows
            restored._set_seen(read.seen)
        restored._draws = read.draws
        self.__dict__.update(restored.__dict__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffer as safetensors, beside ``path`` first: a file that was there stays whole until the end.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        files.save(Path(path), self._KIND, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Self:
        """Read a buffer that :meth:`save` wrote.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: it is no saved buffer, or truncated.
        """
        buffer = cls(1, device=device)
        buffer.load_state_dict(files.load(Path(path), cls._KIND))
        return buffer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(capacity={self.capacity}, seed={self.seed}, len={len(self)}, seen={self.seen})"

    def _begin(self, batch: Any) -> None:
        """Take structure, dtypes and shapes from the first batch."""
        structure, fields = self._first(batch)
        self._allocate(fields, self._device or fields[0].device)
        self._structure = structure

    @staticmethod
    def _first(batch: Any) -> tuple[Structure, list[Tensor]]:
        """A first batch's structure and fields."""
        structure, fields = Structure.of(batch)
        for k, field in enumerate(fields):
            if field.dim() == 0 or field.shape[0] != fields[0].shape[0]:
                raise ValueError(
                    f"batch must hold tensors of as many rows, got {_checks.describe(field)} as its field {k}"
                )
        return structure, fields

    def _allocate(self, like: list[Tensor], device: torch.device) -> None:
        require_room([self.capacity * max(1, field[:1].nbytes) for field in like], device)
        self._fields = [torch.empty(self.capacity, *t.shape[1:], dtype=t.dtype, device=device) for t in like]
        self._rows = [(field.dtype, field.shape[1:]) for field in self._fields]
        self._set_notes(
            [torch.full((self.capacity,), -1, dtype=dtype, device=device) for dtype in self._NOTES.values()]
        )
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._device = device

    def _like_first(self, batch: Any) -> list[Tensor]:
        """The fields of a batch on the buffer's device, once they are known to be like the first batch's."""
        if self._structure is None:
            raise RuntimeError("the buffer has seen no batch yet")
        fields = self._structure.fields(batch)
        count = fields[0].shape[:1]
        moved = False
        for k, (field, (dtype, shape)) in enumerate(zip(fields, self._rows, strict=True)):
            if field.dtype != dtype:
                raise TypeError(f"batch must have {dtype} in field {k} as the first one, got {_checks.describe(field)}")
            if field.dim() == 0 or field.shape[1:] != shape or field.shape[:1] != count:
                raise ValueError(
                    f"batch must have {list(count)} rows of shape {list(shape)} in field {k}, "
                    f"got {_checks.describe(field)}"
                )
            moved = moved or field.device != self._device
        return [field.to(self._device) for field in fields] if moved else fields

    def _set_seen(self, count: int) -> None:
        self._count = count
        self._seen.fill_(count)

    def _notes(self) -> list[Tensor]:  # [capacity] each
        return [getattr(self, f"_{name}") for name in self._NOTES]

    def _set_notes(self, notes: list[Tensor]) -> None:
        for name, note in zip(self._NOTES, notes, strict=True):
            setattr(self, f"_{name}", note)

    def _structured(self, fields: list[Tensor]) -> Any:
        return self._structure.batch(fields) if self._structure is not None else None

    def _next_draw(self) -> int:
        self._draws += 1
        return self._draws - 1

    def _choice(self, population: int, count: int, device: torch.device) -> Tensor:  # int64 [count]
        return sample_unchecked(population, count, self.seed, self._next_draw(), device)

    def _drawn(self, count: int) -> Tensor:  # int64 [count]
        """Places of different items."""
        held = len(self)
        if _checks.integer("count", count, minimum=0) > held:
            raise ValueError(f"count must be at most the {held} items held, got {count}")
        return self._choice(held, count, self._seen.device)

    def _keep(self, index: Tensor, capacity: int) -> None:
        """Allocate anew, with the rows of ``index`` in front."""
        old, old_notes = self._fields, self._notes()
        require_room([capacity * max(1, field[:1].nbytes) for field in old], index.device)
        new = [field.new_empty((capacity, *field.shape[1:])) for field in old]
        notes = [note.new_full((capacity,), -1) for note in old_notes]
        for field, rows in zip([*notes, *new], [*old_notes, *old], strict=True):
            field[: index.numel()] = rows[index]
        self._fields = new
        self._set_notes(notes)
