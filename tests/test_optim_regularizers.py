"""Fused optimizers with regularizers, against float64 training loops in plain Python and against separate passes."""

import copy

import pytest
import torch
from torch import nn

from limpet import EWC, optim

OURS = {"AdamW": optim.AdamW, "SGD": optim.SGD}
TORCHS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
OPTIONS = {"AdamW": {"lr": 0.01, "weight_decay": 0.05}, "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}}
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


class Penalty:
    """A quadratic penalty around the parameters as they are, or as given."""

    def __init__(self, model, strength, names=NAMES, seed=5):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.strength = model, strength
        params = {name: p.detach() for name, p in model.named_parameters() if name in names}
        self.anchors = {n: p + torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in params.items()}
        self.importances = {n: torch.rand(p.shape, generator=generator).to(p.dtype) for n, p in params.items()}

    def quadratic(self):
        return self.anchors, self.importances, self.strength

    def penalty(self):
        params = dict(self.model.named_parameters())
        terms = (self.importances[n] * (params[n] - a) ** 2 for n, a in self.anchors.items())
        return 0.5 * self.strength * sum(t.sum() for t in terms)


class Integrating(Penalty):
    """The same, with path integrals, as Synaptic Intelligence has them."""

    def __init__(self, model, strength, **options):
        super().__init__(model, strength, **options)
        self.integrals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are tiny: a second thread would only be waited for."""
    torch.set_num_threads(1)


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 4)).to(dtype)


def batches(steps, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 5, generator=generator).to(dtype) for _ in range(steps)]


def task_loss(model, x):
    return model(x).square().mean()


def run(model, optimizer, steps=60, maximize=False):
    for x in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        loss = task_loss(model, x)
        (-loss if maximize else loss).backward()
        optimizer.step()


def plain_run(name, model, regularizers, steps=60, **options):
    """The same in plain torch: the penalty in the loss, the path integral of the task's gradient in a Python loop."""
    optimizer = TORCHS[name](model.parameters(), **{**OPTIONS[name], **options})
    params = dict(model.named_parameters())
    omega = {n: torch.zeros_like(p) for n, p in params.items()}
    for x in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        task_grads = torch.autograd.grad(task_loss(model, x), list(params.values()))
        penalty = sum((r.penalty() for r in regularizers), torch.zeros(()))
        (task_loss(model, x) + penalty).backward()
        before = {n: p.detach().clone() for n, p in params.items()}
        optimizer.step()
        for (n, p), grad in zip(params.items(), task_grads, strict=True):
            omega[n] -= grad * (p.detach() - before[n])
    return omega


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)


def assert_integrals(got, want, bound):
    for name in want:
        assert want[name].abs().max() > 0
        error = (got[name].double() - want[name]).abs().max() / want[name].abs().max()
        assert error < bound, name


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("strengths", [(), (0.0,), (0.7,), (0.3, 0.4), (0.1, 0.2, 0.4)], ids=str)
def test_a_whole_run_with_path_integrals(name, dtype, bound, strengths):
    """One step in one pass is the sum of its parts, for one penalty, for several, and for none."""
    model, plain = net(dtype), net(torch.float64)
    mine = [Penalty(model, s, seed=k) for k, s in enumerate(strengths)]
    integrating = Integrating(model, 0.25, names=NAMES[:3], seed=9)
    theirs = [Penalty(plain, s, seed=k) for k, s in enumerate(strengths)]
    theirs.append(Penalty(plain, 0.25, names=NAMES[:3], seed=9))
    for a, b in zip([*mine, integrating], theirs, strict=True):  # the same anchors, rounded alike
        b.anchors = {n: t.double() for n, t in a.anchors.items()}
        b.importances = {n: t.double() for n, t in a.importances.items()}
    run(model, OURS[name](model.parameters(), **OPTIONS[name], regularizers=[*mine, integrating]))
    omega = plain_run(name, plain, theirs)
    assert distance(model, plain) < bound
    assert_integrals(integrating.integrals, omega, bound)


@pytest.mark.parametrize("name", OURS)
def test_maximizing_minus_the_loss_is_the_same(name):
    models, integrating = (net(), net()), []
    for model, maximize in zip(models, (False, True), strict=True):
        integrating.append(Integrating(model, 0.5))
        optimizer = OURS[name](model.parameters(), **OPTIONS[name], maximize=maximize, regularizers=integrating[-1:])
        run(model, optimizer, maximize=maximize)
    assert distance(*models) == 0
    assert all(torch.equal(integrating[0].integrals[n], t) for n, t in integrating[1].integrals.items())


def test_a_regularizer_alone_keeps_its_own_tensors_and_several_are_merged_once():
    model = net()
    one, other = Penalty(model, 0.5), Penalty(model, 0.25, names=NAMES[:1], seed=6)
    optimizer = optim.AdamW(model.parameters(), regularizers=[one, other])
    regularization = optimizer._regularization
    params = dict(model.named_parameters())
    run(model, optimizer, 1)
    quadratics = regularization.quadratics()
    assert quadratics[params["2.weight"]].anchor is one.anchors["2.weight"]
    assert quadratics[params["2.weight"]].strength == 0.5
    merged = quadratics[params["0.weight"]]
    assert merged.strength == 1.0
    run(model, optimizer, 1)
    assert regularization.quadratics()[params["0.weight"]] is merged

    def changed():
        nonlocal merged
        before, merged = merged, regularization.quadratics()[params["0.weight"]]
        return merged is not before

    assert not changed()
    one.strength = 0.75
    assert changed()
    other.importances["0.weight"].mul_(2.0)
    assert changed()
    other.anchors["0.weight"] = other.anchors["0.weight"].clone()
    assert changed()
    theta = params["0.weight"].detach().clone().requires_grad_()
    a, b = ((r.anchors["0.weight"], r.importances["0.weight"], r.strength) for r in (one, other))
    grads = [s * f * (theta - anchor) for anchor, f, s in (a, b)]
    assert torch.allclose(merged.importance * (theta - merged.anchor), sum(grads), atol=1e-6)
    other.anchors.pop("0.weight")
    other.importances.pop("0.weight")
    assert regularization.quadratics()[params["0.weight"]].anchor is one.anchors["0.weight"]


def test_merging_where_nothing_is_important_and_where_anchors_agree():
    model = net()
    one, other = Penalty(model, 0.5), Penalty(model, 0.25, seed=6)
    one.importances["0.bias"].zero_()
    other.importances["0.bias"].zero_()
    other.anchors["2.bias"] = one.anchors["2.bias"].clone()
    quadratics = optim.SGD(model.parameters(), regularizers=[one, other])._regularization.quadratics()
    params = dict(model.named_parameters())
    assert torch.equal(quadratics[params["0.bias"]].anchor, one.anchors["0.bias"])
    assert torch.equal(quadratics[params["2.bias"]].anchor, one.anchors["2.bias"])


def test_only_some_parameters_in_the_optimizer_and_some_protected():
    """A frozen body, a protected head, and a parameter of no regularized model."""
    model, other = net(), nn.Linear(2, 2)
    penalty = Integrating(model, 1.0, names=["0.weight", "2.weight"])
    optimizer = optim.SGD([*model[2].parameters(), *other.parameters()], lr=0.1, regularizers=[penalty])
    (model(torch.ones(3, 5)).square().mean() + other(torch.ones(2)).sum()).backward()
    before = copy.deepcopy(dict(model.named_parameters()))
    grad, start = other.weight.grad.clone(), other.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert penalty.integrals["0.weight"].eq(0).all()
    pull = penalty.importances["2.weight"] * (before["2.weight"] - penalty.anchors["2.weight"])
    want = before["2.weight"] - 0.1 * (model[2].weight.grad + pull)
    assert torch.allclose(model[2].weight, want)
    assert torch.allclose(model[2].bias, before["2.bias"] - 0.1 * model[2].bias.grad)
    assert torch.allclose(other.weight, start - 0.1 * grad)
    assert penalty.integrals["2.bias"].ne(0).all()


def test_a_skipped_step_leaves_no_trace_and_a_scaled_one_the_same():
    results = []
    for scaled in (False, True):
        model = net()
        penalty = Integrating(model, 0.5)
        optimizer = optim.AdamW(model.parameters(), regularizers=[penalty])
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=scaled)
        for step, x in enumerate(batches(5, torch.float32)):
            if step == 2 and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale(task_loss(model, x) * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([*model.parameters(), *penalty.integrals.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_that_grows():
    """A head that comes later, with its own group, is found once it is protected."""
    model = net()
    penalty = Penalty(model, 1.0)
    optimizer = optim.SGD(model.parameters(), lr=0.1, regularizers=[penalty])
    run(model, optimizer, 1)
    model.append(nn.Linear(4, 3, bias=False))
    optimizer.add_param_group({"params": model[3].parameters()})
    run(model, optimizer, 1)
    penalty.anchors["3.weight"], penalty.importances["3.weight"] = torch.ones(3, 4), torch.ones(3, 4)
    before = model[3].weight.detach().clone()
    optimizer.zero_grad()
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert torch.allclose(model[3].weight, before - 0.1 * (model[3].weight.grad + before - 1))


def test_a_copy_goes_on_with_its_own_regularizers():
    model = net()
    penalty = Integrating(model, 0.5)
    optimizer = optim.AdamW(model.parameters(), regularizers=[penalty])
    run(model, optimizer, 3)
    twin, twin_optimizer, twin_penalty = copy.deepcopy((model, optimizer, penalty))
    run(model, optimizer, 3)
    assert not torch.equal(twin_penalty.integrals["0.weight"], penalty.integrals["0.weight"])
    run(twin, twin_optimizer, 3)
    assert distance(model, twin) == 0
    assert torch.equal(twin_penalty.integrals["0.weight"], penalty.integrals["0.weight"])


@pytest.mark.skipif(not hasattr(EWC, "quadratic"), reason="EWC does not offer its quadratic yet")
def test_with_ewc():
    models = net(), net()
    data = [(torch.randn(8, 5), torch.randint(4, (8,)))]
    ewcs = [EWC(model, strength=50.0) for model in models]
    fused = optim.AdamW(models[0].parameters(), lr=0.01, regularizers=[ewcs[0]])
    separate = torch.optim.AdamW(models[1].parameters(), lr=0.01)
    for _ in range(2):
        for ewc in ewcs:
            ewc.consolidate(data)
        for x in batches(20, torch.float32):
            for model, ewc, optimizer in zip(models, ewcs, (fused, separate), strict=True):
                optimizer.zero_grad()
                task_loss(model, x).backward()
                if optimizer is separate:
                    ewc.add_penalty_grad_()
                optimizer.step()
    assert distance(*models) < 1e-5
