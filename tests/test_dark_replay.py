"""Dark experience replay: the penalty is the published one, and remembers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import DarkReplay
from replay_training import accuracy_on_the_first_task, same


def filled(count=40, **options):
    model = nn.Linear(3, 4)
    dark = DarkReplay(model, 100, **options)
    x, y = torch.randn(count, 3), torch.randint(4, (count,))
    dark.observe(x, y, model(x))
    with torch.no_grad():
        model.weight.add_(torch.randn(4, 3))
    return dark


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.3, 0.7), (0.0, 0.7), (0.0, 0.0)])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_penalty_is_the_published_one(alpha, beta, count):
    dark = filled(count, alpha=alpha, beta=beta, batch_size=8)
    model, buffer = copy.deepcopy(dark.model).double(), copy.deepcopy(dark.buffer)
    expected = 0.0
    if alpha:
        x, _, logits = buffer.sample(min(8, count))
        expected += alpha * (model(x.double()) - logits.double()).square().sum() / logits.numel()
    if beta:
        x, y, _ = buffer.sample(min(8, count))
        expected += beta * F.nll_loss(model(x.double()).log_softmax(1), y)
    penalty = dark.penalty()
    assert penalty.shape == ()
    torch.testing.assert_close(penalty.double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-6)
    if alpha or beta:
        penalty.backward()
        expected.backward()
        torch.testing.assert_close(dark.model.weight.grad.double(), model.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_logits_kept_are_those_of_the_step():
    model = nn.Linear(2, 3)
    dark = DarkReplay(model, 10)
    x = torch.randn(6, 2)
    outputs = model(x)
    with torch.no_grad():
        model.weight.zero_()
    dark.observe(x, torch.zeros(6), outputs)
    kept_x, _, logits = dark.buffer.sample(6)
    order = (kept_x[:, None] == x).all(2).double().argmax(1)
    assert torch.equal(logits, outputs.detach()[order])
    assert not logits.requires_grad


def test_logits_kept_under_autocast():
    model, x = nn.Linear(2, 3), torch.randn(6, 2)
    dark = DarkReplay(model, 10, alpha=1.0)
    dark.observe(x, torch.zeros(6), (model(x) + 1.0).bfloat16())
    dark.penalty().backward()
    assert dark.penalty().item() == pytest.approx(1.0, rel=2e-2)


def test_nothing_is_added_before_anything_was_observed():
    model = nn.Linear(2, 3, dtype=torch.float64)
    penalty = DarkReplay(model, 10, beta=1.0).penalty()
    assert penalty.dtype == torch.float64
    assert penalty.item() == 0.0
    (model(torch.ones(1, 2, dtype=torch.float64)).sum() + penalty).backward()


def test_replayed_items_alone_are_augmented():
    seen = []

    def augment(x, y):
        seen.append(len(x))
        return -x, y

    plain = DarkReplay(nn.Linear(3, 2, bias=False), 20, batch_size=20)
    augmented = DarkReplay(nn.Linear(3, 2, bias=False), 20, batch_size=20, transform=augment)
    augmented.model.weight = nn.Parameter(-plain.model.weight.detach())
    x, y = torch.randn(20, 3), torch.zeros(20)
    for dark in (plain, augmented):
        dark.observe(x, y, torch.ones(20, 2))
    assert torch.equal(plain.penalty(), augmented.penalty())
    assert seen == [20]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, left, right):
        return self.linear(left + right)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_inputs_of_several_tensors(kind):
    model = TwoInputs()
    left, right = torch.randn(2, 5, 3)
    x = (left, right) if kind is tuple else {"left": left, "right": right}
    dark = DarkReplay(model, 5)
    dark.observe(x, torch.zeros(5), model(left, right) + 2.0)
    assert dark.penalty().item() == pytest.approx(0.5 * 4.0)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_dark_replay_remembers_what_fine_tuning_forgets(beta):
    assert accuracy_on_the_first_task(lambda model: DarkReplay(model, 40, alpha=0.5, beta=beta, batch_size=20)) > 0.8


def test_outputs_that_grow_are_refused_and_leave_the_buffer_as_it_was():
    dark = filled()
    before = dark.buffer.state_dict()
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    for outputs, error in ((torch.zeros(5, 6), ValueError), (torch.zeros(4, 4), ValueError), ("no", TypeError)):
        with pytest.raises(error):
            dark.observe(x, y, outputs)
    assert same(dark.buffer.state_dict(), before)
    dark.model = nn.Linear(3, 6)
    with pytest.raises(RuntimeError, match=r"must give \[4\] outputs a row, .* of shape \[32, 6\]"):
        dark.penalty()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": None}, TypeError, r"model must be a torch\.nn\.Module, got NoneType"),
        ({"buffer": 0}, ValueError, "capacity must be at least 1"),
        ({"alpha": -1.0}, ValueError, r"alpha must be finite and at least 0, got -1\.0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"beta": float("inf")}, ValueError, "beta must be finite"),
        ({"beta": "1"}, TypeError, "beta must be a number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"transform": 3}, TypeError, "transform must be callable, got int 3"),
    ],
)
def test_refused_settings(arguments, error, words):
    with pytest.raises(error, match=words):
        DarkReplay(**{"model": nn.Linear(2, 2), "buffer": 5, **arguments})


def test_refused_states_change_nothing():
    dark = filled()
    state = dark.state_dict()
    for wrong in ({"alpha": -1.0}, {"beta": float("nan")}, {"batch_size": 0}, {"buffer": {}}, {"more": 1}):
        with pytest.raises(ValueError, match="state"):
            dark.load_state_dict({**state, "alpha": 3.0, **wrong})
    assert same(dark.state_dict(), state)
