"""diagonal_fisher against ordinary forward and backward passes over the same batches, beside other exact ways."""

import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import limpet
from cases import ResNet18, mlp
from compare import peak_bytes

# model, input shape, batch size, batches in a call
CASES = {
    "MLP 784-1024-1024-10, batch 128": (lambda: mlp(784, 1024, 1024, 10)[1:], (784,), 128, 16),
    "CIFAR ResNet-18, batch 64": (ResNet18, (3, 32, 32), 64, 2),
}
criterion = nn.CrossEntropyLoss(reduction="sum")


def ordinary(model, batches):
    for x, y in batches:
        model.zero_grad()
        criterion(model(x), y).backward()


def sample_loop(model, batches):
    params = list(model.parameters())
    totals = [torch.zeros_like(p) for p in params]
    for x, y in batches:
        for n in range(len(x)):
            grads = torch.autograd.grad(criterion(model(x[n : n + 1]), y[n : n + 1]), params)
            torch._foreach_addcmul_(totals, grads, grads)


def vmapped(model, batches, chunk):
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    totals = {name: torch.zeros_like(p) for name, p in params.items()}

    def loss(params, x, y):
        return criterion(functional_call(model, (params, buffers), (x[None],)), y[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    for x, y in batches:
        for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
            for name, g in per_sample(params, xs, ys).items():
                totals[name] += g.square().sum(0)


def backpack_candidate(make, batches):
    """BackPACK's sum of squared gradients, where it installs and knows the model's layers."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model = backpack.extend(make().eval())
    extended = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def run():
        for x, y in batches:
            model.zero_grad()
            with backpack.backpack(extensions.SumGradSquared()):
                extended(model(x), y).backward()

    return run


def batches_of(shape, size, count):
    return [(torch.randn(size, *shape), torch.randint(10, (size,))) for _ in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_against_ordinary_passes(name, compare, in_earnest):
    make, shape, size, count = CASES[name]
    model = make().eval()
    batches = batches_of(shape, size, count if in_earnest else 1)
    calls = {
        "ours": lambda: limpet.diagonal_fisher(model, batches),
        "baseline": lambda: ordinary(model, batches),
    }
    ordinary(model, batches)
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    extra = peak_bytes(calls["ours"]) - peak_bytes(calls["baseline"])
    notes = {"batches": len(batches), "extra memory / parameters": round(extra / params, 2)}
    compare(f"diagonal_fisher, {name}", "ordinary forward and backward", "at most 1.25", calls, notes=notes)


def test_one_batch_alone(compare):
    """The probe that establishes the layout is paid once a call: what a single batch costs."""
    make, shape, size, _ = CASES["MLP 784-1024-1024-10, batch 128"]
    model = make().eval()
    batches = batches_of(shape, size, 1)
    calls = {
        "ours": lambda: limpet.diagonal_fisher(model, batches),
        "baseline": lambda: ordinary(model, batches),
    }
    compare("diagonal_fisher, the MLP, one batch in all", "ordinary forward and backward", "", calls)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # BackPACK's
@pytest.mark.parametrize("name", CASES)
def test_against_the_sample_loop(name, compare, in_earnest):
    make, shape, size, _ = CASES[name]
    model = make().eval()
    batches = batches_of(shape, size if in_earnest else 4, 4 if in_earnest and name.startswith("MLP") else 1)
    calls = {
        "ours": lambda: limpet.diagonal_fisher(model, batches),
        "baseline": lambda: sample_loop(model, batches),
        "vmap(grad), chunks of 16": lambda: vmapped(model, batches, 16),
    }
    if in_earnest and name.startswith("MLP"):
        with contextlib.suppress(pytest.skip.Exception):
            calls["BackPACK"] = backpack_candidate(make, batches)
    bound = "at most 0.05" if name.startswith("MLP") else ""
    compare(f"diagonal_fisher, {name}", "loop of batch size 1", bound, calls, notes={"batches": len(batches)})
