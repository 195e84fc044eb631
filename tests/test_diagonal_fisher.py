"""``diagonal_fisher`` against the plain loop over single samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from cases import CASES, Case

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def one_by_one(
    model: nn.Module, batches: list[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """The definition: a batch of one sample at a time, its gradient squared, and the mean; in float64."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
    samples = 0
    for inputs, targets in batches:
        for n in range(len(targets)):
            if isinstance(inputs, dict):
                output = model(**{key: value[n : n + 1] for key, value in inputs.items()})
            elif isinstance(inputs, tuple):
                output = model(*(value[n : n + 1] for value in inputs))
            else:
                output = model(inputs[n : n + 1])
            target = targets[n : n + 1]
            value = (F.cross_entropy(output, target, reduction="sum") if loss is None else loss(output, target)).sum()
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                if grad is not None:
                    total += grad.double().square()
            samples += 1
    return {name: total / samples for name, total in sums.items()}


def assert_fisher(got: Mapping[str, Tensor], want: Mapping[str, Tensor], bound: float) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        error = (got[name].double() - value).abs().max().item()
        assert error <= bound * value.abs().max().item(), f"{name}: {error:.2e} against {value.abs().max().item():.2e}"


def double(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: double(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(double(value) for value in tree)
    return tree.double() if tree.is_floating_point() else tree


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)  # torch's own, in the loop
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_loop(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = case.make_model().to(dtype)
    batches = [case.make_batch(n) for n in (6, 6, 1, 2)]
    if dtype == torch.float64:
        batches = [double(batch) for batch in batches]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.num_samples == 15
    assert all(value.dtype == dtype for value in fisher.values())
    assert all(p.grad is None for p in model.parameters())
    want = one_by_one(model.double(), [double(batch) for batch in batches])
    assert_fisher(fisher, want, BOUND[dtype])
