"""EWC against the sum of its tasks' quadratics in float64, on models that grow, freeze and fail."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import limpet
from limpet import EWC
from tolerances import assert_close


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batches(count=3, dtype=torch.float32, inputs=4, classes=3):
    return [(torch.randn(8, inputs, dtype=dtype), torch.randint(classes, (8,))) for _ in range(count)]


@torch.no_grad()
def move(model, by=0.3):
    for param in model.parameters():
        param.add_(by * torch.randn_like(param))


class SumOfTasks:
    """Every task's own quadratic, kept apart, in float64: what EWC must equal."""

    def __init__(self, model):
        self.model, self.tasks = model, []

    def consolidate(self, data, decay=None):
        fisher = limpet.diagonal_fisher(self.model, data)
        here = {name: p.detach().double().clone() for name, p in self.model.named_parameters()}
        if decay is not None:
            self.tasks = [({n: decay * f for n, f in old.items()}, here) for old, _ in self.tasks]
        self.tasks.append(({n: f.double() for n, f in fisher.items()}, here))

    def penalty(self, strength):
        value = torch.zeros((), dtype=torch.float64)
        for fisher, anchors in self.tasks:
            for name, param in self.model.named_parameters():
                value = value + (fisher[name] * (param.double() - anchors[name]).square()).sum()
        return 0.5 * strength * value


@pytest.mark.parametrize("decay", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_tasks_equal_the_sum_over_tasks(dtype, decay):
    model = mlp(dtype)
    ewc, apart = EWC(model, strength=50.0, decay=decay), SumOfTasks(model)
    for task in range(20):
        data = batches(dtype=dtype)
        ewc.consolidate(data)
        apart.consolidate(data, decay)
        move(model)
        assert ewc.num_tasks == task + 1
        params = list(model.parameters())
        want = apart.penalty(50.0)
        got = ewc.penalty()
        assert got.dtype == dtype
        assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True):
            assert_close(a, b)


def test_two_ways_in_are_one():
    model = mlp()
    ewc = EWC(model, strength=3.0)
    for _ in range(2):
        ewc.consolidate(batches())
        move(model)
    x, y = batches(1)[0]
    criterion = nn.CrossEntropyLoss()
    penalty = ewc.penalty()
    (criterion(model(x), y) + penalty).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    criterion(model(x), y).backward()
    value = ewc.add_penalty_grad_()
    assert value.item() == penalty.item()
    assert not value.requires_grad
    for param, grad in zip(model.parameters(), want, strict=True):
        assert_close(param.grad, grad)


def test_nothing_is_protected_before_the_first_consolidation():
    model = mlp()
    ewc = EWC(model, strength=1.0)
    assert ewc.penalty().item() == 0.0
    assert ewc.add_penalty_grad_().item() == 0.0
    assert all(p.grad is None for p in model.parameters())
    x, y = batches(1)[0]
    (nn.functional.cross_entropy(model(x), y) + ewc.penalty()).backward()


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 3)])

    def forward(self, x):
        return self.heads[-1](self.body(x).tanh())


def test_a_new_head_is_free_and_counted(caplog):
    model = Growing()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    model.heads.append(nn.Linear(6, 3))
    with caplog.at_level(logging.INFO, logger="limpet"):
        assert ewc.penalty().item() == 0.0
        ewc.penalty()
    assert [r.getMessage() for r in caplog.records] == [
        "EWC: 2 parameters are new since the last consolidation and left free"
    ]
    with torch.no_grad():
        model.heads[1].weight.add_(1.0)
    assert ewc.penalty().item() == 0.0
    ewc.consolidate(batches())
    with torch.no_grad():
        model.heads[1].weight.add_(1.0)
    assert ewc.penalty().item() > 0.0


def test_a_tensor_that_grew_keeps_its_old_slice_protected(caplog):
    model = mlp()
    ewc = EWC(model, strength=2.0)
    ewc.consolidate(batches())
    old_weight, old_bias, fisher = model[2].weight.detach(), model[2].bias.detach(), ewc.importances["2.weight"].clone()
    model[2] = nn.Linear(6, 5)
    with torch.no_grad():
        model[2].weight[:3] = old_weight + 0.5
        model[2].bias[:3] = old_bias
    with caplog.at_level(logging.INFO, logger="limpet"):
        assert_close(ewc.penalty(), (fisher.double() * 0.25).sum())
    assert "EWC: 2.weight grew from [3, 6] to [5, 6]; its old slice stays protected" in caplog.text
    with torch.no_grad():
        model[2].weight[3:] += 7.0
    assert_close(ewc.penalty(), (fisher.double() * 0.25).sum())
    ewc.consolidate(batches(classes=5))
    assert ewc.importances["2.weight"].shape == (5, 6)


def shrunk(model):
    model[2] = nn.Linear(6, 2)


def removed(model):
    del model[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrunk, r"parameter '2.weight' was consolidated with shape \[3, 6\]; it may grow, but has shape \[2, 6\]"),
        (removed, r"the model has lost parameters that are protected: \['2.bias', '2.weight'\]"),
    ],
)
def test_what_is_protected_must_stay(change, message):
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    change(model)
    for call in (ewc.penalty, ewc.add_penalty_grad_, lambda: ewc.consolidate(batches())):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert_same_state(ewc.state_dict(), before)


def assert_same_state(a, b):
    assert {k: v for k, v in a.items() if not isinstance(v, dict)} == {
        k: v for k, v in b.items() if not isinstance(v, dict)
    }
    for key in ("anchors", "importances"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_frozen_parameters_keep_their_protection():
    model = mlp()
    ewc = EWC(model, strength=2.0)
    ewc.consolidate(batches())
    importance = ewc.importances["0.weight"].clone()
    model[0].requires_grad_(False)
    move(model)
    value = ewc.penalty()
    assert ewc.add_penalty_grad_().item() == pytest.approx(value.item())
    assert model[0].weight.grad is None
    ewc.consolidate(batches())
    assert torch.equal(ewc.importances["0.weight"], importance)
    model[0].requires_grad_(True)
    value = ewc.penalty()
    value.backward()
    assert model[0].weight.grad.abs().sum() > 0


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_consolidate_evaluates_and_gives_the_model_back():
    model = Noisy()
    model.train()
    model[1].eval()  # each module has its own mode
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(3, 6)
    grad, buffers = model[3].weight.grad, {n: b.clone() for n, b in model.named_buffers()}
    ewc, data = EWC(model, strength=1.0), batches()
    ewc.consolidate(data)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert model[3].weight.grad is grad
    assert torch.equal(grad, torch.ones(3, 6))
    assert not model[0].bias.requires_grad
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    want = limpet.diagonal_fisher(model.eval(), data)
    assert all(torch.equal(ewc.importances[name], want[name]) for name in want)
    assert "0.bias" not in ewc.importances


def interrupt(done, total):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("data", "options", "error"),
    [
        ([(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.int64))], {}, RuntimeError),
        ([], {}, ValueError),
        (7, {}, TypeError),
        (batches(1), {"progress": interrupt}, KeyboardInterrupt),
        (batches(1), {"max_samples": 0}, ValueError),
    ],
)
def test_a_consolidation_that_fails_changes_nothing(data, options, error):
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    move(model)
    with pytest.raises(error):
        ewc.consolidate(data, **options)
    assert_same_state(ewc.state_dict(), before)
    assert model.training


def test_state_dict_round_trip(tmp_path):
    model = mlp()
    ewc = EWC(model, strength=5.0)
    for _ in range(2):
        ewc.consolidate(batches())
        move(model)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    other = EWC(model, strength=0.0, decay=0.5)
    other.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert_same_state(other.state_dict(), ewc.state_dict())
    assert other.penalty().item() == ewc.penalty().item()
    assert other.constant == ewc.constant > 0
    for again in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert again.penalty().item() == ewc.penalty().item()
        assert again.model is not model
    move(model)
    assert again.penalty().item() != ewc.penalty().item()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, r"state\['strength'\] must be finite and at least 0, got -1.0"),
        ({"decay": 2.0}, ValueError, r"state\['decay'\] must be at most 1, got 2.0"),
        ({"num_tasks": "2"}, TypeError, r"state\['num_tasks'\] must be an integer, got str '2'"),
        ({"anchors": {}}, ValueError, "anchors and importances of the same names and shapes"),
        ({"anchors": [1]}, TypeError, r"state\['anchors'\] must be a mapping"),
        ({"importances": {"0.weight": 1}}, TypeError, r"state\['importances'\]\['0.weight'\] must be a torch.Tensor"),
        ({"extra": 1}, ValueError, "state must have the keys"),
    ],
)
def test_a_bad_state_is_refused_before_anything_changes(change, error, message):
    ewc = EWC(mlp(), strength=5.0)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=message):
        ewc.load_state_dict({**before, **change})
    assert_same_state(ewc.state_dict(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EWC("model", 1.0), TypeError, "model must be a torch.nn.Module, got str 'model'"),
        (lambda: EWC(mlp(), -1.0), ValueError, "strength must be finite and at least 0, got -1.0"),
        (lambda: EWC(mlp(), "1"), TypeError, "strength must be a number, got str '1'"),
        (lambda: EWC(mlp(), 1.0, decay=1.5), ValueError, "decay must be at most 1, got 1.5"),
        (lambda: EWC(mlp(), 1.0, decay=float("nan")), ValueError, "decay must be finite"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_half_precision_model():
    model = mlp(torch.bfloat16)
    ewc = EWC(model, strength=10.0)
    ewc.consolidate(batches(dtype=torch.bfloat16))
    assert {t.dtype for t in [*ewc.anchors.values(), *ewc.importances.values()]} == {torch.float32}
    move(model)
    ewc.add_penalty_grad_()
    want = 10.0 * ewc.importances["0.weight"].double() * (model[0].weight.double() - ewc.anchors["0.weight"].double())
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert_close(model[0].weight.grad, want.detach())


def test_a_model_that_changed_its_dtype():
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    move(model)
    value = ewc.penalty()
    model.double()
    assert ewc.penalty().dtype == torch.float64
    assert_close(ewc.penalty(), value.double(), torch.float32)


def test_channels_last_parameters_stay_one_flat_pass():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
    ewc = EWC(model, strength=1.0)
    ewc.consolidate([(torch.randn(8, 3, 4, 4), torch.randint(3, (8,)))])
    strides = model[0].weight.stride()
    assert ewc.anchors["0.weight"].stride() == strides
    assert ewc.importances["0.weight"].stride() == strides


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]  # which runs a C++ compiler


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_with_a_compiled_step(backend):
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    move(model)
    x, y = batches(1)[0]

    def loss():
        return nn.functional.cross_entropy(model(x), y) + ewc.penalty()

    want = torch.autograd.grad(loss(), list(model.parameters()))
    got = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


class Merging(nn.Linear):
    """Does more in ``train()`` than set the flag, as some adapters do."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_modules_that_do_more_in_train_are_undone():
    model = nn.Sequential(Merging(4, 6), nn.Tanh(), Merging(6, 3))
    model[2].eval()
    EWC(model, strength=1.0).consolidate(batches())
    assert [m.training for m in model] == [True, True, False]
    assert [model[0].merged, model[2].merged] == [False, True]


def test_interrupted_while_merging(monkeypatch):
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    move(model)
    merged, calls = limpet.methods.ewc._merged, []

    def twice(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return merged(*args)

    monkeypatch.setattr(limpet.methods.ewc, "_merged", twice)
    with pytest.raises(KeyboardInterrupt):
        ewc.consolidate(batches())
    assert_same_state(ewc.state_dict(), before)


def test_frozen_parameters_are_not_announced_as_new(caplog):
    model = mlp()
    model[0].requires_grad_(False)
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    with caplog.at_level(logging.INFO, logger="limpet"):
        ewc.penalty()
        assert not caplog.records
        model[0].requires_grad_(True)
        ewc.penalty()
    assert len(caplog.records) == 1
    ewc.consolidate(batches())
    assert set(ewc.anchors) == {name for name, _ in model.named_parameters()}


def test_everything_frozen():
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    move(model)
    value = ewc.penalty().item()
    model.requires_grad_(False)
    assert ewc.penalty().item() == ewc.add_penalty_grad_().item() == value > 0


def test_a_changed_strength_scales_the_constant_too():
    model = mlp()
    ewc = EWC(model, strength=0)
    for _ in range(2):
        ewc.consolidate(batches())
        move(model)
    assert ewc.constant > 0
    assert ewc.penalty().item() == 0.0
    values = []
    for ewc.strength in (1.0, 3.0):
        values.append(ewc.penalty().item())
    assert values[1] == pytest.approx(3 * values[0], rel=1e-6)
    assert values[0] > 0


def test_tied_parameters_are_protected_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    ewc = EWC(model, strength=2.0)
    ewc.consolidate(batches(inputs=3))
    assert list(ewc.anchors) == ["0.weight"]
    anchor = model[0].weight.detach().clone()
    move(model)
    want = (ewc.importances["0.weight"].double() * (model[0].weight.detach().double() - anchor).square()).sum()
    assert_close(ewc.penalty().detach(), want)


def test_a_loaded_state_is_a_copy_and_an_old_one_stays():
    model = mlp()
    ewc, other = EWC(model, strength=1.0), EWC(model, strength=1.0)
    ewc.consolidate(batches())
    state = ewc.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    other.anchors["0.weight"].zero_()
    move(model)
    ewc.consolidate(batches())
    assert_same_state(state, before)


def test_tensors_placed_in_inference_mode_can_be_differentiated_later():
    model = mlp()
    ewc = EWC(model, strength=1.0)
    ewc.consolidate(batches())
    move(model)
    model.double()
    with torch.inference_mode():
        value = ewc.penalty().item()
    again = ewc.penalty()
    again.backward()
    assert again.item() == value > 0
