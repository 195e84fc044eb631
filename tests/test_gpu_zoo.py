"""The zoo on a GPU: every model exact against the definition on the CPU in float64, and what depends on the device.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
import test_zoo
from cases import ResNet18, mlp, with_statistics
from zoo import Entry, assert_exact, definition, in_dtype, tree_map

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ENTRIES = list(test_zoo.ENTRIES)
if find_spec("transformers") is not None:
    import test_zoo_transformers

    ENTRIES += test_zoo_transformers.ENTRIES


def on_device(tree: Any) -> Any:
    return tree_map(lambda t: t.cuda(), tree)


def on_host(fisher: limpet.Fisher) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in fisher.items()}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_agrees_with_the_definition(entry: Entry) -> None:
    torch.manual_seed(0)
    model = entry.make_model().float()
    batches = in_dtype(entry.make_batches(), torch.float32)
    want = definition(copy.deepcopy(model), batches, entry.loss)
    got = limpet.diagonal_fisher(model.cuda(), on_device(batches), loss=entry.loss)
    assert_exact(on_host(got), want, torch.float32)


def images(model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model on the device, and batches."""
    batches = [(torch.randn(n, 3, 8, 8), torch.randint(10, (n,))) for n in (5, 7)]
    return with_statistics(model).cuda(), on_device(batches)


@pytest.mark.parametrize("labels", ["data", "expected"])
def test_images_by_label_mode(labels: str) -> None:
    """Convolutions, batch normalisation, ten columns at once; beside the same call on the CPU in float64."""
    model, batches = images(ResNet18(width=8))
    wide = copy.deepcopy(model).cpu().double()
    want = limpet.diagonal_fisher(wide, [(x.cpu().double(), y.cpu()) for x, y in batches], labels=labels)
    got = limpet.diagonal_fisher(model, batches, labels=labels)
    for name, value in want.items():  # a ReLU may decide otherwise in float32
        error = (got[name].cpu() - value).abs().max() / value.max()
        assert error <= 1e-3, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(dtype: torch.dtype) -> None:
    """No worse than twice single samples in the same precision; the parts of a step are float32's."""
    model = mlp(30, 50, 40, 10).cuda()
    x, y = torch.randn(64, 30, device="cuda"), torch.randint(10, (64,), device="cuda")
    wide = copy.deepcopy(model).double()
    want = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}
    independent = copy.deepcopy(want)
    for n in range(64):
        for network, totals in ((wide, want), (model, independent)):
            narrow = network is model
            with torch.autocast("cuda", dtype=dtype, enabled=narrow):
                output = network(x[n : n + 1] if narrow else x[n : n + 1].double())
                loss = F.cross_entropy(output, y[n : n + 1])
            scale = 256.0 if narrow else 1.0
            for total, g in zip(
                totals.values(), torch.autograd.grad(scale * loss, list(network.parameters())), strict=True
            ):
                total += (g.double() / scale).square() / 64
    with torch.autocast("cuda", dtype=dtype):
        got = limpet.diagonal_fisher(model, [(x, y)])
    for name, value in want.items():
        bound = (independent[name] - value).abs().max()
        assert (got[name] - value).abs().max() <= 2 * bound, name


def test_sampled_labels_are_the_same_again() -> None:
    model, batches = images(ResNet18(width=8))
    first, second = (limpet.diagonal_fisher(model, batches, labels="sampled", seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_accumulator_goes_to_the_host_and_back() -> None:
    model, batches = images(ResNet18(width=8))
    accumulator = limpet.FisherAccumulator(model)
    accumulator.add(batches[0])
    state = copy.deepcopy(accumulator.state_dict())
    resumed = limpet.FisherAccumulator(model)
    resumed.load_state_dict(state)
    for each in (accumulator, resumed):
        each.add(batches[1])
    first, second = accumulator.fisher(), resumed.fisher()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_later_batch_waits_for_the_device_once() -> None:
    """What is known of a batch serves the next: all that is asked of the device is asked once, with the loss."""
    model, batches = images(ResNet18(width=8))
    accumulator = limpet.FisherAccumulator(model)
    for _ in range(2):
        accumulator.add(batches[0])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            accumulator.add(batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing CUDA operation" in str(w.message)]) == 1
