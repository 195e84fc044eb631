"""What all buffers have in common: the structure of their batches, samples, states."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from limpet import _checks, _core
from limpet.buffers import files
from limpet.buffers.stored import StoredRows
from limpet.buffers.structure import Structure, require_alike
from limpet.ops.reservoir import mixed_unchecked, sample_unchecked

if TYPE_CHECKING:
    from typing_extensions import Self


class Buffer(StoredRows, ABC):
    """A buffer of items from a stream: batches go in, samples come out.

    A batch is a tensor, or a tuple, list, dict or other pytree of tensors that have as many rows; the first one fixes
    the structure, the dtypes and the shapes of rows. Rows of any dtype and shape are copied once, and only those of
    items that are kept; the batch itself is not.

    What a kind of buffer adds is which items it keeps: :meth:`add`.

    Attributes:
        capacity: how many items are kept.
        seed: of all draws.
        seen: items seen so far.
        storage: where the rows lie: ``"device"``, ``"pinned"`` or ``"mmap"``.
    """

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
            rows = self._rows_of(plain, count)
            return rows if self._structure.direct else self._structure.batch(rows)
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
        structure = self._structure
        if structure is None:
            return batch
        if transform is None and (plain := self._core_rows()) is not None:
            rows = batch if structure.direct else structure.fields(batch)
            if (mixed := self._mixed(plain, rows, fraction)) is not None:
                return mixed if structure.direct else structure.batch(mixed)
        new = self._checked(batch)
        fused = self._here and transform is None
        if not self._here and self.storage == "device":
            new = [field.to(self._device) for field in new]
        count = new[0].shape[0]
        replayed = self._share(count, fraction)
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
        device = self._device or (read.fields[0].device if read.fields else torch.device("cpu"))
        restored = copy.copy(self)
        restored.capacity, restored.seed, restored._draws = read.capacity, read.seed, read.draws
        restored._forget()
        if structure is not None:
            restored._structure = structure
            restored._allocate(read.fields, device)
            for field, rows in zip([*restored._notes(), *restored._fields], [*read.notes, *read.fields], strict=True):
                field[: rows.shape[0]] = rows
            restored._resume(read.seen, read.fields[0].shape[0])
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

    def __repr__(self) -> str:
        if "_closed" in self.__dict__:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}(capacity={self.capacity}, seed={self.seed}, len={len(self)}, seen={self.seen})"

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

    def _like_first(self, batch: Any) -> list[Tensor]:
        """The fields of a batch on the buffer's device, once they are known to be like the first batch's."""
        return self._moved(self._checked(batch))

    def _rows_to_merge(self, other: Buffer) -> list[Tensor]:  # [len(other), *] each
        """The rows of a buffer of the same kind, once it is known that they are like this one's, and enough of them."""
        asked = min(self.capacity, other.seen)
        if other.capacity < asked:
            raise ValueError(
                f"other must hold {asked} items to be merged into {self.capacity} slots, "
                f"got a capacity of {other.capacity}"
            )
        theirs = other._structured([field[: len(other)] for field in other._fields])
        if self._structure is None:
            self._begin(theirs)
        return self._like_first(theirs)

    def _moved(self, fields: list[Tensor]) -> list[Tensor]:
        """Fields that were checked, on the buffer's device."""
        return fields if self._here else [field.detach().to(self._device) for field in fields]

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

    def _by_rows(self) -> bool:
        """Whether rows that stay are picked first: files want a journal, and rows on a GPU are not all moved."""
        return self.storage == "mmap" or (self.storage == "pinned" and not self._here)

    @staticmethod
    def _picked(fields: list[Tensor], places: Tensor) -> list[Tensor]:  # int64 [some] -> [some, *] each
        """Rows of a batch, from wherever it is, for a buffer on the CPU."""
        return [field.detach()[places.to(field.device)].to("cpu") for field in fields]

    def _core_rows(self) -> _core.PlainRows | None:
        return None if is_dynamo_compiling() else self._plain

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

    def _share(self, count: int, fraction: float) -> int:
        """How many items are replayed beside so many new ones."""
        return min(len(self), round(count * fraction / (1.0 - fraction)))

    def _rows_of(self, plain: _core.PlainRows, count: int) -> Any:
        """Different items held: as the core gives them."""
        return plain.gathered(None, self._drawn(count), torch.get_num_threads())

    def _mixed(self, plain: _core.PlainRows, new: Any, fraction: float) -> Any:
        """New rows and replayed ones, as the core takes and gives them; ``None`` where it cannot."""
        if (count := plain.count(new)) < 0:
            return None
        return plain.gathered(new, self._drawn(self._share(count, fraction)), torch.get_num_threads())

    def _replayed(self, new: list[Tensor], ahead: int, count: int) -> list[Tensor]:  # [ahead + count, *] each
        """New rows, and behind them those of different items held, by torch's own functions."""
        return mixed_unchecked(new, self._fields, self._drawn(count), ahead, self.storage == "pinned")
