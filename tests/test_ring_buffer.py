"""The ring: a deque of rows."""

import copy
import pickle
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import Replay, RingBuffer


def transitions(start, count):
    """(state, action, reward, next state, done), each of which carries the step's number."""
    step = torch.arange(start, start + count)
    state = step.view(-1, 1).expand(-1, 3).float()
    return {"state": state, "action": step, "reward": step.double(), "next": state + 1, "done": step % 2 == 0}


def steps_of(batch):
    step = batch["action"]
    assert torch.equal(batch["state"], step.unsqueeze(-1).expand_as(batch["state"]).float())
    assert torch.equal(batch["reward"], step.double())
    assert torch.equal(batch["next"], batch["state"] + 1)
    assert torch.equal(batch["done"], step % 2 == 0)
    return step


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_the_same_as_a_deque(cuts, capacity, data):
    buffer, expected, total = RingBuffer(capacity), deque(maxlen=capacity), 0
    for count in cuts:
        buffer.add(transitions(total, count))
        expected.extend(range(total, total + count))
        total += count
        if data.draw(st.booleans()):
            capacity = data.draw(st.integers(1, 12))
            buffer.resize(capacity)
            expected = deque(expected, maxlen=capacity)
    assert (len(buffer), buffer.seen) == (len(expected), total)
    assert [int(steps_of(item)) for item in buffer] == list(expected)
    assert buffer.items.tolist() == list(expected)
    if total:
        assert sorted(steps_of(buffer.sample(len(buffer))).tolist()) == list(expected)


def test_samples_do_not_depend_on_cuts_or_where_the_ring_begins():
    one, other = RingBuffer(10, seed=3), RingBuffer(4, seed=3)
    one.add(transitions(0, 27))
    for step in range(27):
        other.add(transitions(step, 1))
        if step == 5:
            other.resize(10)
    for _ in range(5):
        assert torch.equal(steps_of(one.sample(4)), steps_of(other.sample(4)))
    mixed = steps_of(one.sample_into(transitions(27, 6), fraction=0.25))
    assert mixed[:6].tolist() == list(range(27, 33))
    assert set(mixed[6:].tolist()) <= set(range(17, 27))


@pytest.mark.parametrize("way", ["file", "state", "copy", "pickle"])
@pytest.mark.parametrize("seen", [0, 4, 31])
def test_resumed_in_the_middle_of_a_stream(tmp_path, way, seen):
    buffer = RingBuffer(9, seed=5)
    if seen:
        buffer.add(transitions(0, seen))
        buffer.sample(2)
    if way == "file":
        buffer.save(tmp_path / "ring")
        other = RingBuffer.load(tmp_path / "ring")
    elif way == "state":
        other = RingBuffer(2)
        other.load_state_dict(buffer.state_dict())
    else:
        other = copy.deepcopy(buffer) if way == "copy" else pickle.loads(pickle.dumps(buffer))
    for one in (buffer, other):
        one.add(transitions(seen, 14))
    assert other.items.tolist() == list(range(seen + 5, seen + 14))
    assert torch.equal(steps_of(buffer.sample(5)), steps_of(other.sample(5)))
    assert [int(steps_of(item)) for item in buffer] == [int(steps_of(item)) for item in other]


def test_rows_are_copied_without_their_graph_and_however_they_lie():
    buffer = RingBuffer(5)
    x = torch.randn(8, 4, requires_grad=True)
    buffer.add(x[:, ::2])
    assert torch.equal(torch.stack(list(buffer)), x[3:, ::2])
    assert not buffer.sample(3).requires_grad
    with torch.no_grad():
        x.zero_()
    assert buffer.sample(5).all()


def test_replay_from_a_ring():
    replay = Replay(RingBuffer(20), fraction=0.5)
    for start in range(0, 100, 10):
        x = torch.arange(start, start + 10)
        mixed, _ = replay.mix(x, x)
        assert (mixed >= start - 20).all()
        replay.observe(x, x)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (torch.zeros(3, 4), ValueError, r"rows of shape \[2\] in field 0"),
        (torch.zeros(3, 2).double(), TypeError, "torch.float32 in field 0"),
        ((torch.zeros(3, 2),), ValueError, "structure of the first one"),
    ],
)
def test_batches_unlike_the_first_change_nothing(batch, error, words):
    buffer = RingBuffer(4)
    buffer.add(torch.ones(6, 2))
    with pytest.raises(error, match=words):
        buffer.add(batch)
    assert buffer.seen == 6
    assert torch.stack(list(buffer)).eq(1).all()


def test_refused_uses():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        RingBuffer(0)
    buffer = RingBuffer(4)
    buffer.add(torch.arange(9))
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        buffer.resize(0)
    with pytest.raises(ValueError, match="at most the 4 items held, got 5"):
        buffer.sample(5)
    with pytest.raises(ValueError, match="state must have the keys"):
        buffer.load_state_dict({**buffer.state_dict(), "items": torch.arange(4)})
    assert buffer.items.tolist() == [5, 6, 7, 8]
