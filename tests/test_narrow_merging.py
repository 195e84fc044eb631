"""Narrow anchors and importances over many tasks: what merging leaves of them, and what it takes."""

import pytest
import torch
from torch import nn

from compare import peak_bytes
from limpet import EWC, MemoryAwareSynapses, ops
from limpet.methods import storage
from limpet.methods.ewc import _merged
from limpet.methods.storage import Storage, rounding
from narrow_methods import NARROWEST, batches, mlp, move, values
from tolerances import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are tiny


def test_merging_takes_little_more_than_it_lets_go(monkeypatch):
    """Parameters' new importances go as their packed tensors come, and few elements are unpacked at a time."""
    monkeypatch.setattr(storage, "_PIECE", 4096)
    model = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(6)))
    ewc = EWC(model, strength=1.0, **NARROWEST)

    def measured_and_merged():
        ewc._merge({name: torch.rand_like(p) for name, p in model.named_parameters()}, _merged)

    measured_and_merged()
    assert peak_bytes(measured_and_merged) < 4 * 540_000 + 3.1 * 90_000 + 100 * 4096


@pytest.mark.parametrize("pieces", [1024, 1 << 20])
@pytest.mark.parametrize("anchor_format", ["split24", "fixed16"])
def test_pieces_are_packed_as_the_whole_is(pieces, anchor_format, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", pieces)
    for numel in (0, 1, 17, 1024, 2047, 5000):
        param, importance = torch.randn(numel), torch.rand(numel) ** 8
        held = Storage("log8", anchor_format).merged(param, importance)
        assert torch.equal(held[0], ops.pack_anchor(param, anchor_format))
        assert torch.equal(held[1], ops.pack_importance(importance))


def hundred_tasks(importance_format, anchor_format, alike, at_random=True, size=8_000):
    """Merged as they are held and in float64, and where the parameters ended.

    Tasks alike have equal importances, and parameters that go on in one direction: each adds less than half a step.
    """
    generator = torch.Generator().manual_seed(3)
    store = Storage(importance_format, anchor_format)
    theta = torch.randn(size, generator=generator) * 0.1
    way = 1e-4 * torch.randn(size, generator=generator)
    scale = torch.exp2(-12 * torch.rand(size, generator=generator))
    kept, exact = None, None
    for task in range(100):
        fisher = scale if alike else scale * 2 * torch.rand(size, generator=generator)
        theta = theta + (way if alike else 1e-3 * torch.randn(size, generator=generator))
        draws = rounding(task, "theta", theta.device) if at_random else None
        kept = store.merged(theta, fisher, kept, _merged, draws)[:2]
        here = theta.double(), fisher.double()
        exact = here if exact is None else _merged(*exact, *here)[:2]
    return store.dense(*kept, theta.shape), exact, theta.double()


def errors(narrow, exact, theta):
    """Of the penalty's gradient (norms), of the sum of importances, and of the gradient's sum along the way."""
    (a, f), (anchor, importance) = narrow, exact
    want = importance * (theta - anchor)
    got = f.double() * (theta - a.double())
    along = (got * want.sign()).sum() / want.abs().sum()
    return (
        ((got - want).norm() / want.norm()).item(),
        abs(f.double().sum() / importance.sum() - 1).item(),
        abs(along - 1).item(),
    )


# What a hundred merges may leave, a little more than what was measured (docs/narrow.md).
MANY_TASKS = {
    ("float32", "float32"): (1e-5, 1e-6, 1e-6),
    ("bfloat16", "float32"): (3e-2, 5e-4, 1e-3),
    ("log8", "float32"): (1e-1, 1e-2, 1.2e-2),
    ("float32", "split24"): (2e-3, 1e-6, 2e-4),
    ("float32", "fixed16"): (1e-2, 1e-6, 4e-4),
    ("log8", "fixed16"): (1e-1, 1e-2, 1.2e-2),
}


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("formats", MANY_TASKS)
def test_a_hundred_merges_against_float64(formats, alike):
    for got, bound in zip(errors(*hundred_tasks(*formats, alike)), MANY_TASKS[formats], strict=True):
        assert got <= bound


def test_rounding_to_the_nearest_would_stand_still():
    importance = errors(*hundred_tasks("log8", "float32", alike=True, at_random=False))
    anchor = errors(*hundred_tasks("float32", "fixed16", alike=True, at_random=False))
    assert importance[1] > 0.1
    assert anchor[0] > 2e-2


@pytest.mark.parametrize("anchor_format", ["fixed16", "split24"])
def test_anchors_rounded_at_random_are_right_on_average(anchor_format):
    step = 2e-5 if anchor_format == "fixed16" else 2.0**-16
    values = torch.full((1024 * 200,), 0.625 + 0.3 * step)
    values[::1024] = 1.0
    packed = ops.pack_anchor(values, anchor_format, generator=torch.Generator().manual_seed(1))
    got = ops.unpack_anchor(packed, values.shape)[values < 1].double()
    assert len(got.unique()) == 2
    assert abs(got.mean() - values[1]) < 5 * got.std() / len(got) ** 0.5
    again = ops.pack_anchor(values, anchor_format, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, packed)


def flat(method, part):
    return torch.cat([pair[part].flatten() for pair in values(method).values()])


@pytest.mark.parametrize(
    "make",
    [
        lambda model, **formats: EWC(model, 1.0, **formats),
        lambda model, **formats: EWC(model, 1.0, decay=0.5, **formats),
        lambda model, **formats: MemoryAwareSynapses(model, 1.0, **formats),
    ],
    ids=["ewc", "online", "mas"],
)
@pytest.mark.parametrize(("importance_format", "anchor_format"), [("log8", "fixed16"), ("bfloat16", "float32")])
def test_tasks_merge_as_in_float32(make, importance_format, anchor_format):
    model = mlp()
    narrow, wide = make(model, importance_format=importance_format, anchor_format=anchor_format), make(model)
    for _ in range(4):
        data = batches()
        for method in (narrow, wide):
            method.end_task(data)
        move(model)
    assert relative_error(flat(narrow, 0), flat(wide, 0)) < 0.02
    assert (flat(narrow, 1) - flat(wide, 1)).norm() < 0.06 * flat(wide, 1).norm()
    assert narrow.penalty().item() == pytest.approx(wide.penalty().item(), rel=0.03)
    assert narrow.constant == pytest.approx(wide.constant, rel=0.03)
    assert importance_format in repr(narrow)
