"""The quadratic penalty with its gradient into ``.grad``, against the bytes it must move and against eager loops."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from compare import interleave
from limpet import EWC, ops, reference
from op_cases import GPT2_SHAPES, RESNET18_SHAPES, quadratic_inputs

FLOOR_BYTES = 20  # per float32 parameter: read theta, anchor, importance and grad, write grad
SHAPES = {
    "one tensor of 50M": [(50_000_000,)],
    "ResNet-18, 62 tensors": RESNET18_SHAPES,
    "GPT-2, 148 tensors": GPT2_SHAPES,
}


def loop(params, anchors, importances, strength):
    """What most code does: a Python loop, and autograd."""
    total = 0.0
    for param, anchor, importance in zip(params, anchors, importances, strict=True):
        total = total + (importance * (param - anchor).pow(2)).sum()
    (0.5 * strength * total).backward()


def foreach(params, anchors, importances, strength):
    differences = torch._foreach_sub(params, anchors)
    weighted = torch._foreach_mul(differences, importances)
    torch._foreach_add_([p.grad for p in params], weighted, alpha=strength)
    return sum(torch.sum(w * d) for w, d in zip(weighted, differences, strict=True)) * (0.5 * strength)


def inputs(name):
    params, anchors, importances = quadratic_inputs(SHAPES[name])
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, anchors, importances


def candidates(tensors, in_earnest):
    params, anchors, importances = tensors
    detached = [p.detach() for p in params]
    grads = [p.grad for p in params]
    calls = {
        "ours": lambda: ops.add_quadratic_penalty_grad_(*tensors, 10.0),
        "penalty() and backward": lambda: ops.quadratic_penalty(*tensors, 10.0).backward(),
        "loop": lambda: loop(*tensors, 10.0),
        "foreach": torch.no_grad()(lambda: foreach(*tensors, 10.0)),
        "reference": lambda: reference.add_quadratic_penalty_grad_(detached, grads, anchors, importances, 10.0),
    }
    if in_earnest:
        compiled = torch.compile(reference.add_quadratic_penalty_grad_)
        calls["reference compiled"] = lambda: compiled(detached, grads, anchors, importances, 10.0)
    return calls


@pytest.mark.parametrize("name", SHAPES)
def test_against_the_bytes_floor(name, compare, in_earnest):
    tensors = inputs(name)
    count = sum(p.numel() for p in tensors[0])
    source = torch.randn(50_000_000)
    target = torch.empty_like(source)
    calls = candidates(tensors, in_earnest and not name.startswith("GPT"))  # whose loop takes minutes to compile
    calls["baseline"] = lambda: target.copy_(source)  # 8 bytes per element
    scale = FLOOR_BYTES * count / (8 * source.numel())
    bound = "" if name.startswith("ResNet") else "at most 1.1"
    compare(f"penalty and gradient, {name}", "20 bytes each at copy speed", bound, calls, scale=scale)


NARROW = {
    "8-bit importances": (lambda a: a, ops.pack_importance),
    "16-bit anchors": (ops.pack_anchor, lambda f: f),
    "24-bit anchors": (lambda a: ops.pack_anchor(a, "split24"), lambda f: f),
    "8-bit importances, 16-bit anchors": (ops.pack_anchor, ops.pack_importance),
    "8-bit importances, 24-bit anchors": (lambda a: ops.pack_anchor(a, "split24"), ops.pack_importance),
    "bfloat16 both": (lambda a: a.bfloat16(), lambda f: f.bfloat16()),
}


@pytest.mark.parametrize("name", list(SHAPES)[:2])
def test_narrow_storage_against_float32(name, compare):
    params, anchors, importances = inputs(name)

    def call(store_anchor, store_importance):
        lists = params, [store_anchor(a) for a in anchors], [store_importance(f) for f in importances]
        return lambda: ops.add_quadratic_penalty_grad_(*lists, 10.0)

    calls = {what: call(*stores) for what, stores in NARROW.items()}
    calls["ours"] = calls.pop("8-bit importances")
    calls["baseline"] = call(lambda a: a, lambda f: f)
    compare(f"penalty and gradient, 8-bit importances, {name}", "float32 importances", "at most 1.0", calls)


ALLOCATORS = {
    "glibc defaults": {},
    "MALLOC_MMAP_MAX_=0": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "30000000000",
        "MALLOC_TOP_PAD_": "0",
    },
}


def against_the_loop(once: bool) -> dict[str, list[float]]:
    """Seconds of each candidate; the loop is the baseline."""
    torch.set_num_threads(2)
    calls = candidates(inputs("ResNet-18, 62 tensors"), in_earnest=False)
    calls["baseline"] = calls.pop("loop")
    return interleave(calls, once=once)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_against_the_loop(allocator, compare, in_earnest, monkeypatch):
    """In a fresh process: how much eager code pays for page faults depends on what the process freed before."""
    for name, value in ALLOCATORS[allocator].items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        seconds = fresh.submit(against_the_loop, not in_earnest).result()
    bound = "at most 0.125" if allocator == "glibc defaults" else ""
    what = f"penalty and gradient, ResNet-18, 62 tensors, fresh process, {allocator}"
    compare(what, "loop with autograd", bound, seconds=seconds)


@pytest.mark.parametrize("keep_tasks", [False, True])
def test_ten_tasks(keep_tasks, compare):
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    one, ten = EWC(model, 1.0), EWC(model, 1.0, keep_tasks=keep_tasks)
    for ewc, tasks in ((one, 1), (ten, 10)):
        for _ in range(tasks):
            ewc.consolidate([(torch.randn(8, 784), torch.randint(10, (8,)))])
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    what = "EWC of 10 tasks" + (", each kept apart as well" if keep_tasks else "")
    calls = {"ours": many(ten.add_penalty_grad_), "baseline": many(one.add_penalty_grad_)}
    compare(what + ", the MLP's penalty and gradient", "the same of one task", "at most 1.02", calls)


def many(call):
    def repeated():
        for _ in range(20):
            call()

    return repeated
