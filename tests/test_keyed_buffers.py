"""Class-balanced and weighted reservoirs: what they keep, and that it depends on the items alone."""

import copy
import pickle
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keyed_loop
from limpet import ClassBalancedReservoir, Replay, WeightedReservoir


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def items_of(buffer):
    """The numbers of the items held, which are also what they hold."""
    held = [int(item[0]) for item in buffer]
    assert held == buffer.items.tolist()
    return buffer.items.tolist()


def add(buffer, first, group=None, weight=None):
    """Items that hold their numbers, by their groups or weights."""
    count = len(group if group is not None else weight)
    numbers = torch.arange(first, first + count).double()
    if group is not None:
        buffer.add((numbers, torch.tensor(group, dtype=torch.int64)))
    else:
        buffer.add((numbers, numbers), weight=torch.tensor(weight))


# --- what is kept ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=5), st.integers(1, 30), st.data())
def test_equal_shares_whatever_the_cuts(batches, capacity, data):
    seed = data.draw(st.integers(0, 2**63 - 1))
    buffer, groups = ClassBalancedReservoir(capacity, seed=seed), []
    for some in batches:
        add(buffer, len(groups), some)
        groups += some
    expected = keyed_loop.held(keyed_loop.bits(range(len(groups)), seed), groups, capacity)
    assert buffer.items.tolist() == expected
    assert buffer.groups.tolist() == [groups[item] for item in expected]
    assert (len(buffer), buffer.seen) == (len(expected), len(groups))
    if groups:
        assert items_of(buffer) == expected
        assert sorted(buffer.sample(len(buffer))[0].tolist()) == expected


def test_shares_of_a_skewed_stream_in_which_classes_appear_late():
    buffer = ClassBalancedReservoir(100, seed=1)
    shares = [({0: 5000}, {0: 100}), ({0: 500, 7: 20}, {0: 80, 7: 20}), ({7: 900, 3: 33}, {0: 34, 3: 33, 7: 33})]
    first = 0
    for counts, expected in shares:
        groups = torch.tensor([group for group, count in counts.items() for _ in range(count)])
        groups = groups[torch.randperm(len(groups))]
        buffer.add((torch.arange(first, first + len(groups)).double(), groups))
        first += len(groups)
        assert buffer.counts() == expected
        assert len(items_of(buffer)) == 100


def test_a_class_is_sampled_uniformly_and_so_are_its_pairs():
    groups, runs = torch.tensor([0] * 12 + [1, 1] + [0] * 4 + [2] * 6), 4000
    single, pairs = torch.zeros(24), torch.zeros(24, 24)
    for seed in range(runs):
        buffer = ClassBalancedReservoir(12, seed=seed)
        buffer.add(groups)
        held = torch.zeros(24)
        held[buffer.items] = 1
        single += held
        pairs += held.outer(held)
    assert (single[12:14] == runs).all()  # all there are of class 1, and five of each of the others
    # Fixed seeds: 0.999 quantiles with 15, 5 and 119 degrees of freedom.
    of_0 = groups == 0
    assert chi_square(single[of_0], torch.tensor(runs * 5 / 16)) < 37.7
    assert chi_square(single[18:], torch.tensor(runs * 5 / 6)) < 20.6
    upper = pairs[of_0][:, of_0][torch.triu(torch.ones(16, 16), 1).bool()]
    assert chi_square(upper, torch.tensor(runs * 5 * 4 / (16 * 15))) < 173.7


def test_weighted_items_are_drawn_one_after_another_by_their_weights():
    weights, capacity, runs = [1.0, 2.0, 0.5, 4.0, 0.0, 3.0], 3, 4000
    expected = {}  # of each set, over all orders in which it can be drawn
    for order in permutations(range(6), capacity):
        chance, left = 1.0, sum(weights)
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        expected[frozenset(order)] = expected.get(frozenset(order), 0.0) + chance
    counts = dict.fromkeys(expected, 0)
    for seed in range(runs):
        buffer = WeightedReservoir(capacity, seed=seed)
        add(buffer, 0, weight=weights)
        counts[frozenset(buffer.items.tolist())] += 1
    assert all(counts[held] == 0 for held, chance in expected.items() if chance == 0)
    possible = [held for held, chance in expected.items() if chance > 0]
    observed = torch.tensor([float(counts[held]) for held in possible])
    assert len(possible) == 10
    assert chi_square(observed, runs * torch.tensor([expected[held] for held in possible])) < 27.9  # 9 degrees


def test_equal_weights_are_uniform_and_zero_is_kept_while_there_is_room():
    single = torch.zeros(20)
    for seed in range(2000):
        buffer = WeightedReservoir(6, seed=seed)
        buffer.add(torch.arange(20), weight=3.0)
        single[buffer.items] += 1
    assert chi_square(single, torch.tensor(2000 * 6 / 20)) < 43.8  # 19 degrees
    buffer = WeightedReservoir(4)
    add(buffer, 0, weight=[0.0, 0.0, 1.0])
    assert buffer.items.tolist() == [0, 1, 2]
    add(buffer, 3, weight=[1e-30, 1e30, 0.0, 1.0])
    assert buffer.items.tolist() == [2, 3, 4, 6]


def test_tasks_share_a_buffer():
    buffer = ClassBalancedReservoir(30, seed=0)
    for task in range(5):
        for start in range(0, 1000, 100):
            x = torch.arange(1000 * task + start, 1000 * task + start + 100)
            buffer.add((x, x), group=task)
    assert buffer.counts() == dict.fromkeys(range(5), 6)
    assert (buffer.items // 1000).tolist() == buffer.groups.tolist()


def test_replay_from_equal_shares():
    replay = Replay(ClassBalancedReservoir(40), fraction=0.5)
    y = torch.cat([torch.zeros(900, dtype=torch.int64), torch.arange(1, 5).repeat(25)])[torch.randperm(1000)]
    for labels in y.split(50):
        x, mixed = replay.mix(labels.unsqueeze(1).float(), labels)
        assert torch.equal(x.squeeze(1).long(), mixed)
        replay.observe(labels.unsqueeze(1).float(), labels)
    assert replay.buffer.counts() == dict.fromkeys(range(5), 8)


# --- merging, resizing, resuming -------------------------------------------------------------------------------------


def stream(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, (count,), generator=generator) ** 2 // 5, torch.rand(count, generator=generator)


def filled(kind, capacity, seed, first, count, cut=37):
    buffer = kind(capacity, seed=seed)
    group, weight = stream(first, count)
    for begin in range(0, count, cut):
        some = slice(begin, begin + cut)
        x = torch.arange(first, first + count)[some].double()
        if kind is ClassBalancedReservoir:
            buffer.add((x, group[some]))
        else:
            buffer.add((x, group[some]), weight=weight[some])
    return buffer


KINDS = pytest.mark.parametrize("kind", [ClassBalancedReservoir, WeightedReservoir])


@KINDS
@pytest.mark.parametrize("counts", [(100, 200, 150), (10, 5, 90), (0, 30, 3)])
def test_merged_is_what_is_held_of_all_keys_together(kind, counts):
    keys, groups, buffers, first = [], [], [], 0
    for seed, count in enumerate(counts):
        buffers.append(filled(kind, 30, seed, first, count))
        group, weight = stream(first, count)
        weighted = kind is WeightedReservoir
        drawn = keyed_loop.bits(range(count), seed)
        keys += keyed_loop.exponentials(range(count), seed, weight.tolist()) if weighted else drawn
        groups += [0] * count if weighted else group.tolist()
        first += count
    expected = keyed_loop.held(keys, groups, 30)
    one, two, three = buffers
    two.merge(three)
    one.merge(two)
    assert one.items.tolist() == expected
    assert one.seen == first
    assert items_of(one) == expected
    one.add((torch.arange(first, first + 50).double(), stream(9, 50)[0]))
    assert len(items_of(one)) == 30


@KINDS
def test_a_smaller_buffer_is_what_it_would_always_have_been(kind):
    buffer, small = filled(kind, 40, 7, 0, 300), filled(kind, 11, 7, 0, 300)
    buffer.resize(11)
    assert items_of(buffer) == items_of(small)
    with pytest.raises(ValueError, match="capacity must be at most 11: 289 items have been passed over"):
        buffer.resize(12)
    growing = filled(kind, 40, 7, 0, 40)
    growing.resize(90)
    assert items_of(growing) == list(range(40))
    assert growing.capacity == 90


@KINDS
@pytest.mark.parametrize("way", ["file", "state", "copy", "pickle"])
@pytest.mark.parametrize("seen", [0, 20, 300])
def test_resumed_in_the_middle_of_a_stream(tmp_path, kind, way, seen):
    buffer = filled(kind, 50, 2**60 + 7, 0, seen)
    if seen:
        buffer.sample(5)
    if way == "file":
        buffer.save(tmp_path / "buffer")
        other = kind.load(tmp_path / "buffer")
    elif way == "state":
        other = kind(3)
        other.load_state_dict(buffer.state_dict())
    else:
        other = copy.deepcopy(buffer) if way == "copy" else pickle.loads(pickle.dumps(buffer))
    group, weight = stream(1, 200)
    for one in (buffer, other):
        x = torch.arange(seen, seen + 200).double()
        one.add((x, group), **({"weight": weight} if kind is WeightedReservoir else {}))
    assert items_of(buffer) == items_of(other)
    assert torch.equal(buffer.sample(20)[0], other.sample(20)[0])


@KINDS
def test_the_index_and_sorting_give_the_same_buffer(kind, monkeypatch):
    indexed = filled(kind, 50, 3, 0, 400)
    monkeypatch.setattr("limpet.ops.keyed.plain", lambda tensor: False)
    monkeypatch.setattr("limpet.ops.keyed.insert_dispatched_", torch.ops.limpet.keyed_insert_.default)
    sort = filled(kind, 50, 3, 0, 400, cut=111)
    assert items_of(sort) == items_of(indexed)
    for _ in range(3):
        assert torch.equal(sort.sample(20)[0], indexed.sample(20)[0])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "group", "error", "words"),
    [
        ((torch.randn(4, 3), torch.randn(4)), None, ValueError, "group must be given: 0 fields of batch"),
        ((torch.arange(4), torch.arange(4)), None, ValueError, "group must be given: 2 fields of batch"),
        (torch.randn(4, 3), torch.randn(4), TypeError, "group must be a tensor of integers"),
        (torch.randn(4, 3), torch.tensor([True] * 4), TypeError, "group must be a tensor of integers"),
        (torch.randn(4, 3), torch.arange(3), ValueError, r"group must be of shape \[4\]"),
        (torch.randn(4, 3), 1.5, TypeError, "group must be an integer, got float 1.5"),
        (torch.randn(4, 3), 2**63, ValueError, "group must be below"),
        (1, None, TypeError, "tensors alone"),
    ],
)
def test_refused_groups(batch, group, error, words):
    buffer = ClassBalancedReservoir(10)
    with pytest.raises(error, match=words):
        buffer.add(batch, group=group)
    assert buffer.seen == 0
    buffer.add(torch.arange(3, dtype=torch.uint8))  # the structure is still open
    assert buffer.counts() == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.tensor([1.0, torch.nan]), ValueError, "weight must be finite and at least 0"),
        (torch.tensor([1.0, -0.5]), ValueError, "got values from -0.5 to 1"),
        (torch.tensor([1.0, torch.inf]), ValueError, "to inf"),
        (torch.tensor([1, 2]), TypeError, "weight must be a float32"),
        (torch.ones(3), ValueError, r"weight must be of shape \[2\]"),
        (-1.0, ValueError, "weight must be finite and at least 0, got -1.0"),
        ("1", TypeError, "weight must be a number"),
    ],
)
def test_refused_weights(weight, error, words):
    buffer = WeightedReservoir(10)
    for first in (True, False):
        with pytest.raises(error, match=words):
            buffer.add((torch.zeros(2), torch.zeros(2)), weight=weight)
        assert buffer.seen == (0 if first else 3)
        buffer.add((torch.zeros(3), torch.zeros(3)))


def test_refused_merges():
    one, other = ClassBalancedReservoir(4, seed=1), ClassBalancedReservoir(4, seed=2)
    one.add(torch.arange(9))
    for wrong in (WeightedReservoir(4, seed=3), [1]):
        with pytest.raises(TypeError, match="other must be a ClassBalancedReservoir"):
            one.merge(wrong)
    one.merge(other)  # empty
    other.add(torch.arange(9))
    for twice in (one, copy.deepcopy(one)):
        with pytest.raises(ValueError, match="other must have another seed"):
            one.merge(twice)
    small = ClassBalancedReservoir(3, seed=5)
    small.add(torch.arange(9))
    with pytest.raises(ValueError, match="other must hold 4 items"):
        one.merge(small)
    before = one.items
    one.merge(other)
    assert one.seen == 18
    if set(one.items.tolist()) - set(before.tolist()):
        with pytest.raises(ValueError, match="other must have another seed"):
            one.merge(other)


@pytest.mark.parametrize("items", [[0, 1, 1], [0, 1, 9], [0, -1, 2], [[0], [1], [2]]])
def test_states_without_sense_are_refused(items):
    buffer = ClassBalancedReservoir(3)
    buffer.add(torch.arange(9))
    with pytest.raises(ValueError, match=r"state\['items'\] must have one number for each item"):
        buffer.load_state_dict({**buffer.state_dict(), "items": torch.tensor(items)})
    assert len(buffer.sample(3)) == 3


def test_memory_does_not_grow_with_the_number_of_groups():
    resource = pytest.importorskip("resource")
    buffer = ClassBalancedReservoir(1000)

    def peak_after(batches):
        for _ in range(batches):
            buffer.add(torch.arange(buffer.seen, buffer.seen + 10_000).neg())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = peak_after(10)
    assert peak_after(200) - before < 16 * 1024  # two million groups, each smaller than all before it
    assert buffer.groups.min() == 1 - buffer.seen
