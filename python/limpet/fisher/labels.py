"""The label modes: which losses the Fisher information squares the gradients of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from limpet import _checks
from limpet.fisher.batches import Batch, Objective

Loss = Callable[[Any, Any], Tensor]

LABELS = ("data",)


def from_data(loss: Loss) -> Objective:
    """The loss of the targets that the batches give."""

    def objective(outputs: Any, batch: Batch) -> Tensor:  # [N, 1]
        return one_per_sample(loss(outputs, batch.targets), batch.size).unsqueeze(1)

    return objective


def cross_entropy(outputs: Any, targets: Any) -> Tensor:  # [N, C, *], [N, *] -> [N]
    """The default loss: minus the log-likelihood of the targets, summed over a sample's places."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise TypeError(
            "the default loss needs outputs of shape [N, C, *]; give loss= for this model, whose output is "
            f"{_checks.describe(outputs)}"
        )
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).sum(dim=1) if losses.dim() > 1 else losses


def one_per_sample(losses: Any, samples: int) -> Tensor:  # [N]
    """The losses, checked for their shape."""
    if not isinstance(losses, Tensor) or losses.shape != (samples,) or not losses.is_floating_point():
        raise ValueError(
            f"loss must return one value per sample, a floating tensor of shape [{samples}] "
            f"(reduction='none'), got {_checks.describe(losses)}"
        )
    return losses
