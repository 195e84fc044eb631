"""What a column reads of earlier ones, computed once for a data set that fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from limpet import _checks
from limpet.buffers.memory import require_room
from limpet.fisher.batches import mapped, tensors
from limpet.methods.progressive.column import Column, Columns, Features


class FeatureCache:
    """Features that a task's column reads, sample by sample; ``cache[index]`` are those of some samples.

    :meth:`limpet.ProgressiveNetwork.cache_features` makes it.

    Attributes:
        column: which reads.
        features: of each column that is read, point by point: tensors [N, *].
    """

    def __init__(self, column: Column, features: Mapping[int, Features], came_from: list[Tensor]) -> None:
        self.column, self.features = column, features
        self._came_from, self._versions = came_from, _versions(came_from)

    @property
    def nbytes(self) -> int:
        """The bytes of all features."""
        return sum(t.nbytes for t in self._tensors())

    def __len__(self) -> int:
        return next((len(t) for t in self._tensors()), 0)

    def __repr__(self) -> str:
        return f"FeatureCache({len(self)} samples, {self.nbytes} bytes)"

    def __getitem__(self, index: Any) -> FeatureCache:
        """The features of some samples.

        Args:
            index: int64 [n], a slice or a mask: which samples of the data set, in the batch's order.

        Raises:
            RuntimeError: an earlier column was changed, moved or cast since.
        """
        if _versions(self._came_from) != self._versions:
            raise RuntimeError("an earlier column was changed, moved or cast: call cache_features again")
        if isinstance(index, Tensor):
            index = index.to(next((t.device for t in self._tensors()), None))
        rows: dict[int, Features] = {
            number: [None if t is None else t[index] for t in points] for number, points in self.features.items()
        }
        return FeatureCache(self.column, rows, [])

    def read_by(self, column: Column, x: Any) -> Mapping[int, Features]:
        """The features, where they are a column's, and those of a batch.

        Raises:
            ValueError: they are another column's, or of more or fewer samples; an input requires a gradient.
        """
        if column is not self.column:
            raise ValueError("features must be those of the task's own column in this network, got another column's")
        for given in tensors(x):
            if given.requires_grad:
                raise ValueError("inputs must not require a gradient beside cached features: it would be cut there")
            if any(len(t) != len(given) for t in self._tensors()):
                raise ValueError(f"features must be of the batch's {len(given)} samples, got {len(self)}")
        return self.features

    def _tensors(self) -> Iterator[Tensor]:
        return (t for points in self.features.values() for t in points if t is not None)


def nbytes(columns: Columns, number: int, inputs: Any) -> int:
    """The bytes that :func:`fill` would take; runs one sample."""
    count = _count(inputs)
    return sum(count * t.nbytes for _, _, t in _read(columns, number, _cut(columns, inputs, 0, 1)))


@torch.no_grad()
def fill(columns: Columns, number: int, inputs: Any, batch_size: int) -> FeatureCache:
    """Run what a column reads over a data set, batch after batch."""
    count = _count(inputs)
    sources = sorted(columns[number].sources)
    features: dict[int, Features] = {source: [None] * len(columns[source].points) for source in sources}
    for first in range(0, count, batch_size):
        read = _read(columns, number, _cut(columns, inputs, first, first + batch_size))
        if first == 0:
            sizes = [count * (t.nbytes // len(t)) for _, _, t in read]
            if read:
                require_room(sizes, read[0][2].device, what="cached features")
            for point, source, t in read:
                features[source][point] = t.new_empty((count, *t.shape[1:]))
        for point, source, t in read:
            store = features[source][point]
            if store is not None:
                store[first : first + batch_size] = t
    needed = (columns[k] for k in columns.needed(sources))
    return FeatureCache(columns[number], features, [t for c in needed for t in (*c.parameters(), *c.buffers())])


@torch.no_grad()
def _read(columns: Columns, number: int, x: Any) -> list[tuple[int, int, Tensor]]:
    """What a column reads of a batch: points, columns and features."""
    pairs = sorted(columns[number].pairs)
    _, features = columns.run(x, columns[number].sources)
    read = [(point, source, features[source][point]) for point, source in pairs]
    return [(point, source, t) for point, source, t in read if t is not None]


def _count(inputs: Any) -> int:
    """The samples in a data set."""
    counts = {t.shape[0] if t.dim() else 0 for t in tensors(inputs)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"inputs must be tensors [N, *] of as many samples each, one at least, got "
            f"{', '.join(map(_checks.describe, tensors(inputs))) or _checks.describe(inputs)}"
        )
    return counts.pop()


def _cut(columns: Columns, inputs: Any, first: int, last: int) -> Any:
    """Some samples, where the columns are."""
    like = next(columns.parameters(), None)
    return mapped(lambda t: t[first:last].to(None if like is None else like.device), inputs)


def _versions(came_from: list[Tensor]) -> list[tuple[int, int]]:
    """Changes whenever a tensor is written to or lies elsewhere."""
    return [(t.data_ptr(), t._version) for t in came_from]
