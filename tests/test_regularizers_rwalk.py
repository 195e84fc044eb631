"""RWalk against the published formulas, written out by hand in float64, over whole training runs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import RWalk
from si_training import adam, backward, mlp, sgd, tasks
from tolerances import assert_close


def scaled(tensors):
    low, high = min(t.min() for t in tensors), max(t.max() for t in tensors)
    return [(t - low) / (high - low) for t in tensors]


def by_hand(model, data, step, strength, alpha, interval, damping):
    """Parameters, scores and importances [*] by name after all tasks."""
    names = [name for name, _ in model.named_parameters()]
    theta = [p.detach().clone() for p in model.parameters()]
    fisher = [torch.zeros_like(p) for p in theta]
    anchors, importances, scores = theta, [torch.zeros_like(p) for p in theta], None
    for batches in data:
        task = [torch.zeros_like(p) for p in theta]
        for first in range(0, len(batches), interval):
            start, gained = theta, [torch.zeros_like(p) for p in theta]
            for x, y in batches[first : first + interval]:
                leaves = [p.clone().requires_grad_() for p in theta]
                logits = torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), (x,))
                own = torch.autograd.grad(F.cross_entropy(logits, y), leaves)
                fisher = [alpha * g * g + (1 - alpha) * f for g, f in zip(own, fisher, strict=True)]
                rows = zip(own, importances, theta, anchors, strict=True)
                after = step(theta, [g + 2 * strength * big * (p - a) for g, big, p, a in rows])
                gained = [s - g * (b - p) for s, g, b, p in zip(gained, own, after, theta, strict=True)]
                theta = after
            rows = zip(task, gained, fisher, theta, start, strict=True)
            task = [s + (w / (0.5 * f * (p - a) ** 2 + damping)).clamp(min=0) for s, w, f, p, a in rows]
        scores = task if scores is None else [(s + t) / 2 for s, t in zip(scores, task, strict=True)]
        importances = [f + s for f, s in zip(scaled(fisher), scaled(scores), strict=True)]
        anchors = theta
    return [dict(zip(names, tensors, strict=True)) for tensors in (theta, scores, importances)]


OPTIMIZERS = {
    "sgd": (sgd, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adam": (adam, lambda p: torch.optim.Adam(p, lr=0.02)),
}


def train(rwalk, model, optimizer, data, consolidate=True):
    for batches in data:
        for batch in batches:
            backward(model, batch, optimizer)
            optimizer.step()
        if consolidate:
            rwalk.consolidate()


@pytest.mark.parametrize("interval", [1, 5, 100])
@pytest.mark.parametrize("strength", [0.0, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_importances_are_those_of_the_published_formulas(name, strength, interval):
    model, data = mlp(), tasks()
    step, make = OPTIMIZERS[name]
    options = {"strength": strength, "alpha": 0.7, "interval": interval, "damping": 0.01}
    theta, scores, want = by_hand(copy.deepcopy(model), data, step(), **options)
    optimizer = make(model.parameters())
    rwalk = RWalk(model, optimizer, **options)
    train(rwalk, model, optimizer, data)
    for key, param in model.named_parameters():
        assert scores[key].max() > 1e-3
        assert_close(param, theta[key])
        assert_close(rwalk.scores[key], scores[key])
        assert_close(rwalk.importances[key], want[key])
        assert torch.equal(rwalk.anchors[key], param)
    assert 1.0 < max(t.max().item() for t in rwalk.importances.values()) <= 2.0


def test_the_penalty():
    model, data = mlp(), tasks(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rwalk = RWalk(model, optimizer, strength=3.0)
    train(rwalk, model, optimizer, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    assert_close(rwalk.penalty(), 3.0 * sum(0.25 * t.sum() for t in rwalk.importances.values()))
    assert rwalk.quadratic()[2] == 6.0


def test_resumed_in_the_middle_of_an_interval_bit_for_bit(tmp_path):
    data = tasks(3, 7)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rwalk = RWalk(model, optimizer, strength=0.1, interval=4)
    train(rwalk, model, optimizer, data[:1])
    train(rwalk, model, optimizer, data[1:2], consolidate=False)
    torch.save(rwalk.state_dict(), tmp_path / "rwalk.pt")
    other = mlp()
    resumed = RWalk(other, strength=9.0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "rwalk.pt", weights_only=True))
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    resumed.attach(other_optimizer)
    for method, net, stepper in ((rwalk, model, optimizer), (resumed, other, other_optimizer)):
        train(method, net, stepper, data[2:])
    a, b = rwalk.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert all(torch.equal(value[name], b[key][name]) for name in value)
            assert value.keys() == b[key].keys()
        else:
            assert value == b[key]


def test_what_moves_parameters_between_steps_and_skipped_steps_leave_no_trace():
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    (data,) = tasks(1, 4)
    found = []
    for net, disturbed in ((model, False), (other, True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rwalk = RWalk(net, optimizer, strength=0.1, interval=100, alpha=1.0)
        start = net[2].bias.detach().clone()
        moved = torch.zeros_like(start)
        for k, batch in enumerate(data):
            if k == 2 and disturbed:
                with torch.no_grad():
                    net[2].bias.add_(1.0)
                optimizer.param_groups[0]["lr"] = 0.0
                fisher = rwalk.fisher["2.bias"].clone()
                backward(net, batch, optimizer)
                net[2].bias.grad.fill_(torch.nan)
                optimizer.param_groups[0]["params"] = []  # a step that is skipped
                optimizer.step()
                assert torch.equal(rwalk.fisher["2.bias"], fisher)
                optimizer.param_groups[0].update(params=list(net.parameters()), lr=0.1)
            before = net[2].bias.detach().clone()
            backward(net, batch, optimizer)
            optimizer.step()
            moved += net[2].bias.detach() - before
        integral, fisher = rwalk.integrals["2.bias"].clone(), rwalk.fisher["2.bias"].clone()
        rwalk.consolidate()
        assert_close(rwalk.scores["2.bias"], integral.clamp(min=0) / (0.5 * fisher * moved.square() + 1e-3))
        found.append(rwalk)
    assert not torch.equal(found[0].scores["2.bias"], found[1].scores["2.bias"])


def test_a_model_may_grow_between_tasks():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rwalk = RWalk(model, optimizer, strength=0.1, interval=3)
    train(rwalk, model, optimizer, tasks(1, 5))
    model[2] = nn.Linear(6, 5).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rwalk.attach(optimizer)
    train(rwalk, model, optimizer, tasks(1, 5))
    assert rwalk.importances["2.weight"].shape == rwalk.scores["2.weight"].shape == (5, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha must be above 0, got 0"),
        ({"alpha": 1.5}, ValueError, "alpha must be at most 1, got 1.5"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"damping": -1.0}, ValueError, "damping must be finite and at least 0"),
        ({"strength": "1"}, TypeError, "strength must be a number"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        RWalk(mlp(), **{"strength": 1.0, **options})


def test_consolidations_that_fail_change_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rwalk = RWalk(model, optimizer, strength=0.1)
    with pytest.raises(RuntimeError, match="needs at least one optimizer step"):
        rwalk.consolidate()
    (data,) = tasks(1, 2)
    backward(model, data[0], optimizer)
    model[2].weight.grad[0, 0] = torch.inf
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"the path integral of '2.weight' is not finite"):
        rwalk.consolidate()
    assert (rwalk.num_tasks, rwalk.importances, rwalk.scores) == (0, {}, {})
