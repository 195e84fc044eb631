"""Class-balanced, weighted and ring buffers in files: the same as in memory, after a crash at any line too."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ClassBalancedReservoir, ReservoirBuffer, RingBuffer, WeightedReservoir
from test_reservoir_storage import assert_equal as assert_same_slots
from test_reservoir_storage import copies_at_each_line

KINDS = [ClassBalancedReservoir, WeightedReservoir, RingBuffer]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def add(buffer, count, first=0):
    """The next items, each of which holds its number in all places."""
    number = first + torch.arange(buffer.seen, buffer.seen + count)
    batch = {"x": number.view(-1, 1).expand(-1, 7).float(), "y": number}
    if isinstance(buffer, ClassBalancedReservoir):
        buffer.add(batch, group=number % 5 * (number % 3 == 0))
    elif isinstance(buffer, WeightedReservoir):
        buffer.add(batch, weight=1.0 + number % 4)
    else:
        buffer.add(batch)


def filled(kind, batches, capacity=20, seed=3, first=0, **where):
    buffer = kind(capacity, seed=seed, **where)
    for count in batches:
        add(buffer, count, first)
    return buffer


def contents(buffer):
    items = list(buffer)
    assert [int(item["y"]) for item in items] == buffer.items.tolist()
    assert all((item["x"] == item["y"]).all() for item in items)
    groups = buffer.groups.tolist() if isinstance(buffer, ClassBalancedReservoir) else None
    return buffer.capacity, buffer.seen, buffer.items.tolist(), groups


@EACH_KIND
@settings(max_examples=12, deadline=None)
@given(batches=st.lists(st.integers(0, 50), max_size=5), capacity=st.integers(1, 40), later=st.integers(1, 40))
def test_files_hold_what_memory_holds(tmp_path_factory, kind, batches, capacity, later):
    path = tmp_path_factory.mktemp("buffer") / "new"
    buffer, expected = filled(kind, batches, capacity, storage="mmap", path=path), filled(kind, batches, capacity)
    assert contents(buffer) == contents(expected)
    buffer.close()
    with kind.open(path) as opened:
        for one in (opened, expected):
            add(one, 33)
        assert contents(opened) == contents(expected)
        for one in (opened, expected):
            one.resize(later if kind is RingBuffer else min(later, capacity))
            add(one, 9)
        assert contents(opened) == contents(expected)
        assert torch.equal(opened.sample(1)["y"], expected.sample(1)["y"])
    again = kind.open(path)
    add(again, 30), add(expected, 30)
    assert contents(again) == contents(expected)
    assert torch.equal(again.sample(1)["y"], expected.sample(1)["y"])


@EACH_KIND
@pytest.mark.parametrize("first", [13, 27])
def test_a_crash_at_any_line_leaves_the_batch_whole_or_not_at_all(tmp_path, kind, first):
    buffer = filled(kind, [first], storage="mmap", path=tmp_path / "now")
    copies = copies_at_each_line(lambda: add(buffer, 40), tmp_path / "now")
    before, after = filled(kind, [first]), filled(kind, [first, 40])
    assert contents(buffer) == contents(after)
    seen, redone, rows_file = [], 0, len(kind._NOTES)
    for path in copies:
        state = torch.from_file(str(path / "2" / "state"), size=4, dtype=torch.int64)
        if state[2]:  # rows may be torn where the journal counts
            redone += 1
            slots = torch.from_file(str(path / "2" / "journal"), size=int(state[2]), dtype=torch.int64)
            rows = torch.from_file(str(path / "2" / f"rows.{rows_file}"), shared=True, size=20 * 7)
            rows.view(20, 7)[slots, 2:] = torch.nan
        opened = kind.open(path)
        seen.append(opened.seen)
        expected = before if opened.seen == first else after
        assert contents(opened) == contents(expected)
        going_on = copy.deepcopy(expected)
        add(opened, 17), add(going_on, 17)
        assert contents(opened) == contents(going_on)
    assert seen == sorted(seen)
    assert {*seen} == {first, first + 40}
    assert redone > 3


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, change) for kind in KINDS for change in ("shrink", "grow", "load")), *((k, "merge") for k in KINDS[:2])],
)
def test_a_crash_at_any_line_leaves_the_old_buffer_or_the_new_one(tmp_path, kind, change):
    batches = [18] if change == "grow" else [31]
    here, expected = filled(kind, batches, storage="mmap", path=tmp_path / "now"), filled(kind, batches)
    other = filled(kind, [90], seed=4, first=31 if change == "merge" else 0)

    def changed(buffer):
        {
            "shrink": lambda: buffer.resize(5),
            "grow": lambda: buffer.resize(90),
            "merge": lambda: buffer.merge(other),
            "load": lambda: buffer.load_state_dict(other.state_dict()),
        }[change]()

    copies = copies_at_each_line(lambda: changed(here), tmp_path / "now")
    old = contents(expected)
    changed(expected)
    new = contents(expected)
    assert contents(here) == new
    found = [contents(kind.open(path)) for path in copies]
    assert all(one in (old, new) for one in found)
    assert found[0] == old != new
    assert found[-1] == new


@pytest.mark.parametrize("kind", [ReservoirBuffer, *KINDS])
def test_resized_before_the_first_batch(tmp_path, kind):
    buffer, expected = kind(20, seed=3, storage="mmap", path=tmp_path), filled(kind, [40], capacity=33)
    buffer.resize(33)
    buffer.close()
    opened = kind.open(tmp_path)
    assert (opened.capacity, opened.seen, opened.seed) == (33, 0, 3)
    add(opened, 40)
    opened.close()
    assert contents(kind.open(tmp_path)) == contents(expected)


@EACH_KIND
def test_a_batch_that_could_not_be_written_is_not_there(tmp_path, kind, monkeypatch):
    buffer, expected = (filled(kind, [11, 6], **where) for where in ({"storage": "mmap", "path": tmp_path}, {}))
    with monkeypatch.context() as broken:
        broken.setattr("limpet.buffers.mapped._Generation._put", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            add(buffer, 9)
    assert contents(buffer) == contents(expected)
    add(buffer, 9), add(expected, 9)
    assert contents(buffer) == contents(expected)


@pytest.mark.parametrize("kind", [ReservoirBuffer, *KINDS])
def test_closed(tmp_path, kind):
    buffer = filled(kind, [30], storage="mmap", path=tmp_path)
    state, items = buffer.state_dict(), buffer.items.tolist()
    buffer.close()
    buffer.close()
    uses = [
        lambda: buffer.add(torch.zeros(3)),
        lambda: buffer.sample(1),
        lambda: buffer.sample_into(torch.zeros(3)),
        lambda: buffer.load_state_dict(state),
        lambda: buffer.resize(3),
        buffer.__len__,
        buffer.__iter__().__next__,
        lambda: buffer.seen,
        lambda: buffer.items,
        buffer.state_dict,
        buffer.flush,
        lambda: copy.copy(buffer),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=rf"the buffer was closed, open\(\) goes on with it: .*{tmp_path}"):
            use()
    assert repr(buffer) == f"{kind.__name__}(closed)"
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        kind(3).none  # noqa: B018
    opened = kind.open(tmp_path)
    assert opened.items.tolist() == items


def test_closing_a_buffer_in_memory_does_nothing():
    with filled(RingBuffer, [5]) as buffer:
        pass
    assert contents(buffer) == contents(filled(RingBuffer, [5]))


def test_slots_in_files_are_those_in_memory(tmp_path):
    def numbers(buffer):
        buffer.add(torch.arange(90))
        return buffer

    assert_same_slots(numbers(ReservoirBuffer(9, storage="mmap", path=tmp_path)), numbers(ReservoirBuffer(9)))


@EACH_KIND
def test_folders_of_another_kind_are_refused(tmp_path, kind):
    ReservoirBuffer(3, storage="mmap", path=tmp_path).close()
    with pytest.raises(ValueError, match="its format is 'limpet mapped reservoir 1'"):
        kind.open(tmp_path)
