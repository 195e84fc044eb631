"""The exact slower way: one backward pass per sample, for the parameters that no rule covers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.precision import gradients, working_dtype
from limpet.reference import wide


def add_squares(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    params: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    expected: Tensor | None,  # [N, K]: the losses seen in the batch
    scale: float,  # the losses are multiplied by it
) -> None:
    """Add the squared gradient of each sample's loss to ``sums``; that loss must be as ``expected``.

    Nothing is added where a sample's is not.
    """
    squares = {name: torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False) for name, p in params.items()}
    for n in range(batch.size):
        value = losses_of(model, batch.take(slice(n, n + 1)), objective)
        if expected is not None:
            same_loss(value.detach(), expected[n : n + 1], batch, torch.tensor([n]))
        if not value.requires_grad:
            continue
        columns = value.unbind(dim=1)
        for column in columns:
            grads = gradients(
                column, list(params.values()), torch.full_like(column, scale), retain_graph=column is not columns[-1]
            )
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    grad = (grad.to_dense() if grad.layout != torch.strided else grad).to(squares[name].dtype)
                    squares[name].addcmul_(grad, grad)
    for name, square in squares.items():
        sums[name].add_(square)


def same_loss(alone: Tensor, together: Tensor, batch: Batch, samples: Tensor) -> None:  # [n, K] twice, [n]
    """Require that the losses of samples do not depend on the batch around them.

    Batches of another size run through other kernels, so differences up to the root of the dtype's epsilon
    (3.5e-4 in float32; autocast's dtype counts), relative to the larger of 1 and the losses, count as rounding.
    """
    bound = float(torch.finfo(working_dtype(alone)).eps) ** 0.5 * together.abs().clamp(min=1.0)
    different = (alone - together).abs() > bound
    if different.any():
        n, k = (int(i) for i in different.nonzero()[0])
        raise RuntimeError(
            f"the loss or the model mixes samples: in batch {batch.number} the loss of sample {int(samples[n])} "
            f"is {together[n, k].item():.6g} among all {batch.size} and {alone[n, k].item():.6g} without the others"
        )
