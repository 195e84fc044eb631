"""The fused optimizers on a GPU: against float64, in a captured graph, without waiting for the device.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

import copy

import pytest
import torch

from limpet import ops, optim, reference
from test_optim import BESIDE, OURS, TORCHS, distance, net
from test_optim_ops import NARROW, SHAPES, adamw, flat, sgd, tensors, wider
from test_optim_regularizers import OPTIONS, Integrating
from tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = {"adamw": (adamw, ops.adamw_step_, reference.adamw_step_), "sgd": (sgd, ops.sgd_step_, reference.sgd_step_)}
DTYPES = [(torch.float64,) * 3, *((p, a, f) for p in NARROW for a in NARROW for f in NARROW)]


def on_device(made):
    return {name: [t.cuda() for t in ts] for name, ts in made.items()}


def check(kind, made, **options):
    """One step on the device against the reference in float64, and a second one from the same start: the same bits."""
    step, op, spec = STEPS[kind]
    got, again, want = on_device(made), on_device(made), wider(made)
    on_gpu = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    step(got, op, **on_gpu)
    step(again, op, **on_gpu)
    step(want, spec, **options)
    for name, ts in got.items():
        assert all(torch.equal(a, b) for a, b in zip(ts, again[name], strict=True)), name
        if ts and (name != "integrals" or made["params"][0].dtype in (torch.float32, torch.float64)):
            assert_close(flat(ts).cpu(), flat(want[name]))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_step_with_everything(kind, dtypes):
    check(kind, tensors(SHAPES, *dtypes))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("integrals", [True, False])
@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_with_and_without(kind, integrals, penalty, maximize):
    made = tensors(SHAPES)
    for name in [*([] if integrals else ["integrals"]), *([] if penalty else ["anchors", "importances"])]:
        made[name] = []
    made["max_exp_avg_sqs"] = []
    check(kind, made, maximize=maximize, grad_scale=torch.tensor(8.0))


@pytest.mark.parametrize("kind", STEPS)
def test_misaligned_strided_and_many_tensors(kind):
    made = tensors([(k % 50 + 1,) for k in range(1500)])
    check(kind, made)
    made = on_device(tensors([(1001,), (40, 50), (2, 3, 8, 8)]))
    got, want = dict(made), wider({name: [t.cpu() for t in ts] for name, ts in made.items()})
    got["params"] = [torch.empty(1002, device="cuda")[1:], torch.empty(50, 40, device="cuda").t(), None]
    got["params"][2] = made["params"][2].to(memory_format=torch.channels_last)
    for new, old in zip(got["params"], made["params"], strict=True):
        new.copy_(old)
    step, op, spec = STEPS[kind]
    step(got, op)
    step(want, spec)
    for a, b in zip(got["params"], want["params"], strict=True):
        assert_close(a.cpu(), b, torch.float32)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_a_scaler_skips_changes_nothing_and_nobody_waits(kind):
    made = on_device(tensors(SHAPES))
    before = {name: [t.clone() for t in ts] for name, ts in made.items()}
    scaler = {"grad_scale": torch.tensor(2.0, device="cuda"), "found_inf": torch.tensor(1.0, device="cuda")}
    lr = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        STEPS[kind][0](made, STEPS[kind][1], lr=lr, **scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, ts in made.items():
        assert all(torch.equal(a, b) for a, b in zip(ts, before[name], strict=True)), name


def train(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "options", "implementation"), BESIDE, ids=str)
def test_the_same_numbers_as_torch(name, options, implementation):
    models = net().cuda(), net().cuda()
    train(models[0], OURS[name](models[0].parameters(), **options), 100)
    train(models[1], TORCHS[name](models[1].parameters(), **options, **implementation), 100)
    assert distance(*models) < 1e-4


@pytest.mark.parametrize("name", OURS)
def test_in_a_cuda_graph(name):
    """A captured step, with its learning rate on the device, is the step: replayed, and at another rate."""
    options = {**OPTIONS[name], **({"capturable": True} if name == "AdamW" else {})}
    options["lr"] = torch.tensor(options["lr"], device="cuda")
    model = net().cuda()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()

    def made(model):
        penalty = Integrating(model.cpu(), 0.5)
        model.cuda()
        for kept in (penalty.anchors, penalty.importances, penalty.integrals):
            kept.update({n: t.cuda() for n, t in kept.items()})
        settings = {**options, "lr": options["lr"].clone()}
        return penalty, OURS[name](model.parameters(), **settings, regularizers=[penalty])

    (penalty, optimizer), (twin_penalty, twin_optimizer) = made(model), made(twin)
    optimizer.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for rate in (1.0, 0.5):
        optimizer.param_groups[0]["lr"].mul_(rate)
        graph.replay()
    twin_optimizer.step()
    for rate in (1.0, 0.5):
        twin_optimizer.param_groups[0]["lr"].mul_(rate)
        twin_optimizer.step()
    assert distance(model, twin) == 0
    assert all(torch.equal(t, twin_penalty.integrals[n]) for n, t in penalty.integrals.items())


def test_a_gradient_scaler():
    model = net().cuda()
    optimizer = optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(2, 5, device="cuda")).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())
