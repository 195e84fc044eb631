"""EWC and its relative with anchors and importances held narrow: bytes, values, refusals."""

import copy

import pytest
import torch
from torch import nn

import limpet
from compare import peak_bytes
from limpet import EWC, MemoryAwareSynapses, ops, optim
from limpet.methods.storage import latest
from limpet.scenarios import datasets
from limpet.strength import search
from narrow_methods import NARROW, NARROWEST, batches, held, mlp, move, same, values
from tolerances import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are tiny


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_three_bytes_a_parameter():
    model = nn.Sequential(nn.Linear(200, 600), nn.Tanh(), nn.Linear(600, 200))
    count = sum(p.numel() for p in model.parameters())
    ewc = EWC(model, strength=1.0, **NARROWEST)
    for _ in range(2):
        ewc.consolidate([(torch.randn(2, 200), torch.randint(200, (2,)))])
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


def digits_run(**options):
    """Three tasks of two digits each, one head: where the parameters end, and the average accuracy."""
    digits = datasets.load("mnist-subset")
    images, labels = digits.train_images[::4].flatten(1).float() / 255, digits.train_labels[::4]
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 2))
    ewc, optimizer = EWC(model, **options), torch.optim.Adam(model.parameters(), 1e-3)
    tasks = [(images[labels // 2 == task], labels[labels // 2 == task] % 2) for task in range(3)]
    for x, y in tasks:
        for _ in range(40):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            ewc.add_penalty_grad_()
            optimizer.step()
        ewc.consolidate([(x, y)])
    accuracy = torch.stack([(model(x).argmax(1) == y).double().mean() for x, y in tasks]).mean().item()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), accuracy


def test_a_real_run_ends_where_the_float32_run_does():
    (free, _), (wide, accuracy) = digits_run(strength=0.0), digits_run(strength=1e4)
    narrow, narrow_accuracy = digits_run(strength=1e4, **NARROWEST)
    assert (narrow - wide).norm() < 0.1 * (free - wide).norm()
    assert abs(narrow_accuracy - accuracy) < 0.02


# --- models that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("importance_format", "anchor_format"), NARROW)
def test_a_tensor_that_grew_keeps_its_old_slice_protected(importance_format, anchor_format):
    model = mlp()
    ewc = EWC(model, strength=2.0, importance_format=importance_format, anchor_format=anchor_format)
    ewc.consolidate(batches())
    before, old = values(ewc), [model[2].weight.detach(), model[2].bias.detach()]
    model[2] = nn.Linear(40, 5)
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old[0] + 0.5, old[1]
    ewc.penalty()
    after = values(ewc)
    for name in ("2.weight", "2.bias"):
        (anchor, importance), (a, f) = before[name], after[name]
        assert relative_error(a[:3], anchor) < 1e-4
        assert (f[:3] - importance).norm() < 0.03 * importance.norm()
        assert not f[3:].any()
    ewc.consolidate(batches(5))
    assert values(ewc)["2.weight"][1].shape == (5, 40)
    assert values(ewc)["2.weight"][1][3:].any()
    model[2] = nn.Linear(40, 4)
    with pytest.raises(RuntimeError, match=r"consolidated with shape \[5, 40\]; it may grow, but has shape \[4, 40\]"):
        ewc.penalty()


def test_half_precision_channels_last_scalars_and_nothing():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
            self.scale, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.empty(0, 4))

        def forward(self, x):
            return self.head(self.scale * self.conv(x).mean((2, 3))) + self.none.sum()

    for dtype in (torch.float32, torch.bfloat16):
        model = Odd().to(memory_format=torch.channels_last).to(dtype)
        mas = MemoryAwareSynapses(model, strength=1.0, **NARROWEST)
        for _ in range(2):
            mas.consolidate([(torch.randn(4, 3, 6, 6, dtype=dtype), None)])
            move(model)
        params = dict(model.named_parameters())
        want = sum((f.double() * (params[n].double() - a.double()).square()).sum() for n, (a, f) in values(mas).items())
        assert_close(mas.penalty(), want.detach())
    model.float()  # what is packed serves any dtype but float64
    assert mas.penalty().dtype == torch.float32
    assert_close(mas.penalty(), want.detach())


def test_float64_is_refused_by_name():
    message = r"parameter '2.weight' must not be float64 with importance_format='log8', anchor_format='float32'"
    model = mlp()
    model[2].double()
    with pytest.raises(TypeError, match=message):
        EWC(model, 1.0, importance_format="log8")
    model.float()
    ewc = EWC(model, 1.0, importance_format="log8")
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    model[2].double()
    for call in (ewc.penalty, ewc.add_penalty_grad_, lambda: ewc.consolidate(batches())):
        with pytest.raises(TypeError, match=message):
            call()
    assert same(before["importances"], ewc.importances)


def test_first_looked_at_in_inference_mode():
    model = mlp()
    ewc = EWC(model, 1.0, **NARROWEST)
    ewc.consolidate(batches())
    model[2] = nn.Linear(40, 5)
    with torch.inference_mode():
        ewc.penalty()
    ewc.penalty().backward()


def test_what_fails_changes_nothing():
    model = mlp()
    ewc = EWC(model, 1.0, **NARROWEST)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    model[2].bias.requires_grad_(False)
    new = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    new["2.bias"][0] = torch.inf
    with pytest.raises(RuntimeError, match=r"parameter '2.bias' cannot be protected in .*: importance must be finite"):
        ewc._merge(new, latest(0.5))
    after = ewc.state_dict()
    assert all(same(before[kind], after[kind]) for kind in ("anchors", "importances", "shapes"))
    assert ewc.num_tasks == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"importance_format": "float16"},
            "importance_format must be one of 'float32', 'bfloat16', 'log8', got str 'f",
        ),
        ({"anchor_format": "bfloat16"}, "anchor_format must be one of 'float32', 'fixed16', 'split24', got str 'bfl"),
        ({"keep_tasks": True, "importance_format": "log8"}, "keep_tasks must be False with importance_format='log8'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EWC(mlp(), 1.0, **options)


# --- fused optimizers -------------------------------------------------------------------------------------------------


def test_a_fused_optimizer_refuses_packed_tensors_at_once_and_after_a_loaded_state():
    model = mlp()
    message = (
        r"regularizers\[1\] must hold its anchors and importances as floats.*add_penalty_grad_\(\) before each step"
    )
    packed, wide = EWC(model, 1.0, **NARROWEST), [EWC(model, 1.0), EWC(model, 1.0)]
    with pytest.raises(TypeError, match=message):
        optim.SGD(model.parameters(), lr=0.1, regularizers=[wide[0], packed])
    optimizer = optim.SGD(model.parameters(), lr=0.1, regularizers=wide)
    packed.consolidate(batches())
    wide[1].load_state_dict(packed.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 30)).sum().backward()
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_fused_optimizer_reads_bfloat16_importances_and_takes_penalties_in_the_gradient():
    model = mlp()
    ewc, packed = EWC(model, 50.0, importance_format="bfloat16"), EWC(model, 50.0, **NARROWEST)
    data = batches()
    for method in (ewc, packed):
        method.consolidate(data)
    move(model)
    starts = [p.detach().clone() for p in model.parameters()]
    for method, regularizers in ((ewc, [ewc]), (packed, [])):
        with torch.no_grad():
            for p, start in zip(model.parameters(), starts, strict=True):
                p.copy_(start)
        optimizer = optim.SGD(model.parameters(), lr=0.1, regularizers=regularizers)
        model.zero_grad()
        model(data[0][0]).square().mean().backward()
        grads = [p.grad.double() for p in model.parameters()]
        if method is packed:
            packed.add_penalty_grad_()
        optimizer.step()
        pairs = values(method).values()
        for p, start, g, (a, f) in zip(model.parameters(), starts, grads, pairs, strict=True):
            assert_close(p, start.double() - 0.1 * (g + 50.0 * f.double() * (start.double() - a.double())))


def test_the_default_strengths_follow_from_packed_importances_too():
    model = nn.Linear(40, 30)
    batches = [(torch.randn(64, 40), torch.randint(30, (64,)))]
    grids = []
    for formats in ({}, {"importance_format": "log8", "anchor_format": "fixed16"}):
        ewc = EWC(model, 1.0, **formats)
        ewc.consolidate(batches)
        grids.append(search._default_grid(ewc))
    assert grids[0] == grids[1]
