"""Synaptic Intelligence against the published formulas, written out by hand, over whole training runs."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpet
from limpet import SynapticIntelligence
from si_training import adam, backward, by_hand, mlp, sgd, tasks
from tolerances import assert_close

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd_single": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd_nesterov_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_weight_decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, foreach=True),
}


def train(si, model, optimizer, data, consolidate=True):
    """With hooks: the loop that anyone has."""
    for batches in data:
        for batch in batches:
            backward(model, batch, optimizer)
            optimizer.step()
        if consolidate:
            si.consolidate()


def train_manually(si, model, optimizer, data, clip=None, consolidate=True):
    for batches in data:
        for batch in batches:
            backward(model, batch, optimizer)
            si.before_step()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            si.after_step()
        if consolidate:
            si.consolidate()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert value.keys() == b[key].keys()
            assert all(torch.equal(value[name], b[key][name]) for name in value), key
        else:
            assert value == b[key], key


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize(("name", "step"), [("sgd", sgd), ("adam", adam)])
def test_importances_are_those_of_the_published_formulas(name, step, strength):
    model, data = mlp(), tasks()
    theta, want = by_hand(model, data, step(), strength, damping=0.05)
    optimizer = OPTIMIZERS[name](model.parameters())
    si = SynapticIntelligence(model, optimizer, strength=strength, damping=0.05)
    train(si, model, optimizer, data)
    for key, param in model.named_parameters():
        assert want[key].max() > 1e-3  # a path of some length, so that zeros cannot pass
        assert_close(si.importances[key], want[key])
        assert_close(param, theta[key])
        assert torch.equal(si.anchors[key], param)
    assert si.num_tasks == 3


def test_in_float32_it_stays_near():
    model, data = mlp(torch.float32), tasks(dtype=torch.float32)
    _, want = by_hand(model, data, sgd(), 0.5, damping=0.05)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    si = SynapticIntelligence(model, optimizer, strength=0.5, damping=0.05)
    train(si, model, optimizer, data)
    for key in want:
        torch.testing.assert_close(si.importances[key].double(), want[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooked_and_by_hand_are_one_bit_for_bit(name):
    model, data = mlp(torch.float32), tasks(dtype=torch.float32)
    other = copy.deepcopy(model)
    optimizer, other_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    hooked = SynapticIntelligence(model, optimizer, strength=0.5)
    manual = SynapticIntelligence(other, strength=0.5)
    train(hooked, model, optimizer, data)
    train_manually(manual, other, other_optimizer, data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert_same(hooked.state_dict(), manual.state_dict())
    assert max(t.max().item() for t in hooked.importances.values()) > 0


def test_optimizers_that_use_the_gradient_as_scratch_are_found_out():
    """torch's foreach SGD adds the momentum into ``.grad`` itself; the path integral must not notice."""
    model, data = mlp(), tasks()
    other = copy.deepcopy(model)
    found = []
    for net, foreach in ((model, True), (other, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=foreach)
        si = SynapticIntelligence(net, optimizer, strength=0.5)
        train(si, net, optimizer, data)
        found.append(si)
        backward(net, data[0][0], optimizer)
        before = net[0].weight.grad.clone()
        optimizer.step()
        assert torch.equal(before, net[0].weight.grad) == (not foreach)  # else this test shows nothing
    for key in found[0].importances:
        assert_close(found[0].importances[key], found[1].importances[key])


def test_gradients_are_copied_on_the_first_step_alone(monkeypatch):
    model, (data,) = mlp(), tasks(1, 4)
    optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    copies = []
    hook = si._post_hook
    monkeypatch.setattr(si, "after_step", lambda: (copies.append(len(si._step.copies)), type(si).after_step(si)))
    train(si, model, optimizer, [data])
    assert hook is not None
    assert copies == [4, 0, 0, 0]


def test_an_optimizer_that_changes_its_ways_is_an_error_once():
    class Moody(torch.optim.SGD):
        scratch = False

        def step(self, closure=None):
            if self.scratch:
                for p in self.param_groups[0]["params"]:
                    p.grad.mul_(2.0)
            super().step(closure)

    model, (data,) = mlp(), tasks(1, 4)
    optimizer = Moody(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    train(si, model, optimizer, [data[:2]], consolidate=False)
    before = copy.deepcopy(si.integrals)
    optimizer.scratch = True
    backward(model, data[2], optimizer)
    with pytest.raises(RuntimeError, match=r"the gradient of '0.weight' was changed between before_step\(\) and"):
        optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in si.integrals.items())
    backward(model, data[3], optimizer)
    own, old = model[0].weight.grad.clone(), model[0].weight.detach().clone()
    optimizer.step()  # looked at anew
    assert_close(si.integrals["0.weight"] - before["0.weight"], -own * (model[0].weight.detach() - old))


class Clipping(torch.optim.SGD):
    """Its parent's step runs within its own, hooks and all; the first step is short enough for it."""

    norm = 100.0

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self.norm)
        self.norm = 0.05
        return super().step(closure)


def test_an_optimizer_that_clips_within_its_step():
    model, data = mlp(), tasks(2, 6)
    other = copy.deepcopy(model)
    optimizer, plain = Clipping(model.parameters(), lr=0.5), torch.optim.SGD(other.parameters(), lr=0.5)
    hooked, manual = SynapticIntelligence(model, optimizer, strength=0.5), SynapticIntelligence(other, strength=0.5)
    train(hooked, model, optimizer, data)
    train_manually(manual, other, plain, [data[0][:1]], clip=100.0, consolidate=False)
    train_manually(manual, other, plain, [data[0][1:], data[1]], clip=0.05)
    assert_same(hooked.state_dict(), manual.state_dict())
    assert hooked.importances["0.weight"].any()


def test_what_a_gradient_accumulates_and_groups_change_nothing():
    model, (data,) = mlp(), tasks(1, 6)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    for (x, y), (z, w) in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        for a, b in ((x, y), (z, w)):
            (F.cross_entropy(model(a), b) / 2).backward()
        optimizer.step()
    groups = [{"params": other[0].parameters()}, {"params": other[2].parameters(), "lr": 0.1}]
    grouped = torch.optim.SGD(groups, lr=0.1)
    whole = SynapticIntelligence(other, grouped, strength=0.5)
    train(
        whole,
        other,
        grouped,
        [[(torch.cat([x, z]), torch.cat([y, w])) for (x, y), (z, w) in zip(data[::2], data[1::2], strict=True)]],
        consolidate=False,
    )
    for key in si.integrals:
        assert_close(si.integrals[key], whole.integrals[key])
        assert si.integrals[key].any()


@pytest.mark.parametrize("attached", [True, False])
def test_before_step_ahead_of_clipping_counts_the_unclipped_gradient(attached):
    model, data = mlp(), tasks(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    si = SynapticIntelligence(model, optimizer if attached else None, strength=0.5, damping=0.05)
    integrals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batches in data:
        integrals = {name: torch.zeros_like(t) for name, t in integrals.items()}
        for batch in batches:
            backward(model, batch, optimizer)
            own = {name: p.grad.clone() for name, p in model.named_parameters()}
            old = {name: p.detach().clone() for name, p in model.named_parameters()}
            si.before_step()
            total = [p.grad.clone() for p in model.parameters()]
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            clipped = [p.grad.clone() for p in model.parameters()]
            assert not torch.equal(total[0], clipped[0])
            optimizer.step()
            if not attached:
                si.after_step()
            for name, p in model.named_parameters():
                integrals[name] -= own[name] * (p.detach() - old[name])
            for (name, p), g in zip(model.named_parameters(), clipped, strict=True):
                assert_close(p, old[name] - 0.5 * g)  # the penalty was added once
        for name, t in integrals.items():
            assert_close(si.integrals[name], t)
        si.consolidate()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_gradient_scaler(fused, unscale):
    model, data = mlp(torch.float32), tasks(2, 5, torch.float32)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.02, fused=fused) for net in (model, other)]
    scaled = SynapticIntelligence(model, optimizers[0], strength=0.5)
    plain = SynapticIntelligence(other, optimizers[1], strength=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    train(plain, other, optimizers[1], data)
    for batches in data:
        for k, (x, y) in enumerate(batches):
            if k == 2:  # a batch that overflows, which the plain run never saw
                before = copy.deepcopy(scaled.integrals), [p.detach().clone() for p in model.parameters()]
                optimizers[0].zero_grad()
                scaler.scale(F.cross_entropy(model(x * torch.inf), y)).backward()
                scaler.step(optimizers[0])
                scaler.update()
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[1], strict=True))
                assert all(torch.equal(t, before[0][name]) for name, t in scaled.integrals.items())
            optimizers[0].zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizers[0])
            scaler.step(optimizers[0])
            scaler.update()
        scaled.consolidate()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q)
    for name, importance in plain.importances.items():
        assert importance.any()
        torch.testing.assert_close(scaled.importances[name], importance, rtol=1e-4, atol=1e-6)


def test_parameters_without_gradient_frozen_and_unfrozen():
    model, (data,) = mlp(), tasks(1, 9)
    model[0].requires_grad_(False)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    train(si, model, optimizer, [data[:3]], consolidate=False)
    assert set(si.integrals) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    train(si, model, optimizer, [data[3:6]], consolidate=False)
    assert si.integrals["0.weight"].any()
    frozen = si.integrals["2.weight"].clone()
    model[2].requires_grad_(False)
    train(si, model, optimizer, [data[6:]])
    assert set(si.importances) == {name for name, _ in model.named_parameters()}
    delta = model[2].weight.detach() - reference[2].weight.detach()
    assert_close(si.importances["2.weight"], frozen.clamp(min=0) / (delta.square() + 0.1))


def test_what_moves_parameters_between_steps_is_no_path():
    model, (data,) = mlp(), tasks(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k, batch in enumerate(data):
        if k == 1:
            with torch.no_grad():
                model[0].weight.clamp_(-0.2, 0.2)
        if k == 2:
            model.load_state_dict({name: 0.9 * t for name, t in model.state_dict().items()})
        if k == 3:
            model[2].weight.data = model[2].weight.data + 1.0
        backward(model, batch, optimizer)
        for name, p in model.named_parameters():
            want[name] += 0.1 * p.grad.square()  # -g * (-lr g)
        optimizer.step()
    for name, t in want.items():
        assert_close(si.integrals[name], t)


def test_negative_path_integrals_protect_nothing():
    model, (data,) = mlp(), tasks(1, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    si = SynapticIntelligence(model, strength=0.5)
    train_manually(si, model, optimizer, [data], consolidate=False)
    assert all((t <= 0).all() for t in si.integrals.values())
    si.consolidate()
    assert not any(t.any() for t in si.importances.values())


def test_the_penalty_pulls_and_carries_no_graph():
    model, data = mlp(), tasks(1)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    si = SynapticIntelligence(model, optimizer, strength=2.0)
    assert si.penalty().item() == 0.0
    train(si, model, optimizer, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    want = 2.0 * sum(0.25 * t.double().sum() for t in si.importances.values())
    assert_close(si.penalty(), want)
    assert not si.penalty().requires_grad
    optimizer.zero_grad()
    assert si.before_step().item() == si.penalty().item()
    for name, p in model.named_parameters():
        assert_close(p.grad, 2.0 * si.importances[name])  # 2 c Omega (theta - anchor)
    anchors, importances, factor = si.quadratic()
    assert factor == 4.0
    assert anchors.keys() == importances.keys() == dict(model.named_parameters()).keys()


def test_nothing_is_protected_before_the_first_consolidation():
    model = mlp()
    si = SynapticIntelligence(model, strength=1.0)
    assert si.quadratic() == ({}, {}, 2.0)
    assert si.before_step().item() == 0.0
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_and_moves_of_dtype():
    model, data = mlp(torch.bfloat16), tasks(2, 4, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    train(si, model, optimizer, data)
    tensors = [*si.anchors.values(), *si.importances.values(), *si.integrals.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    model.float()
    train(si, model, optimizer, [[(x.float(), y) for x, y in data[0]]])
    model.double()
    train(si, model, optimizer, [[(x.double(), y) for x, y in data[0]]])
    assert {t.dtype for t in [*si.importances.values(), *si.integrals.values()]} == {torch.float64}


def test_it_detaches_and_copies_are_unattached():
    model, data = mlp(), tasks(1, 3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    si = SynapticIntelligence(model, optimizer, strength=1.0)
    train(si, model, optimizer, data)
    for again in (copy.deepcopy(si), pickle.loads(pickle.dumps(si))):
        assert_same(again.state_dict(), si.state_dict())
        assert again.model is not model
        fresh = OPTIMIZERS["sgd"](again.model.parameters())
        again.attach(fresh)
        train(again, again.model, fresh, data)
        assert again.num_tasks == 2
    si.detach()
    si.detach()
    train(si, model, optimizer, data, consolidate=False)
    assert si.num_steps == 0
    reference = weakref.ref(si)
    del si, again
    gc.collect()
    assert reference() is None


def test_a_new_optimizer_for_each_task():
    model, data = mlp(), tasks(2, 3)
    first, second = (OPTIMIZERS["adam"](model.parameters()) for _ in range(2))
    si = SynapticIntelligence(model, first, strength=1.0)
    train(si, model, first, data[:1])
    si.attach(second)
    train(si, model, second, data[1:], consolidate=False)
    assert si.num_steps == 3
    train(si, model, first, data[:1], consolidate=False)
    assert si.num_steps == 3


def test_the_runner_s_moments():
    model, (data,) = mlp(), tasks(1, 3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    si = SynapticIntelligence(model, strength=1.0)
    for batch in data:
        backward(model, batch, optimizer)
        si.add_penalty_grad_()
        optimizer.step()
        si.after_step()
    si.end_task(data)
    assert si.num_tasks == 1


def test_beside_another_penalty():
    """EWC's gradient, added after before_step(), is none of the task's own."""
    model, (data,) = mlp(), tasks(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc, si = limpet.EWC(model, strength=10.0), SynapticIntelligence(model, strength=1.0)
    ewc.consolidate(data)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in data:
        backward(model, batch, optimizer)
        own = {name: p.grad.clone() for name, p in model.named_parameters()}
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        si.before_step()
        ewc.add_penalty_grad_()
        optimizer.step()
        si.after_step()
        for name, p in model.named_parameters():
            want[name] -= own[name] * (p.detach() - old[name])
    for name, t in want.items():
        assert_close(si.integrals[name], t)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]  # which runs a C++ compiler


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_compiled_forward_and_backward(backend):
    model, data = mlp(), tasks(2, 3)
    other = copy.deepcopy(model)
    found = []
    for net, wrap in ((model, lambda f: f), (other, lambda f: torch.compile(f, backend=backend))):
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        si = SynapticIntelligence(net, optimizer, strength=1.0)
        loss = wrap(lambda x, y, net=net: F.cross_entropy(net(x), y))
        for batches in data:
            for x, y in batches:
                optimizer.zero_grad()
                loss(x, y).backward()
                optimizer.step()
            si.consolidate()
        found.append(si)
    for name in found[0].importances:
        assert_close(found[0].importances[name], found[1].importances[name])
