"""limpet.optim beside torch.optim: the same numbers, states that load into each other, the same conduct."""

import copy
import io

import pytest
import torch
from torch import nn

from limpet import optim
from tolerances import relative_error

OURS = {"AdamW": optim.AdamW, "SGD": optim.SGD}
TORCHS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
CASES = [
    ("AdamW", {}),
    ("AdamW", {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.0}),
    ("AdamW", {"maximize": True, "lr": torch.tensor(0.01)}),
    ("AdamW", {"betas": (0.0, 0.9)}),
    ("SGD", {}),
    ("SGD", {"lr": 0.03, "momentum": 0.9}),
    ("SGD", {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": torch.tensor(0.03), "momentum": 0.8, "dampening": 0.4, "maximize": True, "weight_decay": 0.1}),
]
IMPLEMENTATIONS = ({"foreach": False}, {"foreach": True}, {"fused": True})
BESIDE = [
    (name, options, implementation)
    for name, options in CASES
    for implementation in IMPLEMENTATIONS  # torch's foreach AdamW takes no tensor as its learning rate
    if not (name == "AdamW" and "foreach" in implementation and isinstance(options.get("lr"), torch.Tensor))
]


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are tiny: a second thread would only be waited for."""
    torch.set_num_threads(1)


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 4)).to(dtype)


def train(model, optimizer, steps, start=0):
    """Steps on data that depend on the step's number only."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def distance(model, other):
    return max(relative_error(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("name", "options", "implementation"), BESIDE, ids=str)
def test_the_same_numbers_as_torch(name, options, implementation):
    models = net(), net()
    train(models[0], OURS[name](models[0].parameters(), **options), 100)
    train(models[1], TORCHS[name](models[1].parameters(), **options, **implementation), 100)
    assert distance(*models) < 3e-5  # training itself multiplies the rounding of a step


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_same_numbers_as_torch_in_float64(name, options):
    models = net(torch.float64), net(torch.float64)
    train(models[0], OURS[name](models[0].parameters(), **options), 100)
    train(models[1], TORCHS[name](models[1].parameters(), **options, fused=True), 100)
    assert distance(*models) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_numbers_as_torchs_fused_adamw_in_narrow_types(dtype):
    params = [torch.randn(1000).to(dtype) for _ in range(2)]
    mine, theirs = [p.clone() for p in params], [p.clone() for p in params]
    optimizers = optim.AdamW(mine, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, fused=True)
    for _ in range(30):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(1000).to(dtype)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a, b) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "options", "implementation"), BESIDE, ids=str)
def test_states_load_into_each_other(name, options, implementation):
    """Train with torch, go on here, and back again, beside torch all the way; states go through a file."""

    def carried(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole = net()
    train(whole, TORCHS[name](whole.parameters(), **options, **implementation), 30)

    model = net()
    first = TORCHS[name](model.parameters(), **options, **implementation)
    train(model, first, 10)
    second = OURS[name](model.parameters())
    second.load_state_dict(carried(first.state_dict()))
    train(model, second, 10, start=10)
    third = TORCHS[name](model.parameters())
    third.load_state_dict(carried(second.state_dict()))
    train(model, third, 10, start=20)
    assert distance(whole, model) < 3e-5
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert p.shape == q.shape
    assert first.state_dict()["state"].keys() == second.state_dict()["state"].keys()
    for key, state in first.state_dict()["state"].items():
        assert state.keys() == second.state_dict()["state"][key].keys()
    assert second.param_groups[0].keys() == first.param_groups[0].keys()
    assert not isinstance(options.get("lr"), torch.Tensor) or second.param_groups[0]["lr"] == options["lr"]


def test_a_state_goes_on_bit_for_bit():
    for name, options in CASES:
        whole, parts = net(), net()
        train(whole, OURS[name](whole.parameters(), **options), 20)
        optimizer = OURS[name](parts.parameters(), **options)
        train(parts, optimizer, 7)
        again = OURS[name](parts.parameters(), **options)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(parts, again, 13, start=7)
        assert distance(whole, parts) == 0


def test_groups_parameters_without_gradients_and_later_ones():
    models = net(), net()
    for optimizers, model in ((OURS, models[0]), (TORCHS, models[1])):
        frozen = nn.Parameter(torch.ones(3))
        optimizer = optimizers["SGD"](
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[2].bias, frozen], "momentum": 0.9}],
            lr=0.01,
        )
        train(model, optimizer, 5)
        optimizer.add_param_group({"params": [model[2].weight], "momentum": 0.5, "lr": 0.05})
        train(model, optimizer, 5, start=5)
        frozen.grad = torch.ones(3)  # its momentum begins now, that of the others has begun
        optimizer.step()
        assert torch.allclose(frozen, torch.tensor(0.99))
    assert distance(*models) < 1e-6


def test_schedulers_hooks_and_closures():
    model, calls = net(), []
    optimizer = optim.AdamW(model.named_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()
    assert calls == ["before", "closure", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_copies_and_gradients_that_stay():
    model = net()
    optimizer = optim.AdamW(model.parameters(), maximize=True)
    train(model, optimizer, 3)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(twin_model, twin, 3)
    assert distance(model, twin_model) == 0


@pytest.mark.parametrize("name", OURS)
def test_a_gradient_scaler(name):
    """Against the same steps without one; the scale is a power of two, so not a bit differs. Overflows are skipped."""
    models, options = (net(), net()), {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    optimizers = [OURS[name](model.parameters(), lr=0.01, **options) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        x = torch.randn(8, 5)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if model is models[0]:
                overflow = step in (0, 3)
                scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
                if step == 4:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            elif step not in (0, 3):
                loss.backward()
                optimizer.step()
    assert distance(*models) == 0
    if name == "AdamW":
        assert all(state["step"] == 4 for state in optimizers[0].state.values())
