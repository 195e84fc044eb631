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
from limpet.scenarios import datasets
from limpet.strength import search
from tolerances import assert_close, relative_error

NARROWEST = {"importance_format": "log8", "anchor_format": "fixed16"}
NARROW = [(f, a) for f in IMPORTANCE_FORMATS for a in ANCHOR_FORMATS if (f, a) != ("float32", "float32")]


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are tiny: a second thread would only be waited for."""
    torch.set_num_threads(1)


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


def test_merging_takes_little_more_than_it_lets_go(monkeypatch):
    """Parameters' new importances go as their packed tensors come, and few elements are unpacked at a time."""
    monkeypatch.setattr(storage, "_PIECE", 4096)
    model = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(6)))
    ewc = EWC(model, strength=1.0, **NARROWEST)

    def measured_and_merged():
        ewc._merge({name: torch.rand_like(p) for name, p in model.named_parameters()}, _merged)

    measured_and_merged()
    assert peak_bytes(measured_and_merged) < 4 * 540_000 + 3.1 * 90_000 + 100 * 4096


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


# --- states -----------------------------------------------------------------------------------------------------------


def save_with_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def save_with_safetensors(state, path):
    """As docs/regularizers.md says it: tensors by ``kind.name``, and numbers as metadata."""
    safetensors = pytest.importorskip("safetensors.torch")
    kinds = [kind for kind, value in state.items() if isinstance(value, dict)]
    numbers = json.dumps({key: value for key, value in state.items() if key not in kinds})
    safetensors.save_file({f"{kind}.{name}": t for kind in kinds for name, t in state[kind].items()}, path)
    loaded = {kind: {} for kind in kinds}
    for key, tensor in safetensors.load_file(path).items():
        kind, name = key.split(".", 1)
        loaded[kind][name] = tensor
    return {**json.loads(numbers), **loaded}


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors])
@pytest.mark.parametrize("formats", [("log8", "fixed16"), ("log8", "float32"), ("bfloat16", "float32")], ids=str)
def test_resumed_bit_for_bit(save, formats, tmp_path):
    model = mlp()
    names = dict(zip(("importance_format", "anchor_format"), formats, strict=True))
    ewc, other = EWC(model, 3.0, **names), EWC(model, 1.0)
    for _ in range(2):
        ewc.consolidate(batches())
        move(model)
    other.load_state_dict(save(ewc.state_dict(), tmp_path / "ewc"))
    copies = [other, copy.deepcopy(ewc)]
    copies[1].model = model
    data = batches()
    for method in (ewc, *copies):
        method.consolidate(data)
    for method in copies:
        assert method.penalty().item() == ewc.penalty().item()
        assert same(method.anchors, ewc.anchors)
        assert same(method.importances, ewc.importances)
    assert {t.dtype for t in other.importances.values()} == {t.dtype for t in ewc.importances.values()}


def test_a_float32_state_makes_a_narrow_regularizer_wide_again():
    """As strength and decay do, the formats come with the state."""
    model = mlp()
    wide, narrow = EWC(model, 3.0), EWC(model, 3.0, **NARROWEST)
    wide.consolidate(batches())
    assert wide.state_dict().keys().isdisjoint({"shapes", "anchor_format", "importance_format"})
    narrow.load_state_dict(wide.state_dict())
    assert not narrow.packed
    narrow.consolidate(batches())
    assert {t.dtype for t in held(narrow)} == {torch.float32}


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("shapes"), ValueError, r"state must have the keys \['anchor_format', 'importance_format', 'shapes'\]"),
        (lambda s: {**s, "anchor_format": "bfloat16"}, ValueError, "anchor_format must be one of 'float32', 'fixed16'"),
        (lambda s: {**s, "anchor_format": "split24"}, TypeError, r"\['anchors'\]\['0.weight'\] must be torch.uint8 as"),
        (lambda s: {**s, "importance_format": "float32"}, TypeError, r"'0.weight'\] must be torch.float32 as float32"),
        (lambda s: {**s, "shapes": {}}, ValueError, r"anchors and shapes of the same names, not so: \['0.bias'"),
        (lambda s: {**s, "shapes": 3}, TypeError, r"state\['shapes'\] must be a mapping"),
        (
            lambda s: {**s, "shapes": {**s["shapes"], "0.bias": torch.tensor([4])}},
            ValueError,
            r"state\['anchors'\]\['0.bias'\] must be of shape \[9\] to hold \[4\] as fixed16, got",
        ),
        (
            lambda s: {**s, "shapes": {**s["shapes"], "0.bias": torch.tensor([-4])}},
            ValueError,
            r"state\['shapes'\]\['0.bias'\] must hold the sizes of a shape",
        ),
        (lambda s: {**s, "tasks": []}, ValueError, "state must not have the key 'tasks' with importance_format='log8'"),
    ],
)
def test_a_bad_state_is_refused_before_anything_changes(change, error, message):
    ewc = EWC(mlp(), 5.0, **NARROWEST)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=message):
        ewc.load_state_dict(change(before))
    after = ewc.state_dict()
    assert all(same(before[kind], after[kind]) for kind in ("anchors", "importances", "shapes"))


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
