"""What all buffers have in common: the structure of their batches, their rows, samples, states and files."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from limpet import _checks, _core
from limpet.buffers import files
from limpet.buffers.mapped import Folder, Header
from limpet.buffers.memory import require_room
from limpet.buffers.structure import Structure, require_alike, row_of
from limpet.ops.reservoir import Row, gather_rows, mixed_unchecked, plain_rows, sample_unchecked, seed_of

if TYPE_CHECKING:
    from typing_extensions import Self

_CPU = torch.device("cpu")


class Buffer(ABC):
    """Rows of all fields of a batch, as many as there are slots, and beside them what the buffer notes of each slot.

    What a kind of buffer adds is which items it keeps: :meth:`add`.
    """

    _KIND: ClassVar[str]  # its name in files
    _NOTES: ClassVar[dict[str, torch.dtype]] = {"items": torch.int64}  # of each slot; the attribute `_items`, and so on

    _FULL: ClassVar[bool] = True  # it holds as many of the items seen as it has slots for

    _items: Tensor  # int64 [capacity], the number of the item in each slot; -1 in free ones
    _count: int  # items seen, as the host knows it: reading the device's number would wait for the device
    _seen: Tensor  # int64 [], the same
    _structure: Structure | None
    _fields: list[Tensor]  # [capacity, *] each
    _rows: list[Row]  # of each field
    _known: list[Any]  # what was looked at in the last batch that was like the first
    _here: bool  # whether that one was on the buffer's device, and without gradients
    _plain: _core.PlainRows | None  # takes batches and makes samples at once, where that is possible

    def __init__(
        self,
        capacity: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.capacity = _checks.integer("capacity", capacity, minimum=1)
        self.seed = seed_of(seed)
        self.storage = _checks.one_of("storage", storage, ("device", "pinned", "mmap"))
        self._device = None if device is None else torch.device(device)
        if storage != "device":
            if self._device not in (None, _CPU):
                raise ValueError(f"device must be the CPU or None with storage={storage!r}, got {device!r}")
            self._device = _CPU
        if (path is None) == (storage == "mmap"):
            raise ValueError(f"path must be given with storage='mmap' and with no other, got {path!r} and {storage!r}")
        if storage == "pinned" and not torch.cuda.is_available():
            raise RuntimeError("storage='pinned' needs a CUDA device, whose driver locks the pages; there is none")
        self._folder = None if path is None else Folder.create(path)
        self._draws = 0  # samples taken so far
        self._forget()
        self._settle()

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
        held = len(self)
        if _checks.integer("count", count, minimum=0) > held:
            raise ValueError(f"count must be at most the {held} items held, got {count}")
        if self._structure is None:
            raise RuntimeError("the buffer has seen no batch yet")
        if (plain := self._core_rows()) is not None:
            return self._structure.from_core(self._joined(plain, None, held, count))
        return self._structured(self._replayed([], 0, count))

    def sample_into(
        self, batch: Any, fraction: float = 0.2, *, transform: Callable[[Any], Any] | None = None
    ) -> Any:  # tensors [count, *] -> [count + replayed, *]
        """New items followed by as many sampled ones as make up ``fraction`` of the whole; fewer if there are fewer.

        The new ones are not added: call :meth:`add` for that, usually after the step.

        Args:
            batch: new items, of the structure that was added, on any device; the result is on the buffer's, or on the
                batch's where the buffer has another storage than ``"device"``.
            fraction: the sampled items' share of the result, in [0, 1).
            transform: what the batch of sampled ones goes through first: an augmentation, which keeps structure,
                shapes and dtypes.

        Raises:
            TypeError: as :meth:`add`, for the batch and for what ``transform`` gives; or ``fraction`` is no number.
            ValueError: as :meth:`add`, likewise; or ``fraction`` is out of range.
        """
        if type(fraction) is not float or not 0.0 <= fraction < 1.0:  # spelled out: this is called at every step
            fraction = _checks.finite_number("fraction", fraction, minimum=0.0)
            if fraction >= 1.0:
                raise ValueError(f"fraction must be below 1, got {fraction}")
        if self._structure is None:
            return batch
        if transform is None and (plain := self._core_rows()) is not None:
            rows = self._structure.for_core(batch)
            if (count := plain.count(rows)) >= 0:
                held = len(self)
                replayed = min(held, round(count * fraction / (1.0 - fraction)))
                return self._structure.from_core(self._joined(plain, rows, held, replayed))
        new = self._checked(batch)
        fused = self._here and transform is None
        if not self._here and self.storage == "device":
            new = [field.to(self._device) for field in new]
        count = new[0].shape[0]
        replayed = min(len(self), round(count * fraction / (1.0 - fraction)))
        if fused:
            return self._structured(self._replayed(new, count, replayed))
        sampled = self.sample(replayed)
        if transform is not None and replayed:
            sampled = transform(sampled)
        old = [old.to(new.device, non_blocking=True) for new, old in zip(new, self._checked(sampled), strict=True)]
        return self._structured([torch.cat(pair) for pair in zip(new, old, strict=True)])

    def __iter__(self) -> Iterator[Any]:
        """The items held, slot by slot, as rows of the structure that was added."""
        for slot in range(len(self)):
            yield self._structured([field[slot] for field in self._fields])

    def to(self, device: torch.device | str) -> Self:
        """Move the buffer; gives itself.

        Raises:
            RuntimeError: the storage is another than ``"device"``: it stays where it is.
            ValueError: there is not enough memory. Nothing has changed then.
        """
        device = torch.device(device)
        if self.storage != "device":
            if device == _CPU:
                return self
            raise RuntimeError(
                f"a buffer with storage={self.storage!r} stays on the CPU: move the samples to {device}, or save the "
                f"buffer and load it there"
            )
        if self._fields:
            require_room([field.nbytes for field in self._fields], device)
        self._fields = [field.to(device) for field in self._fields]
        self._set_notes([note.to(device) for note in self._notes()])
        self._seen = self._seen.to(device)
        self._device, self._known = device, []
        self._plain = self._plain_rows()
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
        structure = None if read.structure is None else Structure.from_text(read.structure, len(read.fields))
        device = self._device or (read.fields[0].device if read.fields else _CPU)
        restored = copy.copy(self)
        restored.capacity, restored.seed, restored._draws = read.capacity, read.seed, read.draws
        restored._forget()
        if structure is not None:
            restored._structure = structure
            restored._allocate(read.fields, device)
            for field, rows in zip([*restored._notes(), *restored._fields], [*read.notes, *read.fields], strict=True):
                field[: rows.shape[0]] = rows
            restored._set_seen(read.seen)
        restored._settle()
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

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Go on with a buffer of ``storage="mmap"``, as it was after the last batch that was added whole.

        A process that is killed at any time leaves such a folder; ``seen`` says which item of the stream is next.

        Raises:
            OSError: the folder cannot be read.
            RuntimeError: another buffer has it open.
            ValueError: it holds no such buffer, or files are cut or damaged.
        """
        folder, header = Folder.open(path, cls._KIND, cls._NOTES)
        buffer = cls(header.capacity, seed=header.seed)
        buffer.storage, buffer._device, buffer._folder = "mmap", _CPU, folder
        if header.structure is not None:
            buffer._structure = Structure.from_text(header.structure, len(header.rows))
            buffer._rows = [row_of(dtype, shape) for dtype, shape in header.rows]
            buffer._adopt(folder.tensors)
        buffer._seen, buffer._count, buffer._draws = folder.seen, int(folder.seen), folder.draws
        buffer._plain = buffer._plain_rows()
        return buffer

    def flush(self) -> None:
        """Write everything down to the disk, for ``storage="mmap"``: what a power failure then leaves is whole.

        A killed process loses nothing, flushed or not. But after a power failure the rows of batches added since the
        last flush may be there in part, and nothing tells.
        """
        if self._folder is not None:
            self._folder.flush()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(capacity={self.capacity}, seed={self.seed}, len={len(self)}, seen={self.seen})"

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles
        return {**self.__dict__, "_plain": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain = self._plain_rows()

    def _forget(self) -> None:
        """Be without items and without structure."""
        self._count = 0
        seen = torch.zeros((), dtype=torch.int64, device=_CPU)
        self._seen = seen if self._folder is None else self._folder.allocate([])[1]
        self._structure = None
        self._fields, self._rows, self._known, self._here = [], [], [], True
        self._set_notes([torch.empty(0, dtype=dtype, device=_CPU) for dtype in self._NOTES.values()])

    def _begin(self, batch: Any) -> Structure:
        """Take structure, dtypes and shapes from the first batch."""
        structure, fields = self._first(batch)
        if self._folder is not None:
            structure.to_text()
        self._allocate(fields, self._device or fields[0].device)
        self._structure = structure
        self._settle()
        return structure

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
        self._rows = [row_of(field.dtype, field.shape[1:]) for field in like]
        tensors, self._seen = self._empty(self.capacity, device)
        self._adopt(tensors)
        self._device, self._known = device, []

    def _empty(self, capacity: int, device: torch.device) -> tuple[list[Tensor], Tensor]:  # [capacity, *] each; []
        """Notes and fields of free slots, and how many items were seen: none."""
        rows = [*(row_of(dtype, ()) for dtype in self._NOTES.values()), *self._rows]
        require_room(
            [capacity * max(1, size) for _, _, size in rows],
            device,
            None if self._folder is None else self._folder.path,
        )
        if self._folder is not None:
            tensors, seen = self._folder.allocate([(dtype, (capacity, *shape)) for dtype, shape, _ in rows])
        else:
            pin = self.storage == "pinned"
            tensors = [
                torch.empty(capacity, *shape, dtype=dtype, device=device, pin_memory=pin) for dtype, shape, _ in rows
            ]
            seen = torch.zeros((), dtype=torch.int64, device=device)
        for note in tensors[: len(self._NOTES)]:
            note.fill_(-1)
        return tensors, seen

    def _adopt(self, tensors: list[Tensor]) -> None:
        """Take notes and fields for the buffer's."""
        self._set_notes(tensors[: len(self._NOTES)])
        self._fields = tensors[len(self._NOTES) :]

    def _settle(self) -> None:
        """What was allocated last is the buffer from here on, in its folder too."""
        self._plain = self._plain_rows()
        if self._folder is not None:
            structure = None if self._structure is None else self._structure.to_text()
            rows = [(dtype, shape) for dtype, shape, _ in self._rows] if structure is not None else []
            self._folder.settle(Header(self._KIND, self.capacity, self.seed, structure, rows), self._draws)

    def _like_first(self, batch: Any) -> list[Tensor]:
        """The fields of a batch on the buffer's device, once they are known to be like the first batch's."""
        fields = self._checked(batch)
        return fields if self._here else [field.to(self._device) for field in fields]

    def _checked(self, batch: Any) -> list[Tensor]:
        """The fields of a batch wherever they are, once they are known to be like the first batch's."""
        if self._structure is None:
            raise RuntimeError("the buffer has seen no batch yet")
        fields = self._structure.fields(batch)
        known = [(field.dtype, field.shape, field.device, field.requires_grad) for field in fields]
        if known == self._known:  # the usual case, in a fraction of the time
            return fields
        require_alike(fields, self._rows)
        self._known = known
        self._here = all(field.device == self._device and not field.requires_grad for field in fields)
        return fields

    def _plain_rows(self) -> _core.PlainRows | None:
        if self._structure is None or self._device != _CPU or self.storage == "pinned":
            return None
        return plain_rows(self._structure.container, self._fields)

    def _core_rows(self) -> _core.PlainRows | None:
        return None if is_dynamo_compiling() else self._plain

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
        if self._folder is not None:
            self._folder.draws = self._draws
        return self._draws - 1

    def _choice(self, population: int, count: int, device: torch.device) -> Tensor:  # int64 [count]
        return sample_unchecked(population, count, self.seed, self._next_draw(), device)

    def _drawn(self, count: int) -> Tensor:  # int64 [count]
        """Places of different items."""
        return self._choice(len(self), count, self._seen.device)

    def _joined(self, plain: _core.PlainRows, new: Any, held: int, count: int) -> Any:
        """New rows, and behind them ``count`` of the items held: as the core takes and gives them."""
        return plain.gathered(new, self._drawn(count), torch.get_num_threads())

    def _replayed(self, new: list[Tensor], ahead: int, count: int) -> list[Tensor]:  # [ahead + count, *] each
        """The same by torch's own functions."""
        return mixed_unchecked(new, self._fields, self._drawn(count), ahead, self.storage == "pinned")

    def _write(self, slots: Tensor, rows: list[Tensor], seen: int) -> None:  # int64 [count]; [count, *] each
        """Overwrite rows of notes and fields, in files all of them or none, and say how many items were seen then."""
        if self._folder is not None:
            self._folder.write(slots, rows, seen)
        else:
            for stored, new in zip([*self._notes(), *self._fields], rows, strict=True):
                stored[slots] = new
            self._seen.fill_(seen)
        self._count = seen

    def _keep(self, index: Tensor, capacity: int) -> None:
        """Change the capacity, with the rows of ``index`` in front."""
        self._replace(capacity, self.seen, [([*self._notes(), *self._fields], index)])

    def _replace(self, capacity: int, seen: int, parts: list[tuple[list[Tensor], Tensor]]) -> None:
        """Allocate anew, with rows of notes and fields one after the other, and take that for the buffer."""
        tensors, number = self._empty(capacity, self._seen.device)
        begin = 0
        for rows, index in parts:
            end = begin + index.numel()
            gather_rows(rows, index, into=[tensor[begin:end] for tensor in tensors])
            begin = end
        self._take(capacity, tensors, number, seen)

    def _take(self, capacity: int, tensors: list[Tensor], number: Tensor, seen: int) -> None:
        """Have what :meth:`_empty` gave, filled, for the buffer."""
        self.capacity, self._seen = capacity, number
        self._adopt(tensors)
        self._set_seen(seen)
        self._settle()
