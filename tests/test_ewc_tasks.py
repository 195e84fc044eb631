"""EWC's merged quadratic equals the sum over a hundred tasks, and tasks can be kept apart."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limpet import EWC
from limpet.methods.ewc import _merged
from tolerances import assert_close


def apart(tasks, theta, strength):
    """``strength / 2 * sum_k sum_i F_k (theta - a_k)^2`` and its gradient, task after task in float64."""
    theta = theta.double()
    value = sum((f.double() * (theta - a.double()).square()).sum() for a, f in tasks)
    grad = sum(f.double() * (theta - a.double()) for a, f in tasks)
    return 0.5 * strength * value, strength * grad


def merged(tasks):
    (anchor, importance), *rest = tasks
    constant = 0.0
    for a, f in rest:
        anchor, importance, added = _merged(anchor, importance, a, f)
        constant += added
    return anchor, importance, constant


def draw_tasks(seed, count, size, decades, dtype):
    """Importances over so many decades, some of them zero, and anchors that wander."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(count, size, generator=generator, dtype=torch.float64).cumsum(0) * 0.1
    importances = 10 ** (-decades * torch.rand(count, size, generator=generator, dtype=torch.float64))
    importances[torch.rand(count, size, generator=generator) < 0.1] = 0.0
    theta = anchors[-1] + torch.randn(size, generator=generator, dtype=torch.float64)
    return list(zip(anchors.to(dtype), importances.to(dtype), strict=True)), theta.to(dtype)


@given(st.integers(0, 2**31), st.integers(1, 100), st.integers(1, 40), st.floats(0, 12))
@settings(max_examples=40)
def test_a_hundred_tasks_are_one_quadratic_to_rounding(seed, count, size, decades):
    tasks, theta = draw_tasks(seed, count, size, decades, torch.float64)
    anchor, importance, constant = merged(tasks)
    value, grad = apart(tasks, theta, 3.0)
    assert_close(1.5 * ((importance * (theta - anchor).square()).sum() + constant), value)
    assert_close(3.0 * importance * (theta - anchor), grad)


@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_tasks_in_float32(seed):
    """Rounded a hundred times, anchors and importances still keep float32's bound (4e-7 at the worst of these)."""
    tasks, theta = draw_tasks(seed, 100, 200, 4.0, torch.float32)
    anchor, importance, constant = merged(tasks)
    value, grad = apart(tasks, theta, 3.0)
    theta, anchor, importance = theta.double(), anchor.double(), importance.double()
    assert_close(1.5 * ((importance * (theta - anchor).square()).sum() + constant), value, torch.float32)
    assert_close(3.0 * importance * (theta - anchor), grad, torch.float32)


def trained(dtype=torch.float64, **options):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    ewc = EWC(model, strength=3.0, **options)
    for _ in range(4):
        ewc.consolidate([(torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,)))])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model, ewc


def test_tasks_kept_apart_sum_to_the_penalty(tmp_path):
    model, ewc = trained(keep_tasks=True)
    assert len(ewc.tasks) == ewc.num_tasks == 4
    penalty = ewc.penalty()
    penalty.backward()
    total = 0.0
    for name, p in model.named_parameters():
        value, grad = apart([(t.anchors[name], t.importances[name]) for t in ewc.tasks], p.detach(), 3.0)
        assert_close(p.grad, grad)
        total = total + value
    assert_close(penalty, total)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    other = EWC(model, strength=0.0)
    other.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert other.keep_tasks
    assert other.penalty().item() == penalty.item()
    for a, b in zip(other.tasks, ewc.tasks, strict=True):
        assert all(torch.equal(a.anchors[n], b.anchors[n]) for n in b.anchors)
        assert all(torch.equal(a.importances[n], b.importances[n]) for n in b.importances)


def test_tasks_are_not_kept_unless_asked_for():
    _, ewc = trained()
    assert ewc.tasks == []
    assert "tasks" not in ewc.state_dict()


def test_quadratic_gives_what_the_ops_take():
    model, ewc = trained()
    anchors, importances, strength = ewc.quadratic()
    value = sum((importances[n] * (p - anchors[n]).square()).sum().item() for n, p in model.named_parameters())
    assert 0.5 * strength * (value + ewc.constant) == pytest.approx(ewc.penalty().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": 3}, TypeError, r"state\['tasks'\] must be a list, got int 3"),
        ({"tasks": [{}]}, ValueError, r"state\['tasks'\]\[0\] must have the keys \['anchors', 'importances'\]"),
        ({"tasks": [{"anchors": {}, "importances": {"w": torch.ones(1)}}]}, ValueError, r"not so: \['w'\]"),
        ({"decay": 0.5}, ValueError, r"state\['decay'\] must be None where tasks are kept, got 0.5"),
    ],
)
def test_a_bad_state_is_refused_before_anything_changes(change, error, message):
    _, ewc = trained(keep_tasks=True)
    before = copy.copy(ewc.tasks)
    with pytest.raises(error, match=message):
        ewc.load_state_dict({**ewc.state_dict(), **change})
    assert ewc.tasks == before
    assert ewc.decay is None


def test_faded_tasks_are_no_sum():
    with pytest.raises(ValueError, match=r"keep_tasks must be False with decay=0.5"):
        EWC(nn.Linear(2, 2), strength=1.0, decay=0.5, keep_tasks=True)
