"""Experience replay in a plain training loop."""

import pytest
import torch

from limpet import Replay, ReservoirBuffer
from replay_training import accuracy_on_the_first_task


def test_replay_remembers_what_fine_tuning_forgets():
    assert accuracy_on_the_first_task(lambda model: None) < 0.1
    assert accuracy_on_the_first_task(lambda model: Replay(40, fraction=0.5)) > 0.8


def test_replayed_rows_alone_are_augmented():
    replay = Replay(30, fraction=0.5, transform=lambda x, y: (-x, y))
    x, y = torch.arange(1.0, 31.0).view(-1, 1), torch.arange(30)
    replay.observe(x, y)
    mixed_x, mixed_y = replay.mix(x[:10], y[:10])
    assert torch.equal(mixed_x[:10], x[:10])
    assert torch.equal(mixed_x[10:], -x[mixed_y[10:]])
    assert mixed_y.shape == (20,)


def test_a_resumed_replay_goes_on_alike():
    x, y = torch.randn(200, 3), torch.arange(200)
    replay = Replay(50, fraction=0.2, seed=3)
    replay.observe(x[:120], y[:120])
    replay.mix(x[:8], y[:8])
    other = Replay(1)
    other.load_state_dict(replay.state_dict())
    for one in (replay, other):
        one.observe(x[120:], y[120:])
    for mine, theirs in zip(replay.mix(x[:40], y[:40]), other.mix(x[:40], y[:40]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"buffer": 0}, ValueError, "capacity must be at least 1"),
        ({"buffer": "many"}, TypeError, "capacity must be an integer"),
        ({"buffer": 5, "fraction": 1.0}, ValueError, "fraction must be below 1, got 1.0"),
        ({"buffer": 5, "fraction": -0.1}, ValueError, "fraction must be finite and at least 0"),
        ({"buffer": 5, "transform": 3}, TypeError, "transform must be callable, got int 3"),
    ],
)
def test_refused_settings(arguments, error, words):
    with pytest.raises(error, match=words):
        Replay(**arguments)


def test_refused_transforms_and_states():
    replay = Replay(ReservoirBuffer(5), transform=lambda x, y: (x.double(), y))
    replay.observe(torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(TypeError, match=r"torch\.float32 in field 0"):
        replay.mix(torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(ValueError, match="state must have the keys"):
        replay.load_state_dict({"buffer": replay.buffer.state_dict()})
    with pytest.raises(ValueError, match=r"state\['fraction'\] must be below 1, got 2"):
        replay.load_state_dict({**replay.state_dict(), "fraction": 2})
