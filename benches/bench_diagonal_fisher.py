"""diagonal_fisher against ordinary forward and backward passes over the same batches, beside other exact ways."""

import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import limpet
from cases import ResNet18, mlp
from compare import peak_bytes


class Encoder(nn.Sequential):
    """A transformer encoder over 64 places, pooled by their mean."""

    def __init__(self):
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        super().__init__(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 10))

    def forward(self, x):
        return self[1](self[0](x).mean(dim=1))


# model, input shape, batch size, batches in a call, target
CASES = {
    "MLP 784-1024-1024-10, batch 128": (lambda: mlp(784, 1024, 1024, 10)[1:], (784,), 128, 16, "at most 1.05"),
    "CIFAR ResNet-18, batch 64": (ResNet18, (3, 32, 32), 64, 4, "at most 1.10"),
    "encoder d=256, 4 layers, 64 places, batch 16": (Encoder, (64, 256), 16, 16, "at most 1.10"),
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
    make, shape, size, count, target = CASES[name]
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
    compare(f"diagonal_fisher, {name}", "ordinary forward and backward", target, calls, notes=notes)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_a_stream(name, compare, in_earnest):
    """A later batch of an accumulator, for which the layouts are known and checked."""
    make, shape, size, _, target = CASES[name]
    model = make().eval()
    (batch,) = batches_of(shape, size if in_earnest else 2, 1)
    accumulator = limpet.FisherAccumulator(model)
    accumulator.add(batch)
    calls = {"ours": lambda: accumulator.add(batch), "baseline": lambda: ordinary(model, [batch])}
    compare(f"FisherAccumulator.add, {name}", "ordinary forward and backward", target, calls)


def token_losses(output, ids):
    logits = output.logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(dim=1)


def test_a_language_model(compare, in_earnest):
    """GPT-2's small shape with random weights, embedding and head tied, batch 4, 128 tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        use_cache=False, **({} if in_earnest else {"n_layer": 1, "n_embd": 24, "n_head": 2})
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(config.vocab_size, (4, 128 if in_earnest else 5))
    batch = {"input_ids": ids}, ids

    def one_pass():
        model.zero_grad()
        token_losses(model(ids), ids).sum().backward()

    accumulator = limpet.FisherAccumulator(model, loss=token_losses)
    first = peak_bytes(lambda: accumulator.add(batch))
    one_pass()
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(value.numel() * value.element_size() for value in accumulator.fisher().values())
    extra = first + held - peak_bytes(one_pass) - params  # both were held before the peaks were taken
    compare(
        "FisherAccumulator.add, GPT-2 small shape, batch 4, 128 tokens, tied",
        "ordinary forward and backward",
        "at most 1.15",
        {"ours": lambda: accumulator.add(batch), "baseline": one_pass},
        notes={"extra memory / parameters, first batch": round(extra / params, 2)},
    )


@pytest.mark.parametrize("name", list(CASES)[:2])
def test_expected(name, compare, in_earnest):
    """The expectation over ten classes: nine columns of output gradients."""
    make, shape, size, _, _ = CASES[name]
    model = make().eval()
    (batch,) = batches_of(shape, size if in_earnest else 2, 1)
    accumulator = limpet.FisherAccumulator(model, labels="expected")
    accumulator.add(batch)
    calls = {"ours": lambda: accumulator.add(batch), "baseline": lambda: ordinary(model, [batch])}
    target = "at most 4" if "ResNet" in name else ""
    compare(f"labels='expected' over 10 classes, {name}", "ordinary forward and backward", target, calls)


def test_one_batch_alone(compare):
    """The probe that establishes the layout is paid once a call: what a single batch costs."""
    make, shape, size, *_ = CASES["MLP 784-1024-1024-10, batch 128"]
    model = make().eval()
    batches = batches_of(shape, size, 1)
    calls = {
        "ours": lambda: limpet.diagonal_fisher(model, batches),
        "baseline": lambda: ordinary(model, batches),
    }
    compare("diagonal_fisher, the MLP, one batch in all", "ordinary forward and backward", "", calls)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # BackPACK's
@pytest.mark.parametrize("name", list(CASES)[:2])
def test_against_the_sample_loop(name, compare, in_earnest):
    make, shape, size, *_ = CASES[name]
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
