"""Several regularizers as one: value, gradient and importances against the sum of the parts, at the price of one."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from limpet import EWC, Composite, MemoryAwareSynapses, RWalk, SynapticIntelligence, ops, optim
from tolerances import assert_close


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 5, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator))
        for _ in range(3)
    ]


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.3 * torch.randn(param.shape, generator=generator).to(param.dtype)


def parts(model, *strengths):
    """EWC and MAS, with two tasks and one, anchored in different places."""
    ewc, mas = EWC(model, strength=strengths[0]), MemoryAwareSynapses(model, strength=strengths[1])
    for k, regularizer in enumerate((ewc, mas, ewc)):
        regularizer.consolidate(data(next(model.parameters()).dtype, k))
        move(model, k)
    return ewc, mas


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def count(monkeypatch, name):
    """Calls of an op from now on."""
    calls, op = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: calls.append(name) or op(*args, **kwargs))
    return calls


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([0.0, 1e-3, 2.0, 1e4]),
    st.sampled_from([0.0, 0.5, 3e3]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_value_and_gradient_are_the_sum_of_the_parts(first, second, dtype, frozen):
    model = net(torch.float32 if dtype == torch.bfloat16 else dtype)
    ewc, mas = parts(model, first, second)
    model.to(dtype)
    model[0].weight.requires_grad_(not frozen)
    both = Composite([ewc, mas])
    learning = [p for p in model.parameters() if p.requires_grad]
    apart = ewc.penalty() + mas.penalty()
    want = torch.autograd.grad(apart, learning)
    together = both.penalty()
    got = torch.autograd.grad(together, learning)
    assert_close(together, apart)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    for param in learning:
        param.grad = torch.ones_like(param)
    value = both.add_penalty_grad_()
    assert_close(value, apart)
    assert not value.requires_grad
    for param, other in zip(learning, want, strict=True):
        assert_close(param.grad, other + 1)


def test_parameters_that_only_one_protects():
    model = net()
    model[0].weight.requires_grad_(False)
    ewc = EWC(model, strength=3.0)
    ewc.consolidate(data())
    model[0].weight.requires_grad_(True)
    model[2].weight.requires_grad_(False)
    mas = MemoryAwareSynapses(model, strength=0.2)
    mas.consolidate(data())
    model[2].weight.requires_grad_(True)
    move(model, 1)
    both = Composite([ewc, mas])
    want = torch.autograd.grad(ewc.penalty() + mas.penalty(), list(model.parameters()))
    got = torch.autograd.grad(both.penalty(), list(model.parameters()))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    anchors, importances, strength = both.quadratic()
    assert strength == 1.0
    assert anchors.keys() == importances.keys() == dict(model.named_parameters()).keys()


def test_one_call_a_step_whatever_the_number(monkeypatch):
    model = net(torch.float32)
    ewc, mas = parts(model, 2.0, 3.0)
    both = Composite([ewc, mas, EWC(model, strength=1.0)])
    added, read = count(monkeypatch, "add_quadratic_penalty_grad_"), count(monkeypatch, "quadratic_penalty")
    for step in range(1, 4):
        both.add_penalty_grad_()
        assert (len(added), len(read)) == (step, 0)
    both.penalty()
    assert (len(added), len(read)) == (3, 1)


def test_one_regularizers_tensors_serve_as_they_are():
    model = net()
    ewc, mas = EWC(model, strength=2.0), MemoryAwareSynapses(model, strength=3.0)
    both = Composite([ewc, mas])
    assert both.penalty().item() == 0.0
    assert both.quadratic()[:2] == ({}, {})
    mas.consolidate(data())
    anchors, importances, strength = both.quadratic()
    assert strength == 6.0
    assert all(anchors[name] is mas.anchors[name] for name in anchors)
    assert all(importances[name] is mas.importances[name] for name in importances)


def test_sums_are_kept_until_a_part_changes():
    model = net()
    ewc, mas = parts(model, 2.0, 3.0)
    both = Composite([ewc, mas])
    held = both.quadratic()[0]
    assert both.quadratic()[0]["0.weight"] is held["0.weight"]
    mas.strength = 7.0
    assert both.quadratic()[0]["0.weight"] is not held["0.weight"]
    assert_close(both.penalty(), ewc.penalty() + mas.penalty())
    ewc.consolidate(data(seed=9))
    move(model, 5)
    assert_close(both.penalty(), ewc.penalty() + mas.penalty())


def train(model, regularizers, step, steps=8, seed=0):
    """Two tasks of gradient descent; what ``step`` does around an update is all that differs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for task in range(2):
        batches = data(seed=seed + task)
        for k in range(steps):
            x, y = batches[k % 3]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step(optimizer)
        for regularizer in regularizers:
            regularizer.end_task(batches)


def built(kind, model):
    last = {
        "si": lambda: SynapticIntelligence(model, strength=0.7, damping=0.01),
        "rwalk": lambda: RWalk(model, strength=0.7, interval=3),
    }[kind]()
    return [EWC(model, strength=2.0), MemoryAwareSynapses(model, strength=0.3), last]


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_training_equals_separate_penalties_and_path_integrals_see_the_tasks_gradient(kind, monkeypatch):
    model, other = net(), net()
    apart, together = built(kind, model), Composite(built(kind, other))

    def by_parts(optimizer):
        apart[2].before_step()  # first: what is added to .grad later stays out of the path integral
        apart[0].add_penalty_grad_()
        apart[1].add_penalty_grad_()
        optimizer.step()
        apart[2].after_step()

    def at_once(optimizer):
        together.before_step()
        optimizer.step()
        together.after_step()

    train(model, apart, by_parts)
    added = count(monkeypatch, "add_quadratic_penalty_grad_")
    train(other, [together], at_once)
    assert len(added) == 16
    for want, got in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(got, want)
    for want, got in zip(apart, together.regularizers, strict=True):
        for name, importance in want.importances.items():
            torch.testing.assert_close(got.importances[name], importance, rtol=1e-9, atol=1e-14)


def test_with_a_path_integral_the_penalty_has_no_graph():
    model = net()
    ewc, _ = parts(model, 2.0, 1.0)
    both = Composite([ewc, SynapticIntelligence(model, strength=1.0)])
    assert not both.penalty().requires_grad
    assert_close(both.penalty(), ewc.penalty().detach())


def test_saved_in_the_middle_and_resumed(tmp_path):
    def steps(model, both, optimizer, count):
        for x, y in (data(seed=4) * 2)[:count]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            both.before_step()
            optimizer.step()
            both.after_step()

    model = net()
    both = Composite(built("si", model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, both, optimizer, 2)
    both.end_task(data())
    steps(model, both, optimizer, 3)
    torch.save(both.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(model)
    steps(model, both, optimizer, 3)
    resumed = Composite(built("si", again))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, resumed, torch.optim.SGD(again.parameters(), lr=0.1), 3)
    for want, got in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(got, want)
    for name, integral in both.regularizers[2].integrals.items():
        assert torch.equal(resumed.regularizers[2].integrals[name], integral)


def test_what_fails_leaves_every_regularizer_as_it_was():
    model = net()
    both = Composite([EWC(model, strength=1.0), SynapticIntelligence(model, strength=1.0)])
    with pytest.raises(RuntimeError, match="has seen none"):
        both.end_task(data())
    assert [regularizer.num_tasks for regularizer in both.regularizers] == [0, 0]
    assert not both.regularizers[0].importances
    fresh = both.state_dict()
    trained = EWC(model, strength=5.0)
    trained.consolidate(data())
    with pytest.raises(ValueError, match="state must have the keys"):
        both.load_state_dict({"regularizers": [trained.state_dict(), {}]})
    assert both.regularizers[0].strength == 1.0
    assert not both.regularizers[0].importances
    both.load_state_dict(fresh)
    packed = EWC(model.float(), strength=1.0, importance_format="log8").state_dict()
    with pytest.raises(TypeError, match=r"regularizers\[0\] must hold its anchors and importances as floats"):
        both.load_state_dict({"regularizers": [packed, both.regularizers[1].state_dict()]})
    assert not both.regularizers[0].packed


@pytest.mark.parametrize("state", [{}, [], {"regularizers": []}, {"regularizers": 3}, {"regularizers": [{}], "k": 1}])
def test_states_of_another_form_are_refused(state):
    with pytest.raises(ValueError, match="state must hold 'regularizers', a list of 1 states"):
        Composite([EWC(net(), strength=1.0)]).load_state_dict(state)


def test_refusals():
    model = net(torch.float32)
    ewc = EWC(model, strength=1.0)
    for given_, error, words in (
        (ewc, TypeError, "regularizers must be a list or tuple"),
        ([], ValueError, "at least one"),
        ([ewc, nn.Linear(1, 1)], TypeError, r"regularizers\[1\] must be EWC or its like"),
        ([ewc, ewc], ValueError, r"regularizers\[1\] must be given once"),
        ([ewc, EWC(net(), strength=1.0)], ValueError, r"regularizers\[1\] must protect the model"),
        ([ewc, EWC(model, strength=1.0, anchor_format="fixed16")], TypeError, r"regularizers\[1\] must hold"),
    ):
        with pytest.raises(error, match=words):
            Composite(given_)
    with pytest.raises(TypeError, match="batches must be readable several times"):
        Composite([ewc]).end_task(iter(data(torch.float32)))


def test_an_attached_regularizer_is_refused_before_any_gradient_changes():
    model = net()
    ewc, _ = parts(model, 2.0, 1.0)
    si = SynapticIntelligence(model, torch.optim.SGD(model.parameters(), lr=0.1), strength=1.0)
    with pytest.raises(RuntimeError, match="SynapticIntelligence is attached to an optimizer"):
        Composite([ewc, si]).before_step()
    assert all(p.grad is None for p in model.parameters())


def test_a_fused_optimizer_takes_the_parts():
    model = net(torch.float32)
    ewc, mas = parts(model, 2.0, 1.0)
    both = Composite([ewc, mas])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"regularizers=composite\.regularizers"):
        optim.SGD(model.parameters(), lr=0.1, regularizers=[both]).step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    optim.SGD(model.parameters(), lr=0.1, regularizers=both.regularizers).step()
    assert not torch.equal(before["0.weight"], model[0].weight)
