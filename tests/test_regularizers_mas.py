"""Memory Aware Synapses against a loop over samples in float64."""

import copy

import pytest
import torch
from torch import nn

from limpet import MemoryAwareSynapses
from tolerances import assert_close


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batches(sizes=(5, 3), dtype=torch.float32):
    return [(torch.randn(n, 4, dtype=dtype), None) for n in sizes]


def sensitivity(model, data):
    """Mean over samples of ``|d ||f(x)||^2 / d theta|``, one sample at a time."""
    model = copy.deepcopy(model).double().eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for x, _ in data:
        for row in x.double():
            model.zero_grad()
            model(row[None]).square().sum().backward()
            count += 1
            for name, p in model.named_parameters():
                sums[name] += p.grad.abs()
    return {name: t / count for name, t in sums.items()}


@torch.no_grad()
def move(model):
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importances_are_those_of_a_loop_over_samples_and_add_up(dtype):
    model = mlp(dtype)
    mas = MemoryAwareSynapses(model, strength=2.0)
    want = {name: 0.0 for name, _ in model.named_parameters()}
    for _ in range(3):
        data = batches(dtype=dtype)
        for name, t in sensitivity(model, data).items():
            want[name] = want[name] + t
        mas.consolidate(data)
        anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
        move(model)
        value = 0.0
        for name, p in model.named_parameters():
            assert_close(mas.importances[name], want[name])
            assert torch.equal(mas.anchors[name], anchors[name])
            value = value + 2.0 * (want[name] * (p.detach().double() - anchors[name].double()).square()).sum()
        penalty = mas.penalty()
        assert_close(penalty, value)
        model.zero_grad()
        assert mas.add_penalty_grad_().item() == penalty.item()
        grads = torch.autograd.grad(penalty, list(model.parameters()))
        for (name, p), g in zip(model.named_parameters(), grads, strict=True):
            assert_close(p.grad, g)
            assert_close(g, 4.0 * want[name] * (p.detach().double() - anchors[name].double()))
    assert mas.num_tasks == 3


def test_samples_do_not_cancel():
    """The gradient of the batch's mean would: these two samples are each other's mirror image."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    mas = MemoryAwareSynapses(model, strength=1.0)
    mas.consolidate([(torch.tensor([[1.0], [-1.0]]), None)])
    assert mas.importances["bias"].item() == 2.0


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_the_model_comes_back_as_it_was():
    model = Noisy()
    model.train()
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(6, 4)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    mas, data = MemoryAwareSynapses(model, strength=1.0), batches()
    mas.consolidate(data)
    assert all(m.training for m in model.modules())
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert "3.bias" not in mas.importances
    assert_close(mas.importances["0.weight"], sensitivity(model.requires_grad_(True), data)["0.weight"])


def test_at_most_so_many_samples_and_progress():
    model, data, seen = mlp(), batches((5, 3, 4)), []
    mas = MemoryAwareSynapses(model, strength=1.0)
    mas.consolidate(data, max_samples=7, progress=lambda *done: seen.append(done))
    assert seen == [(5, 7), (7, 7)]
    want = sensitivity(model, [(torch.cat([x for x, _ in data])[:7], None)])
    assert_close(mas.importances["0.weight"], want["0.weight"])


def test_round_trip_and_growth(tmp_path):
    model = mlp()
    mas = MemoryAwareSynapses(model, strength=1.0)
    mas.consolidate(batches())
    move(model)
    torch.save(mas.state_dict(), tmp_path / "mas.pt")
    other = MemoryAwareSynapses(model, strength=0.0)
    other.load_state_dict(torch.load(tmp_path / "mas.pt", weights_only=True))
    assert other.penalty().item() == mas.penalty().item() > 0
    model[2] = nn.Linear(6, 5)
    mas.end_task(batches())
    assert mas.importances["2.weight"].shape == (5, 6)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (mlp(), [], {}, ValueError, "at least one batch"),
        (mlp(), 3, {}, TypeError, "batches must be an iterable"),
        (mlp(), batches(), {"max_samples": 0}, ValueError, "max_samples must be at least 1"),
        (mlp(), batches(), {"progress": 1}, TypeError, "progress must be callable"),
        (mlp().requires_grad_(False), batches(), {}, ValueError, "no parameters that require a gradient"),
        (Pair(4, 2), batches(), {}, TypeError, "the model's output must be a tensor, got tuple"),
        (mlp(), [(torch.full((2, 4), torch.inf), None)], {}, RuntimeError, r"the gradient of '0.weight' is not finite"),
    ],
)
def test_what_fails_changes_nothing(model, data, options, error, message):
    mas = MemoryAwareSynapses(model, strength=1.0)
    with pytest.raises(error, match=message):
        mas.consolidate(data, **options)
    assert (mas.num_tasks, mas.importances, mas.anchors) == (0, {}, {})
    assert model.training
