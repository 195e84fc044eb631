"""The reservoir: items per second beside NumPy, and samples and mixed batches beside torch's own indexing."""

import itertools
import os

import numpy as np
import pytest
import torch

from limpet import Replay, ReservoirBuffer

CAPACITY, SEEN, REPEATS = 10_000, 1_000_000, 20


class NumpyReservoir:
    """The same algorithm, vectorised: NumPy's own generator, the last writer of a slot by assignment's order."""

    def __init__(self, row: int) -> None:
        self.rows, self.seen = np.zeros((CAPACITY, row), np.float32), SEEN
        self.generator = np.random.default_rng(0)

    def add(self, batch: np.ndarray) -> None:
        items = np.arange(self.seen + 1, self.seen + len(batch) + 1)
        slots = self.generator.integers(0, items)
        kept = slots < CAPACITY
        self.rows[slots[kept]] = batch[kept]
        self.seen += len(batch)


class TorchReservoir:
    """The same in torch, on the device that holds the buffer."""

    def __init__(self, row: int) -> None:
        self.rows, self.seen = torch.zeros(CAPACITY, row), SEEN

    def add(self, batch: torch.Tensor) -> None:
        items = torch.arange(self.seen + 1, self.seen + len(batch) + 1)
        slots = (torch.rand(len(batch), dtype=torch.float64) * items).long()
        kept = slots < CAPACITY
        self.rows[slots[kept]] = batch[kept]
        self.seen += len(batch)


def after_a_million(row):
    buffer = ReservoirBuffer(CAPACITY, seed=0)
    state = {**_filled(row).state_dict(), "seen": SEEN}
    buffer.load_state_dict(state)
    return buffer


def _filled(row):
    buffer = ReservoirBuffer(CAPACITY, seed=0)
    buffer.add(torch.randn(CAPACITY, row))
    return buffer


def many(call):
    def repeated():
        for _ in range(REPEATS):
            call()

    return repeated


@pytest.mark.parametrize(("row", "count", "target"), [(16, 4096, 300), (784, 4096, 100), (16, 256, 40)])
def test_insertion(row, count, target, compare):
    batch = torch.randn(count, row)
    ours, numpys, torchs = after_a_million(row), NumpyReservoir(row), TorchReservoir(row)
    array = batch.numpy()
    calls = {
        "ours": many(lambda: ours.add(batch)),
        "torch": many(lambda: torchs.add(batch)),
        "baseline": many(lambda: numpys.add(array)),
    }
    bound = f"{'at most 0.2; ' if row == 16 and count == 4096 else ''}{target} M items a second"
    result = compare(f"insert {count} rows of {row}, after 1M items and on", "NumPy, vectorised", bound, calls)
    result.notes["M items a second"] = round(REPEATS * count / result.milliseconds / 1e3)


def test_insertion_beside_copying(compare):
    batch, buffer = torch.randn(4096, 784), after_a_million(784)
    before = buffer.items.clone()
    buffer.add(batch)
    rows = int((buffer.items != before).sum())  # about 41 of 4096 stay; they get fewer
    stored = torch.zeros(CAPACITY, 784)
    slots, new = torch.randperm(CAPACITY)[:rows], torch.randperm(4096)[:rows]
    calls = {
        "ours": many(lambda: buffer.add(batch)),
        "baseline": many(lambda: stored.index_copy_(0, slots, batch[new])),
    }
    compare("insert 4096 rows of 784", f"copying the {rows} accepted rows alone", "at most 1.5", calls)


def test_deciding(compare):
    """Which of a million items stay, late in a stream: their rows have no bytes."""
    seen, count = 10**9, 2**20
    buffer, batch = ReservoirBuffer(CAPACITY), torch.empty(count, 0)
    buffer.load_state_dict({**_filled(0).state_dict(), "seen": seen})
    numbers = torch.arange(seen, seen + count)
    calls = {
        "ours": lambda: buffer.add(batch),
        "baseline": lambda: ((torch.rand(count, dtype=torch.float64) * numbers).long() < CAPACITY).nonzero(),
    }
    result = compare("decide on 2^20 items after 10^9", "torch, vectorised", "", calls)
    result.notes["G decisions a second"] = round(count / result.milliseconds / 1e6, 2)


def test_memory(compare):
    buffer, batch, copy = ReservoirBuffer(1000), torch.randn(1000, 784), torch.empty(1000, 784)

    def add():
        for _ in range(200):
            buffer.add(batch)

    def copies():
        for _ in range(200):
            copy.copy_(batch)

    buffer.add(batch)
    before = _resident()
    add()
    grown = _resident() - before
    result = compare(
        "200,000 rows of 784, capacity 1,000", "copying all batches", "no growth", {"ours": add, "baseline": copies}
    )
    result.notes |= {"MB grown": round(grown / 1e6, 1), "of MB": round(200 * batch.nbytes / 1e6)}


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_sampling(compare):
    x, y = torch.randn(CAPACITY, 784), torch.randint(10, (CAPACITY,))
    buffer = ReservoirBuffer(CAPACITY)
    buffer.add((x, y))
    ready = [torch.randint(CAPACITY, (128,)) for _ in range(100)]
    turn = itertools.cycle(ready)

    def indexed():
        index = next(turn)
        return x[index], y[index]

    calls = {
        "ours": many(lambda: buffer.sample(128)),
        "baseline": many(indexed),  # a sample's rows are other ones each time, so they come from memory
        "the same rows again": many(lambda: (x[ready[0]], y[ready[0]])),  # from the cache
    }
    compare("sample 128 rows of 784 with labels", "x[index], y[index], indices ready", "at most 1.15", calls)


def test_mixing(compare):
    x, y = torch.randn(102, 784), torch.randint(10, (102,))
    old_x, old_y = torch.randn(26, 784), torch.randint(10, (26,))
    replay = Replay(CAPACITY, fraction=0.2)
    replay.observe(torch.randn(CAPACITY, 784), torch.randint(10, (CAPACITY,)))
    assert replay.mix(x, y)[0].shape[0] == 128
    all_x, all_y = torch.randn(CAPACITY, 784), torch.randint(10, (CAPACITY,))
    turn = itertools.cycle([torch.randint(CAPACITY, (26,)) for _ in range(100)])

    def drawn():
        index = next(turn)
        return torch.cat([x, all_x[index]]), torch.cat([y, all_y[index]])

    calls = {
        "ours": many(lambda: replay.mix(x, y)),
        "baseline": many(lambda: (torch.cat([x, old_x]), torch.cat([y, old_y]))),
        "rows by ready indices": many(drawn),
    }
    compare("mix 102 new and 26 replayed rows of 784", "torch.cat of ready tensors", "at most 1.3", calls)
