"""The exact slower way: one backward pass per sample, for the parameters that no rule covers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Loss, losses_of


def add_squares(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    params: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    expected: Tensor | None,  # [N]: the losses seen in the batch
) -> None:
    """Add the squared gradient of each sample's loss to ``sums``; that loss must be as ``expected``."""
    for n in range(batch.size):
        value = losses_of(model, batch.take(slice(n, n + 1)), loss)
        if expected is not None:
            same_loss(value.detach(), expected[n : n + 1], batch, torch.tensor([n]))
        if not value.requires_grad:
            continue
        grads = torch.autograd.grad(value, list(params.values()), torch.ones_like(value), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                total = sums[name]
                grad = (grad.to_dense() if grad.layout != torch.strided else grad).to(total.dtype)
                total.addcmul_(grad, grad)


def same_loss(alone: Tensor, together: Tensor, batch: Batch, samples: Tensor) -> None:  # [K] each
    """Require that the losses of samples do not depend on the batch around them.

    Batches of another size run through other kernels, so differences up to the root of the dtype's epsilon
    (3.5e-4 in float32), relative to the larger of 1 and the losses, count as rounding.
    """
    bound = float(torch.finfo(alone.dtype).eps) ** 0.5 * together.abs().clamp(min=1.0)
    different = (alone - together).abs() > bound
    if different.any():
        k = int(different.nonzero()[0])
        raise RuntimeError(
            f"the loss or the model mixes samples: in batch {batch.number} the loss of sample {int(samples[k])} "
            f"is {together[k].item():.6g} among all {batch.size} and {alone[k].item():.6g} without the others"
        )
