"""Reservoirs of several processes: one uniform sample of all their streams, the same everywhere."""

from collections import namedtuple
from itertools import product
from math import comb

import pytest
import torch
from torch import distributed, multiprocessing

from limpet import ClassBalancedReservoir, ReservoirBuffer, WeightedReservoir
from limpet.buffers.ranks import shares

Pair = namedtuple("Pair", ["x", "y"])
COUNTS = {"long": (500, 90, 7), "short": (4, 0, 6), "one": (0, 60, 0), "none": (0, 0, 0)}
FIRST = (0, 1000, 2000)  # the number of each process's first item


def stream(rank, count):
    numbers = torch.arange(FIRST[rank], FIRST[rank] + count)
    return Pair((numbers % 2).bool().view(-1, 1), numbers.double())


def labelled(rank, count):
    x, y = stream(rank, count)
    return Pair(x, y.long())


def keyed(kind, rank, count):
    buffer = kind(16, seed=10 + rank)
    if count:
        if kind is ClassBalancedReservoir:
            buffer.add(labelled(rank, count), group=torch.arange(count) % 7 % (2 + rank))
        else:
            buffer.add(labelled(rank, count), weight=1 + torch.arange(count).double() % 5)
    return buffer


def numbers_of(buffer):
    items = list(buffer)
    assert all(bool(item.x) == bool(item.y % 2) for item in items)
    return [int(item.y) for item in items]


def error(call):
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"


def in_each_process(rank, rendezvous, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=3)
    found = {}
    for name, counts in COUNTS.items():
        buffer = ReservoirBuffer(16, seed=10 + rank)
        if counts[rank]:
            buffer.add(stream(rank, counts[rank]))
        buffer.merge_ranks()
        found[name] = (buffer.seen, numbers_of(buffer), buffer.items.tolist(), buffer.seed)
        if len(buffer):
            buffer.add(stream(rank, 40))
            found[f"{name}, later"] = (buffer.seen, len(numbers_of(buffer)))
    buffer = ReservoirBuffer(16, seed=10 + rank, storage="mmap", path=f"{folder}/files{rank}")
    buffer.add(tuple(stream(rank, COUNTS["long"][rank])))
    buffer.merge_ranks()
    found["files"] = (buffer.seen, [int(y) for _, y in buffer], buffer.items.tolist(), buffer.seed)

    for kind in (ClassBalancedReservoir, WeightedReservoir):
        for name, counts in COUNTS.items():
            buffer = keyed(kind, rank, counts[rank])
            buffer.merge_ranks()
            found[kind.__name__, name] = (buffer.seen, numbers_of(buffer), buffer.items.tolist())
            if len(buffer):
                buffer.add(labelled(rank, 40))
                found[kind.__name__, name, "later"] = (buffer.seen, len(numbers_of(buffer)))
        same, twice = keyed(kind, 0, 40), keyed(kind, rank, 40)
        if rank == 1:
            twice = keyed(kind, 0, 40)
            twice.seed = 99
        found[kind.__name__, "seed"] = error(same.merge_ranks), same.seen
        found[kind.__name__, "twice"] = error(twice.merge_ranks), twice.seen

    pairs = [distributed.new_group(ranks) for ranks in ((2, 0), (1,))]
    buffer = ReservoirBuffer(16, seed=10 + rank)
    buffer.add(stream(rank, 100))
    buffer.merge_ranks(pairs[rank % 2])
    found["group"] = (buffer.seen, numbers_of(buffer))

    for name, change in {
        "capacity": {"capacity": 16 + (rank == 1)},
        "seed": {"seed": 7},
        "alike": {"batch": torch.zeros(40, 2 + (rank == 1))},
        "structure": {"batch": torch.zeros(40, 2) if rank else [torch.zeros(40, 2)]},
    }.items():
        buffer = ReservoirBuffer(change.get("capacity", 16), seed=change.get("seed", rank))
        buffer.add(change.get("batch", torch.arange(40)))
        before = buffer.items.clone()
        found[name] = error(buffer.merge_ranks), torch.equal(before, buffer.items), buffer.seen
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(in_each_process, (f"file://{folder / 'rendezvous'}", str(folder)), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("name", ["long", "files", "short", "one", "none"])
def test_all_processes_hold_the_same_sample_of_all_streams(found, name):
    counts = COUNTS["long" if name == "files" else name]
    seen, numbers, items, _ = found[0][name]
    assert all(one[name][:3] == (seen, numbers, items) for one in found)
    assert [one[name][3] for one in found] == [10, 11, 12]
    assert seen == sum(counts)
    assert len(set(numbers)) == min(16, seen)
    of_all = [FIRST[rank] + k for rank, count in enumerate(counts) for k in range(count)]
    assert [of_all[item] for item in items] == numbers  # as if the streams had come one after the other
    expected = shares(list(counts), 16, 10, 0)
    assert [
        sum(FIRST[rank] <= k < FIRST[rank] + count for k in numbers) for rank, count in enumerate(counts)
    ] == expected


def test_rows_are_a_sample_of_what_each_process_held(found):
    for rank, count in enumerate(COUNTS["long"]):
        buffer = ReservoirBuffer(16, seed=10 + rank)
        buffer.add(stream(rank, count))
        sent = {k for k in found[0]["long"][1] if FIRST[rank] <= k < FIRST[rank] + count}
        assert sent <= set(numbers_of(buffer))


@pytest.mark.parametrize("kind", [ClassBalancedReservoir, WeightedReservoir])
@pytest.mark.parametrize("name", COUNTS)
def test_keyed_buffers_become_what_merging_one_after_another_gives(found, kind, name):
    one, *others = (keyed(kind, rank, count) for rank, count in enumerate(COUNTS[name]))
    for other in others:
        one.merge(other)
    expected = (one.seen, numbers_of(one), one.items.tolist())
    assert all(each[kind.__name__, name] == expected for each in found)
    if name != "none":
        assert all(each[kind.__name__, name, "later"] == (one.seen + 40, 16) for each in found)


@pytest.mark.parametrize("kind", [ClassBalancedReservoir, WeightedReservoir])
def test_keyed_buffers_with_keys_in_common_are_refused_everywhere(found, kind):
    for one in found:
        for name, words in {"seed": "seed must be another", "twice": "must have no items in common"}.items():
            message, seen = one[kind.__name__, name]
            assert message.startswith("ValueError")
            assert words in message
            assert seen == 40


def test_streams_go_on_after_merging(found):
    assert all(one["long, later"] == (597 + 40, 16) for one in found)
    assert all(one["short, later"] == (10 + 40, 16) for one in found)


def test_groups(found):
    assert found[0]["group"] == found[2]["group"]
    assert (found[0]["group"][0], found[1]["group"][0]) == (200, 100)
    assert {k // 1000 for k in found[0]["group"][1]} == {0, 2}
    assert {k // 1000 for k in found[1]["group"][1]} == {1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("capacity", r"ValueError: capacity must be the same in all processes, got [16, 17]"),
        ("seed", "ValueError: seed must be another in each process"),
        ("alike", "ValueError: items must be alike in all processes"),
        ("structure", "ValueError: items must be alike in all processes"),
    ],
)
def test_what_cannot_be_merged_is_an_error_everywhere(found, name, words):
    for one in found:
        message, unchanged, seen = one[name]
        assert words in message
        assert unchanged
        assert seen == 40


def test_one_process_alone():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ReservoirBuffer(4).merge_ranks()


def test_shares_are_multivariate_hypergeometric():
    seen, capacity, runs = [6, 3, 4], 5, 6000
    possible = [k for k in product(range(7), range(4), range(5)) if sum(k) == capacity]
    counts = dict.fromkeys(possible, 0)
    for seed in range(runs):
        counts[tuple(shares(seen, capacity, seed, draw=0))] += 1
    expected = {k: runs * comb(6, k[0]) * comb(3, k[1]) * comb(4, k[2]) / comb(13, 5) for k in possible}
    statistic = sum((counts[k] - expected[k]) ** 2 / expected[k] for k in possible)
    assert len(possible) == 17
    assert statistic < 39.2  # 0.999, 16 degrees of freedom


def test_long_streams_have_their_shares():
    seen = [10**15, 3 * 10**15, 10**6]
    first, second, third = torch.tensor([shares(seen, 1000, seed, draw=1) for seed in range(100)]).double().mean(0)
    assert third == 0
    assert first + second == 1000
    assert abs(first - 250) < 4 * (1000 * 0.25 * 0.75 / 100) ** 0.5
