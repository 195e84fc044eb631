"""Several methods as one: moments in order, sums of penalties, and states that go on bit for bit."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import EWC, Composite, DarkReplay, Hybrid, MemoryAwareSynapses, Replay, SynapticIntelligence
from replay_training import accuracy_on_the_first_task, network, same, step, tasks

MOMENTS = {"begin_task", "mix", "penalty", "add_penalty_grad_", "project_grads_", "after_step", "observe", "end_task"}


def ewc(model):
    return EWC(model, strength=5.0)


def si(model):
    return SynapticIntelligence(model, strength=0.5)


def replay(model):
    return Replay(40, fraction=0.5, seed=1)


def dark(model):
    return DarkReplay(model, 40, alpha=0.5, beta=0.5, batch_size=20, seed=1)


def hybrid(*makers):
    return lambda model: Hybrid([make(model) for make in makers])


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (hybrid(replay), {"mix", "observe"}),
        (hybrid(replay, ewc), {"mix", "observe", "penalty", "add_penalty_grad_", "end_task"}),
        (hybrid(hybrid(replay), ewc), {"mix", "observe", "penalty", "add_penalty_grad_", "end_task"}),
        (hybrid(replay, si), {"mix", "observe", "penalty", "add_penalty_grad_", "after_step", "end_task"}),
        (hybrid(replay, dark), {"mix", "observe", "penalty"}),
        (hybrid(lambda model: SimpleNamespace(add_penalty_grad_=print), dark), {"add_penalty_grad_", "observe"}),
    ],
)
def test_it_has_the_moments_of_its_methods_and_no_others(make, moments):
    method = make(nn.Linear(2, 2))
    assert {name for name in MOMENTS if hasattr(method, name)} == moments
    assert not hasattr(method, "consolidate")


def test_moments_are_called_in_order():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, moment):
            if moment not in MOMENTS - {"penalty", "add_penalty_grad_"}:
                raise AttributeError(moment)

            def called(*arguments):
                calls.append((self.name, moment, arguments))
                return (arguments[0] + self.name, arguments[1]) if moment == "mix" else None

            return called

    both = Hybrid([Recorder("a"), SimpleNamespace(penalty=None), Recorder("b")])
    assert both.mix("x", "y") == ("xab", "y")
    assert calls == [("a", "mix", ("x", "y")), ("b", "mix", ("xa", "y"))]
    calls.clear()
    both.observe("x", "y", "z")
    both.end_task(["x", "y"])
    assert calls == [
        (name, moment, arguments)
        for moment, arguments in (("observe", ("x", "y", "z")), ("end_task", (["x", "y"],)))
        for name in "ab"
    ]
    with pytest.raises(TypeError, match="batches must be readable several times"):
        both.end_task(iter([]))


def test_penalties_and_their_gradients_add_up():
    model, _ = network()
    x, y = next(tasks())
    both = hybrid(dark, ewc)(model)
    both.observe(x, y, model(x))
    both.end_task([(x, y)])
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)
    same = [copy.deepcopy(both) for _ in range(3)]
    parts = [part.penalty() for part in same[0].methods]
    total = sum(parts)
    assert torch.equal(same[1].penalty(), total)
    value = same[2].add_penalty_grad_()
    assert torch.equal(value, total)
    assert not value.requires_grad
    total.backward()
    for mine, theirs in zip(same[2].methods[0].model.parameters(), same[0].methods[0].model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_path_integral_takes_replay_as_part_of_the_task():
    model, optimizer = network()
    both = Hybrid([si(model), dark(model)])
    other, same_optimizer = network()
    alone, beside = si(other), dark(other)
    x, y = next(tasks())
    for some in torch.arange(600).split(20)[:10]:
        step(model, optimizer, both, x[some], y[some])
        outputs = other(x[some])
        same_optimizer.zero_grad()
        (F.cross_entropy(outputs, y[some]) + beside.penalty()).backward()
        alone.before_step()
        same_optimizer.step()
        alone.after_step()
        beside.observe(x[some], y[some], outputs)
    for name, integral in alone.integrals.items():
        torch.testing.assert_close(both.methods[0].integrals[name], integral, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [hybrid(replay, ewc), hybrid(replay, si), hybrid(dark, ewc)])
def test_hybrids_remember(make):
    assert accuracy_on_the_first_task(make) > 0.8


def test_replay_beside_an_attached_regularizer():
    model, optimizer = network()
    method, regularizer = replay(model), SynapticIntelligence(model, optimizer, strength=0.5)
    other, other_optimizer = network()
    by_hand = Hybrid([replay(other), si(other)])
    for k, (x, y) in enumerate(tasks()):
        for some in torch.arange(600).split(20):
            step(model, optimizer, method, x[some], y[some])
            step(other, other_optimizer, by_hand, x[some], y[some])
        if k == 0:
            regularizer.end_task()
            by_hand.end_task(None)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [dark, hybrid(replay, ewc), hybrid(replay, si), hybrid(dark, si)])
def test_a_run_resumed_within_a_task_goes_on_bit_for_bit(make):
    def steps(model, optimizer, method, numbers):
        for k in numbers:
            x, y = list(tasks())[k // 30]
            step(model, optimizer, method, *(rows[20 * (k % 30) : 20 * (k % 30 + 1)] for rows in (x, y)))
            if k == 29 and hasattr(method, "end_task"):
                method.end_task([(x, y)])

    model, optimizer = network()
    method = make(model)
    steps(model, optimizer, method, range(45))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), method.state_dict()])
    steps(model, optimizer, method, range(45, 60))
    other, other_optimizer = network()
    other_method = make(other)
    for one, state in zip((other, other_optimizer, other_method), saved, strict=True):
        one.load_state_dict(state)
    steps(other, other_optimizer, other_method, range(45, 60))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_that_does_not_fit_changes_no_method():
    model = nn.Linear(2, 2)
    both = Hybrid([Replay(5), SimpleNamespace(mix=None), ewc(model)])
    x, y = torch.randn(8, 2), torch.randint(2, (8,))
    both.methods[0].observe(x, y)
    both.methods[2].end_task([(x, y)])
    state = both.state_dict()
    empty = Hybrid([Replay(7), SimpleNamespace(mix=None), ewc(model)])
    for wrong in (
        {"methods": [*state["methods"][:2], {}]},
        {"methods": [*state["methods"][:2], None]},
        {"methods": [state["methods"][0], {}, state["methods"][2]]},
        {"methods": state["methods"][:2]},
        state["methods"],
    ):
        with pytest.raises(ValueError, match="state"):
            empty.load_state_dict(wrong)
        assert empty.methods[0].buffer.capacity == 7
    empty.load_state_dict(state)
    assert same(empty.state_dict(), state)


def test_copies_and_pickles():
    both = Hybrid([Replay(5), EWC(nn.Linear(2, 2), 1.0)])
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert repr(other) == repr(both)
        assert other.methods[0] is not both.methods[0]


def test_refused_methods():
    model = nn.Linear(2, 2)
    one = ewc(model)
    for methods, error, words in (
        (Replay(5), TypeError, "methods must be a list or tuple, got Replay"),
        ([], ValueError, "methods must hold at least one"),
        ([Replay(5), 3], TypeError, r"methods\[1\] must have a moment of a training loop, got int 3"),
        ([one, one], ValueError, r"methods\[1\] must be given once"),
        ([one, Replay(5), MemoryAwareSynapses(model, 1.0)], ValueError, r"methods\[2\] must be no second regularizer"),
        ([one, Composite([si(model)])], ValueError, "must be no second regularizer"),
    ):
        with pytest.raises(error, match=words):
            Hybrid(methods)
