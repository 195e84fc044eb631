"""The reservoir buffer: what it keeps, what it gives back, what it survives."""

import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reservoir_loop
from limpet import ReservoirBuffer

SEEDS = 10_000


def stream(start, count):
    """Items that carry their numbers: an image, a label, a text of bytes."""
    numbers = torch.arange(start, start + count)
    return {
        "image": numbers.view(-1, 1, 1).expand(-1, 2, 3).float(),
        "label": (numbers, numbers.to(torch.int16)),
        "text": [(numbers % 256).to(torch.uint8).unsqueeze(1)],
    }


def numbers_of(batch):
    """The items' numbers, once all fields of a batch agree on them."""
    numbers = batch["label"][0]
    assert torch.equal(batch["image"], numbers.view(-1, 1, 1).expand(-1, 2, 3).float())
    assert torch.equal(batch["label"][1], numbers.to(torch.int16))
    assert torch.equal(batch["text"][0], (numbers % 256).to(torch.uint8).unsqueeze(1))
    return numbers


@settings(max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 50), st.integers(0, 2**63 - 1))
def test_the_same_items_as_the_loop_whatever_the_cuts(cuts, capacity, seed):
    buffer, total = ReservoirBuffer(capacity, seed=seed), 0
    for count in cuts:
        buffer.add(stream(total, count))
        total += count
    expected = {}
    for item, slot in enumerate(reservoir_loop.slots(0, total, capacity, seed)):
        expected[slot] = item
    assert buffer.items.tolist() == [expected[slot] for slot in range(min(total, capacity))]
    assert (buffer.seen, len(buffer)) == (total, min(total, capacity))
    if total:
        assert numbers_of(buffer.sample(len(buffer))).sort()[0].tolist() == buffer.items.sort()[0].tolist()
        assert [int(item["label"][0]) for item in buffer] == buffer.items.tolist()


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def test_single_items_and_pairs_are_included_uniformly():
    items, capacity = 20, 6
    held = []
    for seed in range(SEEDS):
        buffer = ReservoirBuffer(capacity, seed=seed)
        buffer.add(torch.empty(items, 0))
        held.append(buffer.items)
    included = torch.zeros(SEEDS, items).scatter_(1, torch.stack(held), 1.0)
    single, pairs = included.sum(0), included.T @ included
    # Fixed seeds: 0.999 quantiles of the chi-square distributions with 19 and 189 degrees of freedom, which are upper
    # bounds since the counts of one buffer are negatively correlated.
    assert chi_square(single, torch.tensor(SEEDS * capacity / items)) < 43.8
    upper = pairs[torch.triu(torch.ones_like(pairs), 1).bool()]
    expected = SEEDS * capacity * (capacity - 1) / (items * (items - 1))
    assert chi_square(upper, torch.tensor(expected)) < 255.0


def test_samples_are_uniform_and_in_random_order():
    buffer = ReservoirBuffer(5, seed=3)
    buffer.add(torch.arange(5))
    counts = torch.zeros(5, 5, 5)
    for _ in range(6000):
        a, b, c = buffer.sample(3).tolist()
        counts[a, b, c] += 1
    different = counts[counts > 0]
    assert different.numel() == 60
    assert chi_square(different, torch.tensor(100.0)) < 98.3  # 0.999, 59 degrees of freedom


def hypergeometric(k, first, second, drawn):
    return comb(first, k) * comb(second, drawn - k) / comb(first + second, drawn)


def test_merged_shares_are_hypergeometric_and_their_rows_uniform():
    first, second, capacity, runs = 12, 8, 6, 4000
    rows = []
    for seed in range(runs):
        one, other = ReservoirBuffer(capacity, seed=2 * seed), ReservoirBuffer(capacity, seed=2 * seed + 1)
        one.add(torch.arange(first))
        other.add(torch.arange(first, first + second))
        one.merge(other)
        assert one.seen == first + second
        rows.append(one.sample(capacity))
        assert sorted(rows[-1].tolist()) == sorted(one.items.tolist())
    rows = torch.stack(rows)
    shares = (rows < first).sum(1).bincount(minlength=capacity + 1)
    included = rows.flatten().bincount()
    expected = runs * torch.tensor([hypergeometric(k, first, second, capacity) for k in range(capacity + 1)])
    assert chi_square(shares, expected) < 22.5  # 0.999, 6 degrees of freedom
    assert chi_square(included, torch.tensor(runs * capacity / (first + second))) < 43.8


def test_merging_small_streams_keeps_all_and_the_stream_goes_on():
    one, other = ReservoirBuffer(10, seed=0), ReservoirBuffer(3, seed=0)
    one.add(torch.arange(4))
    other.add(torch.arange(4, 7))
    one.merge(other)
    assert sorted(int(x) for x in one) == list(range(7))
    one.add(torch.arange(7, 40))
    assert (one.seen, len(one)) == (40, 10)
    assert torch.equal(torch.stack(list(one)), one.items)
    empty = ReservoirBuffer(10)
    empty.merge(one)
    assert torch.equal(empty.items.sort()[0], one.items.sort()[0])
    before = one.items.clone()
    one.merge(ReservoirBuffer(10))
    assert torch.equal(one.items, before)


def test_shrinking_is_uniform():
    rows = []
    for seed in range(4000):
        buffer = ReservoirBuffer(8, seed=seed)
        buffer.add(torch.arange(12))
        buffer.resize(3)
        rows.append(buffer.sample(3))
        assert (len(buffer), buffer.seen, buffer.capacity) == (3, 12, 3)
    assert chi_square(torch.cat(rows).bincount(), torch.tensor(1000.0)) < 31.3  # 0.999, 11 degrees of freedom


def test_growing():
    buffer = ReservoirBuffer(8, seed=0)
    buffer.add(torch.arange(5))
    buffer.resize(20)
    buffer.add(torch.arange(5, 20))
    assert torch.equal(torch.stack(list(buffer)), torch.arange(20))
    buffer.add(torch.arange(20, 21))
    with pytest.raises(ValueError, match="capacity must be at most 20: 1 items have been passed over"):
        buffer.resize(21)
    assert buffer.capacity == 20


def test_new_and_replayed_rows_in_one_batch():
    buffer = ReservoirBuffer(50, seed=1)
    untouched = torch.randn(4)
    assert buffer.sample_into(untouched) is untouched
    buffer.add(stream(0, 300))
    batch = buffer.sample_into(stream(300, 102))
    numbers = numbers_of(batch)
    assert numbers[:102].tolist() == list(range(300, 402))
    assert numbers.shape == (128,)
    assert set(numbers[102:].tolist()) <= set(buffer.items.tolist())
    assert numbers[102:].unique().numel() == 26
    assert numbers_of(buffer.sample_into(stream(300, 7), fraction=0.0)).shape == (7,)
    assert numbers_of(buffer.sample_into(stream(300, 40), fraction=0.9)).shape == (90,)  # it holds no more
    assert buffer.seen == 300


def resumed(buffer, tmp_path, way):
    if way == "file":
        buffer.save(tmp_path / "buffer")
        return ReservoirBuffer.load(tmp_path / "buffer")
    if way == "torch":
        torch.save(buffer.state_dict(), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
    else:
        state = buffer.state_dict()
    new = ReservoirBuffer(3)
    new.load_state_dict(state)
    return new


@pytest.mark.parametrize("way", ["file", "torch", "state"])
@pytest.mark.parametrize("seen", [0, 20, 200])
def test_resumed_in_the_middle_of_a_stream(tmp_path, way, seen):
    buffer = ReservoirBuffer(60, seed=2**60 + 7)
    if seen:
        buffer.add(stream(0, seen))
        buffer.sample(5)
    other = resumed(buffer, tmp_path, way)
    for one in (buffer, other):
        one.add(stream(seen, 333))
    assert torch.equal(buffer.items, other.items)
    assert torch.equal(numbers_of(buffer.sample(30)), numbers_of(other.sample(30)))
    assert (other.capacity, other.seed, other.seen) == (60, 2**60 + 7, seen + 333)


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "buffer"
    buffer = ReservoirBuffer(1000)
    buffer.add(torch.arange(1000))
    buffer.save(path)
    program = f"""
    import os, signal, torch
    from limpet import ReservoirBuffer
    from limpet.buffers import files
    buffer = ReservoirBuffer(100_000)
    buffer.add(torch.zeros(100_000, 100))
    replace = os.replace
    def killed(*names):
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killed  # everything is written but for the new name
    buffer.save({str(path)!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert torch.equal(torch.stack(list(ReservoirBuffer.load(path))), torch.arange(1000))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "buffer"
    buffer = ReservoirBuffer(100)
    buffer.add(torch.randn(100, 10))
    buffer.save(path)
    whole = path.read_bytes()
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"items": torch.zeros(2)}, path)
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "noise": b"\xff" * 200}[damage])
    with pytest.raises(ValueError, match="path must be a whole file of a saved buffer"):
        ReservoirBuffer.load(path)
    with pytest.raises(FileNotFoundError):
        ReservoirBuffer.load(tmp_path / "none")


def test_memory_does_not_grow_with_the_stream():
    resource = pytest.importorskip("resource")
    buffer = ReservoirBuffer(1000)

    def peak_after(batches):
        for _ in range(batches):
            buffer.add(torch.ones(1000, 784))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = peak_after(20)
    assert peak_after(100) - before < 4 * 1024  # of 314 MB
    assert sum(field.nbytes for field in buffer.state_dict()["fields"]) == 1000 * 784 * 4


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(6),
        (torch.arange(6),),
        [torch.arange(6), torch.arange(6)],
        Pair(torch.arange(6), torch.arange(6)),
        {"a": {"b": (torch.arange(6),)}},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_structures(batch):
    buffer = ReservoirBuffer(4)
    buffer.add(batch)
    buffer.add(batch)
    got = buffer.sample(2)
    assert type(got) is type(batch)
    assert str(type(buffer.sample_into(batch))) == str(type(batch))
    if isinstance(batch, Pair):
        with pytest.raises(TypeError, match="tuples, lists and dicts to be saved"):
            buffer.state_dict()
        return
    other = ReservoirBuffer(9)
    other.load_state_dict(buffer.state_dict())
    assert type(other.sample(1)) is type(batch)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (torch.randn(4, 3), ValueError, "structure of the first one"),
        ((torch.randn(4, 3), torch.arange(4), torch.arange(4)), ValueError, "structure of the first one"),
        ((torch.randn(4, 2), torch.arange(4)), ValueError, r"rows of shape \[3\] in field 0"),
        ((torch.randn(4, 3), torch.arange(5)), ValueError, r"\[4\] rows of shape \[\] in field 1"),
        ((torch.randn(4, 3).double(), torch.arange(4)), TypeError, "torch.float32 in field 0"),
        ((torch.randn(4, 3), 1), TypeError, "tensors alone, got int 1 as its field 1"),
    ],
)
def test_batches_unlike_the_first_change_nothing(batch, error, words):
    buffer = ReservoirBuffer(4)
    buffer.add((torch.randn(6, 3), torch.arange(6)))
    before = buffer.state_dict()
    for change in (buffer.add, buffer.sample_into):
        with pytest.raises(error, match=words):
            change(batch)
    after = buffer.state_dict()
    assert after["seen"] == before["seen"]
    assert all(map(torch.equal, after["fields"], before["fields"]))


@pytest.mark.parametrize("batch", [(), {}, (torch.zeros(3), torch.zeros(4)), torch.tensor(1.0)])
def test_first_batches_without_rows(batch):
    buffer = ReservoirBuffer(4)
    with pytest.raises(ValueError, match="batch must hold"):
        buffer.add(batch)
    buffer.add(torch.zeros(2))
    assert len(buffer) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": -3}, ValueError, "capacity must be at least 1, got -3"),
        ({"capacity": 1.5}, TypeError, "capacity must be an integer, got float 1.5"),
        ({"capacity": 1, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"capacity": 1, "seed": 2**63}, ValueError, "seed must be below"),
    ],
)
def test_refused_settings(arguments, error, words):
    with pytest.raises(error, match=words):
        ReservoirBuffer(**arguments)


def test_new_rows_keep_their_graph():
    buffer = ReservoirBuffer(10)
    x = torch.randn(6, 2, requires_grad=True)
    buffer.add(x)
    mixed = buffer.sample_into(x, fraction=0.5)
    (2 * mixed).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert not buffer.sample(3).requires_grad


def test_refused_uses():
    buffer = ReservoirBuffer(4)
    with pytest.raises(RuntimeError, match="the buffer has seen no batch yet"):
        buffer.sample(0)
    with pytest.raises(ValueError, match="at most the 0 items held, got 1"):
        buffer.sample(1)
    buffer.add(torch.arange(3))
    for count, words in ((4, "at most the 3 items held, got 4"), (-1, "count must be at least 0")):
        with pytest.raises(ValueError, match=words):
            buffer.sample(count)
    with pytest.raises(ValueError, match="fraction must be below 1"):
        buffer.sample_into(torch.arange(3), fraction=1.0)
    with pytest.raises(TypeError, match="other must be a ReservoirBuffer"):
        buffer.merge([1])
    with pytest.raises(ValueError, match="other must be another buffer"):
        buffer.merge(buffer)
    with pytest.raises(OSError, match="can be written"):
        buffer.save("no such folder/buffer")
    small = ReservoirBuffer(2)
    small.add(torch.arange(30))
    with pytest.raises(ValueError, match="other must hold 4 items"):
        buffer.merge(small)
    assert buffer.seen == 3


def test_a_capacity_that_no_memory_holds():
    buffer = ReservoirBuffer(2**50)
    with pytest.raises(ValueError, match=r"capacity must fit cpu: \d+ bytes are asked for, \d+ are free"):
        buffer.add(torch.zeros(1, 100))
    assert buffer.seen == 0


def filled(batch):
    buffer = ReservoirBuffer(4)
    buffer.add(batch)
    return buffer


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seen": -1}, ValueError),
        ({"capacity": "4"}, TypeError),
        ({"fields": []}, ValueError),
        ({"items": torch.arange(2)}, ValueError),
        ({"fields": [torch.zeros(2)]}, ValueError),
        ({"structure": None}, ValueError),
        ({"structure": "no JSON"}, ValueError),
        ({"structure": filled((torch.zeros(1), torch.zeros(1))).state_dict()["structure"]}, ValueError),
        ({"more": 1}, ValueError),
    ],
)
def test_refused_states(change, error):
    buffer = ReservoirBuffer(4)
    buffer.add(torch.arange(9))
    with pytest.raises(error):
        buffer.load_state_dict({**buffer.state_dict(), **change})
    assert buffer.seen == 9


def test_values_are_bits():
    x = torch.randn(64, 5).to(torch.float16)
    x[0] = torch.nan
    buffer = ReservoirBuffer(64)
    buffer.add(x)
    assert torch.equal(torch.stack(list(buffer)).view(torch.int16), x.view(torch.int16))
