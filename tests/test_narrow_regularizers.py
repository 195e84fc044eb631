"""EWC and its relative with anchors and importances held narrow: bytes, values, many tasks, states, refusals."""

import copy
import json

import pytest
import torch
from torch import nn

import limpet
from compare import peak_bytes
from limpet import EWC, MemoryAwareSynapses, ops, optim
from limpet.methods import storage
from limpet.methods.ewc import _merged
from limpet.methods.storage import ANCHOR_FORMATS, IMPORTANCE_FORMATS, Storage, latest, rounding
from limpet.reference import dense_anchor, dense_importance
from limpet.scenarios import datasets, runner, streams
from tolerances import assert_close, relative_error

NARROWEST = {"importance_format": "log8", "anchor_format": "fixed16"}
NARROW = [(f, a) for f in IMPORTANCE_FORMATS for a in ANCHOR_FORMATS if (f, a) != ("float32", "float32")]


def mlp(hidden=40, outputs=3):
    """Its first weight has more elements than one block."""
    return nn.Sequential(nn.Linear(30, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def batches(outputs=3):
    return [(torch.randn(8, 30), torch.randint(outputs, (8,))) for _ in range(2)]


@torch.no_grad()
def move(model, by=0.1):
    for param in model.parameters():
        param.add_(by * torch.randn_like(param))


def held(method):
    return [*method.anchors.values(), *method.importances.values()]


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def values(method):
    """Anchors and importances of each parameter as floats."""
    params = dict(method.model.named_parameters())
    return {
        name: (dense_anchor(method.anchors[name], p), dense_importance(method.importances[name], p))
        for name, p in params.items()
        if name in method.anchors
    }


def flat(method, part):
    return torch.cat([pair[part].flatten() for pair in values(method).values()])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_three_bytes_a_parameter():
    model = nn.Sequential(nn.Linear(500, 1000), nn.Tanh(), nn.Linear(1000, 500))
    count = sum(p.numel() for p in model.parameters())
    ewc = EWC(model, strength=1.0, **NARROWEST)
    for _ in range(2):
        ewc.consolidate([(torch.randn(2, 500), torch.randint(500, (2,)))])
        move(model)
    state = ewc.state_dict()
    assert bytes_of(held(ewc)) <= 3.01 * count
    assert bytes_of(t for part in state.values() if isinstance(part, dict) for t in part.values()) <= 3.01 * count
    assert {t.dtype for t in ewc.anchors.values()} == {torch.int16}
    assert {t.dtype for t in ewc.importances.values()} == {torch.uint8}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    packed = [t.data_ptr() for t in held(ewc)]
    ewc.add_penalty_grad_()
    assert peak_bytes(ewc.add_penalty_grad_) < 1000  # no unpacked copy, whatever the size of the parameters
    assert [t.data_ptr() for t in held(ewc)] == packed


def test_merging_unpacks_little_at_a_time(monkeypatch):
    """Beside the new packed tensors: a few pieces, and nothing of the parameters' size."""
    monkeypatch.setattr(storage, "_PIECE", 4096)
    model = nn.Linear(1000, 400, bias=False)
    ewc = EWC(model, strength=1.0, **NARROWEST)
    ewc._merge({"weight": torch.rand(400, 1000)}, _merged)
    move(model)
    new = {"weight": torch.rand(400, 1000)}
    assert peak_bytes(lambda: ewc._merge(new, _merged)) < 3.1 * 400_000 + 100 * 4096


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("importance_format", "anchor_format"), NARROW)
def test_a_first_task_is_rounded_to_the_nearest(importance_format, anchor_format):
    model = mlp()
    data = batches()
    ewc = EWC(model, strength=1.0, importance_format=importance_format, anchor_format=anchor_format)
    ewc.consolidate(data)
    fisher = limpet.diagonal_fisher(model, data)
    pack = {"float32": lambda t: t, "bfloat16": lambda t: t.bfloat16(), "log8": ops.pack_importance}[importance_format]
    for name, p in model.named_parameters():
        anchor = p.detach() if anchor_format == "float32" else ops.pack_anchor(p.detach(), anchor_format)
        assert torch.equal(ewc.anchors[name], anchor)
        assert torch.equal(ewc.importances[name], pack(fisher[name]))
    move(model)
    params = dict(model.named_parameters())
    want = sum((f.double() * (params[n].double() - a.double()).square()).sum() for n, (a, f) in values(ewc).items())
    penalty = ewc.penalty()
    assert_close(penalty, 0.5 * want)
    grads = torch.autograd.grad(penalty, list(params.values()))
    assert ewc.add_penalty_grad_().item() == penalty.item()
    for p, grad in zip(params.values(), grads, strict=True):
        assert_close(p.grad, grad.double())


@pytest.mark.parametrize("pieces", [1024, 1 << 20])
@pytest.mark.parametrize("anchor_format", ["split24", "fixed16"])
def test_pieces_are_packed_as_the_whole_is(pieces, anchor_format, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", pieces)
    for numel in (0, 1, 17, 1024, 2047, 5000):
        param, importance = torch.randn(numel), torch.rand(numel) ** 8
        held = Storage("log8", anchor_format).merged(param, importance)
        assert torch.equal(held[0], ops.pack_anchor(param, anchor_format))
        assert torch.equal(held[1], ops.pack_importance(importance))


# Errors that 100 merges may leave: of the gradient (norms), of the sum of importances, of the anchor (root mean
# square, of the largest). Measured: docs/narrow.md.
MANY_TASKS = {
    ("float32", "float32"): (1e-6, 1e-7, 1e-6),
    ("bfloat16", "float32"): (0.03, 1e-3, 1e-6),
    ("log8", "float32"): (0.2, 4e-3, 1e-6),
    ("float32", "split24"): (0.01, 1e-7, 1e-4),
    ("float32", "fixed16"): (0.01, 1e-7, 3e-4),
    ("log8", "fixed16"): (0.2, 4e-3, 3e-4),
}


def hundred_tasks(importance_format, anchor_format, at_random=True, size=20_000):
    """Merged in a format and in float64: anchors, importances (narrow, exact), and where the parameters ended."""
    generator = torch.Generator().manual_seed(3)
    store = Storage(importance_format, anchor_format)
    theta = torch.randn(size, generator=generator) * 0.1
    scale = torch.exp2(-12 * torch.rand(size, generator=generator))
    kept, exact = None, None
    for task in range(100):
        theta = theta + 1e-3 * torch.randn(size, generator=generator)
        fisher = scale * 2 * torch.rand(size, generator=generator)
        draws = rounding(task, "theta", theta.device) if at_random else None
        kept = store.merged(theta, fisher, kept, _merged, draws)[:2]
        if exact is None:
            exact = theta.double(), fisher.double()
        else:
            exact = _merged(*exact, theta.double(), fisher.double())[:2]
    return store.dense(*kept, theta.shape), exact, theta.double()


def errors(narrow, exact, theta):
    (a, f), (anchor, importance) = narrow, exact
    want = importance * (theta - anchor)
    gradient = (f.double() * (theta - a.double()) - want).norm() / want.norm()
    distance = (a.double() - anchor).square().mean().sqrt() / anchor.abs().max()
    return gradient.item(), abs(f.double().sum() / importance.sum() - 1).item(), distance.item()


@pytest.mark.parametrize("formats", MANY_TASKS)
def test_a_hundred_merges_against_float64(formats):
    for got, bound in zip(errors(*hundred_tasks(*formats)), MANY_TASKS[formats], strict=True):
        assert got <= bound
