"""What the tests of ``FisherAccumulator`` share: batches, accumulators of them, and modules with hard cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import limpet
from cases import CLASSES, mlp


def model_and_batches(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return mlp(4, 6, CLASSES).to(dtype), [(torch.randn(n, 4, dtype=dtype), torch.randint(CLASSES, (n,))) for n in sizes]


def accumulated(model: nn.Module, batches: list[Any], **options: Any) -> limpet.FisherAccumulator:
    accumulator = limpet.FisherAccumulator(model, **options)
    for batch in batches:
        accumulator.add(batch)
    return accumulator


def assert_same(got: limpet.DiagonalFisher, want: limpet.DiagonalFisher, bound: float = 0.0) -> None:
    assert (got.num_samples, got.routes, list(got)) == (want.num_samples, want.routes, list(want))
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= bound * value.abs().max(), name


class HiddenLinear(nn.Linear):
    """A linear layer that no rule can see: its weight goes the per-sample way."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.T @ x

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, self.weight) + self.bias


class Rooted(nn.Module):
    """The first layer's gradient is infinite where its output is zero; the head's stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.where(h.detach() == 0, h.abs().sqrt(), h))
