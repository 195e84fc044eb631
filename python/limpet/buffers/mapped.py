"""A buffer's rows in files: larger than memory, and whole after a process that was killed at any time.

In the folder lie ``buffer.json``, which says what the buffer is, and one *generation* of files: a mapped file for each
note and field, the ``state`` (four integers), and the ``journal``. What changes the whole buffer (a new capacity, a
merge) writes another generation, and the renaming of ``buffer.json`` makes it the one that counts.

A batch overwrites single rows in place. So that it is there whole or not at all, the rows go to the journal first, and
one integer of the state says whether the journal counts; opening the folder writes those rows once more. A killed
process leaves what it wrote in the system's hands, in the order in which it wrote; a power failure does not.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

_SEEN, _DRAWS, _JOURNAL, _NEXT = range(4)  # of the state: rows in the journal that count, and `seen` once they do
_HEADER, _FORMAT = "buffer.json", "limpet mapped {} 1"

Spec = tuple[torch.dtype, tuple[int, ...]]


class Header(NamedTuple):
    """What a buffer is, beside its rows."""

    kind: str
    capacity: int
    seed: int
    structure: str | None
    rows: Sequence[Spec]  # of each field
    lost: int = 0  # items let go before the files were made, where slots are counted from there


class _Generation:
    """The files of one size, mapped."""

    def __init__(self, path: Path, specs: Sequence[Spec], *, create: bool) -> None:
        self.path = path
        self._maps: list[mmap.mmap] = []
        if create:
            path.mkdir()
        self.state = self._map("state", (torch.int64, (4,)), create)
        self.tensors = [self._map(f"rows.{k}", spec, create) for k, spec in enumerate(specs)]

    def _map(self, name: str, spec: Spec, create: bool) -> Tensor:
        dtype, shape = spec
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with open(self.path / name, "w+b" if create else "r+b") as file:
            if create and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a signal later
            elif create:
                file.truncate(size)
            if os.fstat(file.fileno()).st_size != size:
                raise ValueError(f"{name} has {os.fstat(file.fileno()).st_size} bytes instead of {size}")
            self._maps.append(mmap.mmap(file.fileno(), size))
        return torch.frombuffer(self._maps[-1], dtype=torch.uint8).view(dtype).view(shape)

    def write(self, slots: Tensor, rows: Sequence[Tensor], seen: int) -> None:
        if slots.numel():
            with open(self.path / "journal", "r+b" if (self.path / "journal").exists() else "w+b") as journal:
                for part in (slots, *rows):
                    if part.numel():
                        journal.write(_bytes(part.contiguous()))
            self.state[_NEXT] = seen
            self.state[_JOURNAL] = slots.numel()  # from here on the batch counts
            self._put(slots, rows)
        self.state[_SEEN] = seen
        self.state[_JOURNAL] = 0

    def redo(self) -> None:
        """Write what the journal holds, if it counts."""
        seen, draws, count, following = self.state.tolist()
        if min(seen, draws, count) < 0:
            raise ValueError("its state is damaged")
        if not count:
            return
        parts = [t.new_empty((count, *t.shape[1:])) for t in self.tensors]
        slots = self.state.new_empty(count)
        with open(self.path / "journal", "rb") as journal:
            for part in (slots, *parts):
                if part.numel() and journal.readinto(_bytes(part)) != part.nbytes:
                    raise ValueError("its journal is cut")
        if int(slots.min()) < 0 or int(slots.max()) >= self.tensors[0].shape[0]:
            raise ValueError("its journal is damaged")
        self._put(slots, parts)
        self.state[_SEEN] = following
        self.state[_JOURNAL] = 0

    def _put(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        for tensor, new in zip(self.tensors, rows, strict=True):
            tensor[slots] = new

    def flush(self) -> None:
        for mapped in self._maps[1:] + self._maps[:1]:
            mapped.flush()


class Folder:
    """The folder of one buffer, which no other buffer may have open meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = 0  # of the generation
        self._now: _Generation | None = None
        self._new: _Generation | None = None
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT)  # held as long as this object lives
        self._unlock = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"path must be a folder that no other buffer has open, got {str(path)!r}") from error

    def __reduce__(self) -> NoReturn:
        raise TypeError("a buffer with storage='mmap' cannot be copied or pickled: its files can be")

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Folder:
        """A new one.

        Raises:
            OSError: it cannot be written.
            RuntimeError: another buffer has it open.
            ValueError: it holds something already.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if (path / _HEADER).exists():
            raise ValueError(
                f"path must be a new folder, got {str(path)!r} with a buffer in it: open() goes on with it"
            )
        if unknown := [entry.name for entry in path.iterdir() if entry.name != "lock" and not entry.name.isdigit()]:
            raise ValueError(f"path must be a new or empty folder, got {str(path)!r} with {unknown[0]!r} in it")
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: str, notes: Mapping[str, torch.dtype]) -> tuple[Folder, Header]:
        """One that is there, with everything done that its journal says.

        Raises:
            OSError: it cannot be read.
            RuntimeError: another buffer has it open.
            ValueError: it holds no buffer of this kind, or files are cut or damaged.
        """
        path = Path(path)
        text = (path / _HEADER).read_text()
        folder = cls(path)
        try:
            read = json.loads(text)
            if read["format"] != _FORMAT.format(kind):
                raise ValueError(f"its format is {read['format']!r}")
            rows = [(_DTYPES[dtype], tuple(map(int, shape))) for dtype, shape in read["rows"]]
            header = Header(
                kind, int(read["capacity"]), int(read["seed"]), read["structure"], rows, int(read.get("lost", 0))
            )
            specs = [*((dtype, ()) for dtype in notes.values()), *rows] if header.structure is not None else []
            folder._number = int(read["generation"])
            folder._now = _Generation(
                path / str(folder._number),
                [(dtype, (header.capacity, *shape)) for dtype, shape in specs],
                create=False,
            )
            folder._now.redo()
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"path must be the whole folder of a buffer, got {str(path)!r}: {error}") from error
        folder._clear()
        return folder, header

    @property
    def tensors(self) -> list[Tensor]:  # [capacity, *] each
        """Notes and fields."""
        return self._generation.tensors

    @property
    def seen(self) -> Tensor:  # int64 []
        """Items seen."""
        return self._generation.state[_SEEN]

    @property
    def draws(self) -> int:
        """Samples taken."""
        return int(self._generation.state[_DRAWS])

    @draws.setter
    def draws(self, value: int) -> None:
        self._generation.state[_DRAWS] = value

    def allocate(self, specs: Sequence[Spec]) -> tuple[list[Tensor], Tensor]:  # [capacity, *] each; int64 []
        """Files for notes and fields, and for how many items were seen; they count once :meth:`settle` says so."""
        self._clear()
        self._new = _Generation(self.path / str(self._number + 1), specs, create=True)
        return self._new.tensors, self._new.state[_SEEN]

    def settle(self, header: Header, draws: int) -> None:
        """Make the files that were allocated last the buffer's."""
        if self._new is None:
            raise RuntimeError("nothing was allocated")
        self._new.state[_DRAWS] = draws
        text = {
            "format": _FORMAT.format(header.kind),
            **header._asdict(),
            "generation": self._number + 1,
            "rows": [(str(dtype).removeprefix("torch."), list(shape)) for dtype, shape in header.rows],
        }
        beside = self.path / f"{self._number + 1}" / _HEADER
        beside.write_text(json.dumps(text))
        os.replace(beside, self.path / _HEADER)
        self._now, self._new, self._number = self._new, None, self._number + 1
        self._clear()

    def write(self, slots: Tensor, rows: Sequence[Tensor], seen: int) -> None:  # int64 [count]; [count, *] each
        """Overwrite rows of notes and fields, all of them or none, and say how many items were seen then.

        Rows of free slots need no journal: they count once ``seen`` says so, and may be written before.
        """
        self._generation.write(slots, rows, seen)

    def flush(self) -> None:
        """Write everything down to the disk."""
        self._generation.flush()
        for path in (self.path / _HEADER, self._generation.path, self.path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Let another buffer have it. Tensors that are still in use stay mapped."""
        self._now = self._new = None
        self._unlock()

    @property
    def _generation(self) -> _Generation:
        if self._now is None:
            raise RuntimeError("nothing was allocated")
        return self._now

    def _clear(self) -> None:
        """Remove generations that do not count."""
        self._new = None
        for entry in self.path.iterdir():
            if entry.name.isdigit() and (self._now is None or entry.name != str(self._number)):
                shutil.rmtree(entry)


_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor without gaps."""
    return tensor.view(-1).view(torch.uint8).numpy().data
