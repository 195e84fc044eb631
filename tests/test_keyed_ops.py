"""Keyed reservoirs: the compiled core and the sorts that GPUs run, against a loop that keeps everything."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keyed_loop
from limpet import _core, ops, reference
from limpet.reference.keyed import exponential

SEEDS = st.integers(0, 2**63 - 1)


def by_sorts(*tensors, seed, group=None, weight=None):
    reference.keyed_insert_(*tensors, group, None if weight is None else weight.double(), seed)


INSERTS = [ops.keyed_insert_, by_sorts]


def empty(capacity, *shape, dtype=None):
    """Fields, notes (items, keys, groups) and the number seen."""
    return (
        [torch.zeros(capacity, *shape, dtype=dtype)],
        [torch.full((capacity,), -1) for _ in range(3)],
        torch.tensor(0),
    )


def inserted(insert, x, cuts, capacity, seed, group=None, weight=None, first=0):
    fields, notes, seen = empty(capacity, *x.shape[1:], dtype=x.dtype)
    seen += first
    begin = 0
    for count in cuts:
        some = slice(begin, begin + count)
        options = {name: t[some] for name, t in (("group", group), ("weight", weight)) if t is not None}
        insert(fields, *notes, seen, [x[some]], seed=seed, **options)
        begin += count
    assert int(seen) == first + begin
    held = int((notes[0] >= 0).sum())
    assert (notes[0][held:] == -1).all()  # free slots lie behind
    order = notes[0][:held].argsort()
    return fields[0][order], [note[order] for note in notes]


@st.composite
def cut(draw, total):
    cuts = []
    while sum(cuts) < total:
        cuts.append(draw(st.integers(0, total - sum(cuts))) or 1)
    return cuts


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(1, 25), st.integers(1, 40), SEEDS)
def test_groups_as_when_everything_is_kept(data, total, capacity, different, seed):
    values = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=different, max_size=different))
    groups = data.draw(st.lists(st.sampled_from(values), min_size=total, max_size=total))
    keys = keyed_loop.bits(range(total), seed)
    expected = keyed_loop.held(keys, groups, capacity)
    x, group = torch.arange(2.0 * total).view(total, 2), torch.tensor(groups)
    for insert in INSERTS:
        rows, notes = inserted(insert, x, data.draw(cut(total)), capacity, seed, group)
        assert notes[0].tolist() == expected
        assert notes[1].tolist() == [keys[item] for item in expected]
        assert notes[2].tolist() == [groups[item] for item in expected]
        assert torch.equal(rows, x[expected])


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(1, 25), SEEDS)
def test_weights_as_when_everything_is_kept(data, total, capacity, seed):
    some = st.floats(2**-10, 2**10, width=32)
    weights = data.draw(st.lists(some, min_size=total, max_size=total))
    expected = keyed_loop.held(keyed_loop.exponentials(range(total), seed, weights), [0] * total, capacity)
    x = torch.arange(float(total))
    results = [inserted(i, x, data.draw(cut(total)), capacity, seed, weight=torch.tensor(weights)) for i in INSERTS]
    for rows, notes in results:
        assert notes[0].tolist() == expected
        assert torch.equal(rows, x[expected])
        assert torch.equal(notes[1], results[0][1][1])  # bit for bit


def test_exponential_keys_are_accurate_and_the_same_in_both():
    total, seed = 20_000, 5
    weight = torch.rand(total, dtype=torch.float64) + 0.5
    (_, one), (_, other) = (inserted(i, torch.zeros(total), [total], total, seed, weight=weight) for i in INSERTS)
    assert torch.equal(one[1], other[1])
    exact = torch.tensor(keyed_loop.exponentials(range(total), seed, weight.tolist()), dtype=torch.float64)
    torch.testing.assert_close(one[1].view(torch.float64), exact, rtol=8 * 2**-53, atol=0)


def test_exponentials_at_the_ends():
    bits = [0, 1, 3, 2**20 + 1, 2**61 - 1, 2**61, 2**62 - 1, 2**62, 2**62 + 2**61, 2**63 - 2**20, 2**63 - 7, 2**63 - 1]
    got = exponential(torch.tensor(bits))
    assert not got.signbit().any()
    exact = torch.tensor([keyed_loop.exponential(b) for b in bits], dtype=torch.float64)
    torch.testing.assert_close(got, exact, rtol=8 * 2**-53, atol=0)


@pytest.mark.parametrize("first", [1, 2**31 - 3, 2**32 - 1001, 2**40 + 1, 2**62 + 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_streams(first, weighted):
    total, capacity = 3000, 100
    group = torch.arange(total) % 7 // 3
    weight = torch.rand(total) if weighted else None
    results = [inserted(i, torch.arange(total), [total], capacity, 1, group, weight, first) for i in INSERTS]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)
    if not weighted:
        keys = keyed_loop.bits(range(first, first + total), 1)
        expected = keyed_loop.held(keys, group.tolist(), capacity)
        assert results[0][1][0].tolist() == [first + item for item in expected]


def threaded(threads, cuts, group, weight):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return inserted(ops.keyed_insert_, torch.arange(sum(cuts)), cuts, 3000, 9, group, weight)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weighted", [False, True])
def test_threads_and_cuts_change_nothing(weighted):
    total = 90_000
    group = (torch.arange(total) ** 2 // 1000) % 50
    weight = torch.rand(total, generator=torch.Generator().manual_seed(0)) if weighted else None
    rows, notes = threaded(1, [total], group, weight)
    for threads in (1, 2, 3):
        for cuts in ([total], [1, 50_000, total - 50_001]):
            other, others = threaded(threads, cuts, group, weight)
            assert torch.equal(rows, other)
            assert all(map(torch.equal, notes, others))


LEVEL = """
import importlib.util, sys
from array import array
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])  # the package would import torch
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
keys, items, groups = (array("q", [-1] * 500) for _ in range(3))
seen, group = array("q", [0]), array("q", [k % 3 for k in range(20_000)])
weight = array("d", [(k + 1) ** -0.5 for k in range(20_000)])
notes, others = ([t.buffer_info()[0] for t in some] for some in ((items, keys, groups), (group, weight, seen)))
core.KeyedIndex(notes, 500).insert([], [], [], notes, *others, 20_000, 3, 1)
print(core.build_info()["instruction_set"], hash(tuple(sorted(keys))))
"""


def test_every_instruction_set_draws_the_same_keys():
    results = {}
    for level in _core.build_info()["instruction_sets"]:
        run = subprocess.run(
            [sys.executable, "-c", LEVEL, _core.__file__],
            env={**os.environ, "LIMPET_CPU": level},
            capture_output=True,
            text=True,
            check=False,
        )
        if "does not have it" not in run.stderr:
            used, results[level] = run.stdout.split()
            assert used == level
    assert "baseline" in results
    assert len(set(results.values())) == 1, results


def test_more_groups_than_slots_and_groups_that_come_and_go():
    total, capacity = 3000, 200
    group = torch.randperm(total, generator=torch.Generator().manual_seed(0)) % 700
    group[::7] = 3
    expected = keyed_loop.held(keyed_loop.bits(range(total), 2), group.tolist(), capacity)
    cuts = [300] * 10
    for insert in INSERTS:
        assert inserted(insert, torch.arange(total), cuts, capacity, 2, group)[1][0].tolist() == expected


@pytest.mark.parametrize("insert", INSERTS)
def test_fields_of_all_kinds_strided_and_empty(insert):
    x, none, text = torch.randn(50, 8)[:, ::2], torch.empty(50, 0), torch.randint(255, (50, 2, 3), dtype=torch.uint8)
    fields = [torch.zeros(20, 4), torch.zeros(20, 0), torch.zeros(20, 2, 3, dtype=torch.uint8)]
    _, notes, seen = empty(20)
    insert(fields, *notes, seen, [x, none, text], seed=0, group=torch.arange(100)[::2] % 5)
    insert(fields, *notes, seen, [x[:0], none[:0], text[:0]], seed=0, group=torch.arange(0))
    assert torch.equal(fields[0], x[notes[0]])
    assert torch.equal(fields[2], text[notes[0]])
    assert notes[2].tolist() == [2 * item % 5 for item in notes[0].tolist()]


def test_no_weight_is_the_limit_of_a_small_one():
    total, capacity = 200, 20
    weight = torch.rand(total).double()
    weight[torch.rand(total) < 0.95] = 0
    positive = weight > 0
    for insert in INSERTS:
        tiny = inserted(insert, torch.arange(total), [total], capacity, 4, weight=weight.clamp(min=1e-200))
        zero = inserted(insert, torch.arange(total), [total], capacity, 4, weight=weight)
        assert torch.equal(tiny[1][0], zero[1][0])
        assert set(positive.nonzero().flatten().tolist()) <= set(zero[1][0].tolist())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stored": torch.zeros(4, 2)}, TypeError, "stored must be a list or tuple of tensors"),
        ({"batch": [torch.zeros(3, 3)]}, ValueError, r"batch\[0\] must have rows of shape \[2\]"),
        ({"keys": torch.zeros(4)}, TypeError, "keys must be an int64 tensor"),
        ({"groups": torch.zeros(5, dtype=torch.int64)}, ValueError, r"groups must be of shape \[4\]"),
        ({"group": torch.zeros(3)}, TypeError, "group must be an int64 tensor"),
        ({"group": torch.zeros(2, dtype=torch.int64)}, ValueError, r"group must be of shape \[3\]"),
        ({"weight": torch.arange(3)}, TypeError, "weight must be a float32"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be of shape \[3\]"),
        ({"weight": torch.tensor([1, torch.nan, 1])}, ValueError, "weight must be finite and at least 0"),
        ({"weight": torch.tensor([1, -1.0, 1])}, ValueError, "got values from -1 to 1"),
        ({"weight": torch.tensor([1, torch.inf, 1])}, ValueError, "got values from 1 to inf"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_refused_insertions_change_nothing(change, error, words):
    fields, notes, seen = empty(4, 2)
    arguments = dict(zip(("items", "keys", "groups"), notes, strict=True))
    arguments |= {"stored": fields, "seen": seen, "batch": [torch.ones(3, 2)], "seed": 0}
    with pytest.raises(error, match=words):
        ops.keyed_insert_(**{**arguments, **change})
    assert int(seen) == 0
    assert all((note == -1).all() for note in notes)


def test_the_op_as_torch_wants_it():
    fields, notes, seen = empty(4, 2)
    arguments = (fields, *notes, seen, [torch.ones(9, 2)], torch.arange(9) % 2, torch.rand(9).double(), 3)
    torch.library.opcheck(torch.ops.limpet.keyed_insert_.default, arguments)
