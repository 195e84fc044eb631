"""What a buffer holds, and where it lies: in memory, in page-locked memory, in files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from limpet import _checks, _core
from limpet.buffers.mapped import Folder, Header
from limpet.buffers.memory import require_room
from limpet.buffers.structure import Structure, row_of
from limpet.ops.reservoir import Row, gather_rows, plain_rows, seed_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_CPU = torch.device("cpu")


class StoredRows:
    """Rows of all fields of a batch, as many as there are slots, and beside them what the buffer notes of each slot."""

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
    _lost: int  # items let go before the slots were last filled anew, for buffers that count from there
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
        """Make an empty buffer.

        Args:
            capacity: how many items are kept, at least 1.
            seed: of all draws, in [0, 2^63).
            device: where the items lie; where the first batch does for ``None``.
            storage: ``"device"``; ``"pinned"``, page-locked memory of the CPU, from which samples (page-locked too) are
                copied to a CUDA device while it computes; ``"mmap"``, files, for buffers larger than memory. A process
                that is killed at any time leaves files with which :meth:`open` goes on.
            path: for ``"mmap"`` a folder for the files, new or empty.

        Raises:
            TypeError: ``capacity`` or ``seed`` is no integer.
            ValueError: one of them is out of range, there is no such storage, or ``path`` or ``device`` does not go
                with it.
            RuntimeError: ``storage`` is ``"pinned"`` without a CUDA device, or another buffer has the folder open.
            OSError: the folder cannot be written.
        """
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

    def __len__(self) -> int:
        """Items held."""
        return min(self._count, self.capacity)

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
        buffer._seen, buffer._count, buffer._draws = folder.seen, int(folder.seen), folder.draws
        buffer._lost = header.lost
        if header.structure is not None:
            buffer._structure = Structure.from_text(header.structure, len(header.rows))
            buffer._rows = [row_of(dtype, shape) for dtype, shape in header.rows]
            buffer._adopt(folder.tensors)
        buffer._plain = buffer._plain_rows()
        return buffer

    def close(self) -> None:
        """Let go of the folder, for ``storage="mmap"``, so that :meth:`open` may have it; other buffers have none.

        A buffer that was closed raises a ``RuntimeError`` whatever is done with it. Nothing is lost: see :meth:`flush`
        for power failures.
        """
        folder = self.__dict__.get("_folder")
        if folder is not None:
            path, kind = folder.path, type(self).__name__
            folder.close()
            self.__dict__.clear()  # from here on each use ends in __getattr__
            self.__dict__["_closed"] = f"{kind} in {path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if "_closed" in self.__dict__:
                raise RuntimeError(f"the buffer was closed, open() goes on with it: {self.__dict__['_closed']}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def flush(self) -> None:
        """Write everything down to the disk, for ``storage="mmap"``: what a power failure then leaves is whole.

        A killed process loses nothing, flushed or not. But after a power failure the rows of batches added since the
        last flush may be there in part, and nothing tells.
        """
        if self._folder is not None:
            self._folder.flush()

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles
        return {**self.__dict__, "_plain": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain = self._plain_rows()

    def _forget(self) -> None:
        """Be without items and without structure."""
        seen = torch.zeros((), dtype=torch.int64, device=_CPU)
        self._seen = seen if self._folder is None else self._folder.allocate([])[1]
        self._resume(0, 0)
        self._structure = None
        self._fields, self._rows, self._known, self._here = [], [], [], True
        self._set_notes([torch.empty(0, dtype=dtype, device=_CPU) for dtype in self._NOTES.values()])

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
            header = Header(self._KIND, self.capacity, self.seed, structure, rows, self._lost)
            self._folder.settle(header, self._draws)

    def _plain_rows(self) -> _core.PlainRows | None:
        if self._structure is None or self._device != _CPU or self.storage == "pinned":
            return None
        return plain_rows(self._structure.container, self._fields)

    def _resume(self, seen: int, held: int) -> None:
        """Go on behind so many items, of which those held lie in the first slots, oldest first where that matters."""
        self._count, self._lost = seen, seen - held
        self._seen.fill_(seen)

    def _notes(self) -> list[Tensor]:  # [capacity] each
        return [getattr(self, f"_{name}") for name in self._NOTES]

    def _set_notes(self, notes: list[Tensor]) -> None:
        for name, note in zip(self._NOTES, notes, strict=True):
            setattr(self, f"_{name}", note)

    def _write(self, slots: Tensor, rows: list[Tensor], count: int) -> None:  # int64 [some], ascending; [some, *] each
        """Write rows of notes and fields that a batch of so many items leaves; in files all of them or none."""
        held, seen = len(self), self._count + count
        taken = int((slots < held).sum())  # behind these come free slots, all in a row
        if taken < slots.numel():
            for stored, new in zip([*self._notes(), *self._fields], rows, strict=True):
                stored[held : held + slots.numel() - taken] = new[taken:]
        slots, rows = slots[:taken], [new[:taken] for new in rows]
        if self._folder is not None:
            self._folder.write(slots, rows, seen)
        else:
            for stored, new in zip([*self._notes(), *self._fields], rows, strict=True):
                stored[slots] = new
            self._seen.fill_(seen)
        self._count = seen

    def _keep(self, index: Tensor, capacity: int) -> None:
        """Change the capacity, with the rows of ``index`` in front."""
        if self._structure is None:  # no rows yet: what is new is the number alone, in the folder too
            self.capacity = capacity
            self._forget()
            self._settle()
            return
        self._replace(capacity, self.seen, [([*self._notes(), *self._fields], index)])

    def _replace(self, capacity: int, seen: int, parts: list[tuple[list[Tensor], Tensor]]) -> None:
        """Allocate anew, with rows of notes and fields one after the other, and take that for the buffer."""
        tensors, number = self._empty(capacity, self._seen.device)
        begin = 0
        for rows, index in parts:
            end = begin + index.numel()
            gather_rows(rows, index, into=[tensor[begin:end] for tensor in tensors])
            begin = end
        self._take(capacity, tensors, number, seen, begin)

    def _take(self, capacity: int, tensors: list[Tensor], number: Tensor, seen: int, held: int) -> None:
        """Have what :meth:`_empty` gave, with its first rows filled, for the buffer."""
        self.capacity, self._seen = capacity, number
        self._adopt(tensors)
        self._resume(seen, held)
        self._settle()


def last_writers(slots: Tensor) -> tuple[Tensor, Tensor]:  # int64 [count] -> [written], [written]
    """Slots that get an item, ascending, and the place of the last item that each gets."""
    places = (slots >= 0).nonzero().squeeze(1)
    slots, order = slots[places].sort(stable=True)
    last = torch.ones_like(slots, dtype=torch.bool)
    last[:-1] = slots[1:] != slots[:-1]
    return slots[last], places[order[last]]
