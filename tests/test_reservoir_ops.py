"""The reservoir's ops against the textbook's loops, in every backend that runs here."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reservoir_loop
from limpet import _core, ops, reference

SEEDS = st.integers(0, 2**63 - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(0, 120), st.integers(1, 150), SEEDS)
def test_slots_are_those_of_the_loop(seen, count, capacity, seed):
    expected = list(reservoir_loop.slots(seen, seen + count, capacity, seed))
    assert ops.reservoir_slots(seen, count, capacity, seed).tolist() == expected
    slots = torch.empty(count, dtype=torch.int64)
    reference.reservoir_slots_(slots, seen, capacity, seed)
    assert slots.tolist() == expected


@pytest.mark.parametrize("seen", [10**6, 2**31 - 700, 2**32 - 700, 2**40 + 1, 2**62 + 12345])
@pytest.mark.parametrize("capacity", [1, 1000, 10**6])
def test_slots_of_long_streams(seen, capacity):
    slots = ops.reservoir_slots(seen, 5000, capacity, 3)
    expected = torch.empty_like(slots)
    reference.reservoir_slots_(expected, seen, capacity, 3)
    assert torch.equal(slots, expected)


def test_what_is_left_over_is_drawn_again():
    # Just over half of 2^62 + 2^61 is the worst range: a quarter of all draws are left over.
    seen = 2**62 + 2**61
    slots = ops.reservoir_slots(seen, 400, 2**61, 5)
    assert slots.tolist() == list(reservoir_loop.slots(seen, seen + 400, 2**61, 5))
    counters = [[(seen + k) // 2 & 0xFFFFFFFF, (seen + k) // 2 >> 32, 0, 1 << 16] for k in range(400)]
    words = reference.philox(torch.tensor(counters), (5, 0))
    again = sum((w[2 * (k % 2)] << 31 | w[2 * (k % 2) + 1] >> 1) >= seen + k + 1 for k, w in enumerate(words.tolist()))
    assert again > 50


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 60), SEEDS, st.data())
def test_insertion_equals_the_loop_however_the_stream_is_cut(cuts, capacity, seed, data):
    total = sum(cuts)
    x = torch.arange(total * 6, dtype=torch.int16).view(total, 3, 2)
    y = torch.arange(total, dtype=torch.float64)
    expected: dict[int, int] = {}
    for item, slot in enumerate(reservoir_loop.slots(0, total, capacity, seed)):
        if slot >= 0:
            expected[slot] = item
    for insert in (ops.reservoir_insert_, lambda *a, seed: reference.reservoir_insert_(*a, seed)):
        stored = [torch.full((capacity, 3, 2), -1, dtype=torch.int16), torch.full((capacity,), -1.0).double()]
        items, seen = torch.full((capacity,), -1), torch.tensor(0)
        for some in zip(x.split(cuts), y.split(cuts), strict=True):
            insert(stored, items, seen, list(some), seed=seed)
        assert int(seen) == total
        assert items.tolist() == [expected.get(slot, -1) for slot in range(capacity)]
        assert stored[1].tolist() == items.tolist()
        for slot, item in expected.items():
            assert torch.equal(stored[0][slot], x[item])


def _inserted(threads: int, cuts: list[int]) -> tuple[torch.Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total = sum(cuts)
        x = torch.arange(total * 40, dtype=torch.int32).view(total, 40)
        stored, items, seen = torch.zeros(3000, 40, dtype=torch.int32), torch.full((3000,), -1), torch.tensor(0)
        for some in x.split(cuts):
            ops.reservoir_insert_([stored], items, seen, [some], seed=9)
        return stored, items
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cuts", [[60000], [1, 50000, 9999], [30000, 30000]])
def test_threads_and_cuts_change_nothing(cuts):
    expected = _inserted(1, [60000])
    for threads in (1, 2, 3):
        assert all(map(torch.equal, _inserted(threads, cuts), expected))


def test_strided_batches_and_rows_without_bytes():
    x = torch.randn(50, 8)[:, ::2]
    none = torch.empty(50, 0)
    stored, items, seen = [torch.zeros(20, 4), torch.zeros(20, 0)], torch.full((20,), -1), torch.tensor(0)
    ops.reservoir_insert_(stored, items, seen, [x, none], seed=0)
    assert torch.equal(stored[0], x[items])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(0, 120), SEEDS, SEEDS)
def test_samples_are_those_of_the_shuffle(population, count, seed, draw):
    count = min(count, population)
    expected = reservoir_loop.shuffled(population, count, seed, draw)
    assert ops.sample_without_replacement(population, count, seed=seed, draw=draw).tolist() == expected
    sample = torch.empty(count, dtype=torch.int64)
    reference.sample_without_replacement_(sample, population, seed, draw)
    assert sample.tolist() == expected


def test_a_sample_of_a_large_population_has_no_repeats():
    sample = ops.sample_without_replacement(2**63 - 1, 100_000, seed=1, draw=2)
    assert sample.unique().numel() == 100_000
    assert int(sample.min()) >= 0
    assert abs(float(sample.double().mean()) / 2**62 - 1) < 0.01  # five standard errors


@pytest.mark.parametrize("level", _core.build_info()["instruction_sets"])
def test_every_instruction_set_decides_alike(level):
    slots = ops.reservoir_slots(5001, 40_000, 5000, 11)
    code = "from limpet import ops; s = ops.reservoir_slots(5001, 40_000, 5000, 11); print(hash(tuple(s.tolist())))"
    env = {**os.environ, "LIMPET_CPU": level}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if "does not have it" in run.stderr:
        pytest.skip(f"this processor has no {level}")
    assert int(run.stdout) == hash(tuple(slots.tolist())), run.stderr


def test_gathered_rows():
    x, y = torch.randn(30, 2, 5), torch.arange(30, dtype=torch.uint8)
    index = torch.tensor([3, 29, 0, 3])
    got = ops.gather_rows([x, y], index)
    assert torch.equal(got[0], x[index])
    assert torch.equal(got[1], y[index])
    into = [torch.empty(6, 2, 5), torch.empty(6, dtype=torch.uint8)]
    ops.gather_rows([x, y], index, into=[t[2:] for t in into])
    assert torch.equal(into[0][2:], x[index])
    assert ops.gather_rows([x], index[:0])[0].shape == (0, 2, 5)
    large = torch.randn(500, 3000)
    many = torch.randint(500, (700,))
    assert torch.equal(ops.gather_rows([large], many)[0], large[many])


@pytest.mark.parametrize("index", [[0, 30], [-1]])
def test_indices_out_of_range_write_nothing(index):
    out = torch.full((len(index), 4), 7.0)
    with pytest.raises(IndexError, match=rf"\[0, 30\), got {index[-1]}"):
        ops.gather_rows([torch.randn(30, 4)], torch.tensor(index), into=[out])
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, 1, 1, 0), ValueError, "seen must be at least 0, got -1"),
        ((0, 1.0, 1, 0), TypeError, "count must be an integer, got float 1.0"),
        ((0, 1, 0, 0), ValueError, "capacity must be at least 1, got 0"),
        ((0, 1, 1, 2**63), ValueError, "seed must be below"),
        ((2**63 - 1, 1, 1, 0), ValueError, "seen \\+ count must be below"),
    ],
)
def test_refused_slots(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.reservoir_slots(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stored": torch.zeros(4, 2)}, TypeError, "stored must be a list or tuple of tensors"),
        ({"batch": []}, ValueError, "as many fields"),
        ({"batch": [torch.zeros(3, 2, dtype=torch.float64)]}, TypeError, r"batch\[0\] must be torch.float32"),
        ({"batch": [torch.zeros(3, 3)]}, ValueError, r"batch\[0\] must have rows of shape \[2\]"),
        ({"batch": [torch.zeros(3, 2, device="meta")]}, ValueError, r"batch\[0\] must be on cpu"),
        ({"stored": [torch.zeros(2, 4).t()]}, ValueError, r"stored\[0\] must have rows without gaps"),
        ({"items": torch.zeros(4)}, TypeError, "items must be an int64 tensor"),
        ({"items": torch.zeros(5, dtype=torch.int64)}, ValueError, r"items must be of shape \[4\]"),
        ({"seen": torch.zeros(1, dtype=torch.int64)}, ValueError, r"seen must be of shape \[\]"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_refused_insertions_change_nothing(change, error, words):
    arguments = {
        "stored": [torch.zeros(4, 2)],
        "items": torch.full((4,), -1),
        "seen": torch.tensor(0),
        "batch": [torch.ones(3, 2)],
        "seed": 0,
    }
    seen, items = arguments["seen"], arguments["items"]
    with pytest.raises(error, match=words):
        ops.reservoir_insert_(**{**arguments, **change})
    assert int(seen) == 0
    assert (items == -1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((3, 4), "count must be at most population \\(3\\)"), ((0, 0), "population must be at least 1, got 0")],
)
def test_refused_samples(arguments, words):
    with pytest.raises(ValueError, match=words):
        ops.sample_without_replacement(*arguments, seed=0, draw=0)


@pytest.mark.parametrize(
    ("stored", "index", "error", "words"),
    [
        (torch.zeros(4, 2), torch.tensor([0]), TypeError, "stored must be a list or tuple of tensors"),
        ([], torch.tensor([0]), ValueError, "as many fields and at least one"),
        ([torch.zeros(4, 2)], torch.tensor([0.0]), TypeError, "index must be an int64 tensor"),
        ([torch.zeros(4, 2)], [0], TypeError, "index must be a torch.Tensor"),
        ([torch.zeros(4, 2)], torch.tensor(0), ValueError, r"index must be of shape \[count\]"),
    ],
)
def test_refused_gathering(stored, index, error, words):
    with pytest.raises(error, match=words):
        ops.gather_rows(stored, index)
