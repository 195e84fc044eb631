"""Equal shares, weighted items and the ring: items per second beside NumPy of the same law, and beside public ways."""

import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from limpet import ClassBalancedReservoir, RingBuffer, WeightedReservoir

CAPACITY, SEEN, CLASSES, ROW = 10_000, 1_000_000, 10, 16


class NumpyKeyed:
    """The same law, vectorised: NumPy's own keys; what a group's bound lets through is sorted in with what is held."""

    def __init__(self, items: int) -> None:
        self.generator = np.random.default_rng(0)
        self.rows = np.zeros((CAPACITY, ROW), np.float32)
        self.groups = np.arange(CAPACITY) % CLASSES
        self.keys = self.generator.random(CAPACITY) * CAPACITY / items  # as after so many items of weight 1/2
        self._bound()

    def add(self, batch: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> None:
        keys = self.generator.random(len(batch))
        if weights is not None:
            keys = -np.log1p(-keys) / weights
        new = np.flatnonzero(keys < self.bounds[groups])
        if not len(new):
            return
        keys, groups = np.concatenate([self.keys, keys[new]]), np.concatenate([self.groups, groups[new]])
        order = np.lexsort((keys, groups))
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        kept = np.zeros(len(order), bool)
        kept[order[np.lexsort((groups[order], rank))[:CAPACITY]]] = True
        slots, come = np.flatnonzero(~kept[:CAPACITY]), CAPACITY + np.flatnonzero(kept[CAPACITY:])
        self.rows[slots] = batch[new[come - CAPACITY]]
        self.keys[slots], self.groups[slots] = keys[come], groups[come]
        self._bound()

    def _bound(self) -> None:
        self.bounds = np.zeros(CLASSES)
        np.maximum.at(self.bounds, self.groups, self.keys)


class DictOfReservoirs:
    """A reservoir for each class in Python, item by item, as public buffers have it; the classes are known here."""

    def __init__(self) -> None:
        self.rows = {label: torch.zeros(CAPACITY // CLASSES, ROW) for label in range(CLASSES)}
        self.seen = defaultdict(lambda: SEEN // CLASSES)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for row, label in zip(x, y.tolist(), strict=True):
            self.seen[label] += 1
            slot = random.randrange(self.seen[label])
            if slot < CAPACITY // CLASSES:
                self.rows[label][slot] = row


class SortedByKey:
    """As Avalanche keeps them: random keys of all items are sorted at each batch, and the rows concatenated."""

    def __init__(self) -> None:
        self.keys, self.rows = torch.rand(CAPACITY), torch.zeros(CAPACITY, ROW)

    def add(self, x: torch.Tensor) -> None:
        keys, rows = torch.cat([self.keys, torch.rand(len(x))]), torch.cat([self.rows, x])
        keys, order = keys.sort()
        self.keys, self.rows = keys[:CAPACITY], rows[order[:CAPACITY]]


def many(call, times):
    def repeated():
        for _ in range(times):
            call()

    return repeated


def stream(count):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, ROW), torch.randint(CLASSES, (count,), generator=generator)
    return x, y, torch.rand(count, generator=generator) + 1e-3


def after_a_million(buffer, add):
    for _ in range(SEEN // 4096):
        add(buffer, *stream(4096))
    return buffer


def balanced(buffer, x, y, weights):
    buffer.add((x, y))


def weighted(buffer, x, y, weights):
    buffer.add((x, y), weight=weights)


def measured(compare, count, ours, numpys, what, peers=None):
    """``ours`` and ``numpys`` add one batch; the items that are let through grow fewer alike."""
    times = 81_920 // count
    calls = {"ours": many(ours, times), "baseline": many(numpys, times)}
    calls |= {name: many(call, times) for name, call in (peers or {}).items()}
    bound = "50 M items a second" if count == 4096 else ""
    result = compare(f"{what}, {count} rows of {ROW}, after 1M items and on", "NumPy, vectorised", bound, calls)
    result.notes["M items a second"] = round(times * count / result.milliseconds / 1e3)


COUNTS = pytest.mark.parametrize("count", [256, 4096])


@COUNTS
def test_equal_shares(count, compare, in_earnest):
    x, y, _ = stream(count)
    buffer, numpys = after_a_million(ClassBalancedReservoir(CAPACITY), balanced), NumpyKeyed(SEEN)
    array, groups, peers = x.numpy(), y.numpy(), {}
    if in_earnest and count == 4096:
        loop, sort = DictOfReservoirs(), SortedByKey()
        peers = {"dict of reservoirs": lambda: loop.add(x, y), "sort and cat": lambda: sort.add(x)}
    measured(compare, count, lambda: buffer.add((x, y)), lambda: numpys.add(array, groups), "class-balanced", peers)


@COUNTS
def test_weighted(count, compare):
    x, y, weights = stream(count)
    buffer, numpys = after_a_million(WeightedReservoir(CAPACITY), weighted), NumpyKeyed(SEEN)
    numpys.groups[:] = 0
    numpys._bound()
    array, groups, double = x.numpy(), np.zeros(count, np.int64), weights.double().numpy()
    measured(
        compare,
        count,
        lambda: buffer.add((x, y), weight=weights),
        lambda: numpys.add(array, groups, double),
        "weighted",
    )


@COUNTS
def test_ring(count, compare):
    x, y, _ = stream(count)
    buffer, rows = RingBuffer(CAPACITY), [torch.zeros(CAPACITY, ROW), torch.zeros(CAPACITY, dtype=torch.int64)]
    to, times = [torch.zeros(count, ROW), torch.zeros(count, dtype=torch.int64)], 81_920 // count

    def cat():
        rows[:] = [torch.cat([old, new])[-CAPACITY:] for old, new in zip(rows, (x, y), strict=True)]

    calls = {
        "ours": many(lambda: buffer.add((x, y)), times),
        "cat": many(cat, times),
        "baseline": many(lambda: (to[0].copy_(x), to[1].copy_(y)), times),
    }
    result = compare(f"ring, {count} rows of {ROW} with labels", "copying the rows alone", "", calls)
    result.notes["M items a second"] = round(times * count / result.milliseconds / 1e3)
