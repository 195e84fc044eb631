"""Sums of squared batch gradients by ordinary autograd: the ``"batched"`` and ``"sampled_batched"`` modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.per_sample import same_loss
from limpet.fisher.precision import LossScale, gradients, without_tf32
from limpet.fisher.reading import Look
from limpet.fisher.sums import Sums


class Batched:
    """``sum_b w_b (sum_{n in b} g_n)^2``, with the interface of :class:`limpet.fisher.computation.Computation`.

    Args:
        model: the model.
        objective: one loss per sample.
        params: the parameters by name.
        mean: ``w_b = 1 / N_b``: each batch counts as its size times the square of its mean gradient. Otherwise
            ``w_b = 1``, which is unbiased where the gradients of different samples are independent with mean zero.
    """

    def __init__(self, model: nn.Module, objective: Objective, params: Mapping[str, Tensor], *, mean: bool) -> None:
        self._model, self._objective, self._params, self._mean = model, objective, params, mean
        self.sums = Sums(params)
        self.slow: dict[str, Tensor] = {}  # none
        self.materialised: set[str] = set()  # none
        self.loss_scale = LossScale()
        self._apart = False  # whether samples were seen not to interact

    def add(self, batch: Batch, looks: Sequence[Look] = ()) -> None:
        """Add one batch's squared gradient; ``looks`` are heeded before, if it is not the first."""
        with without_tf32(next(iter(self._params.values())).device):
            self.loss_scale.add(
                self.sums.running,
                self._params,
                partial(self._add, batch, (self.sums, *looks) if self._apart else (self.sums,)),
            )
        self.sums.end_batch()

    def _add(self, batch: Batch, looks: Sequence[Look], sums: Mapping[str, Tensor], scale: float) -> None:
        losses = losses_of(self._model, batch, self._objective, looks)
        if not losses.requires_grad:
            raise RuntimeError(
                f"the losses of batch {batch.number} do not depend on any parameter that requires a gradient: "
                "is something detached or under no_grad?"
            )
        if batch.size > 1 and not self._apart:
            with torch.no_grad():
                alone = losses_of(self._model, batch.take(slice(0, 1)), self._objective)
            same_loss(alone, losses.detach()[:1], batch, torch.tensor([0]))
            self._apart = True
        grads = gradients(losses, list(self._params.values()), torch.full_like(losses, scale))
        for name, grad in zip(self._params, grads, strict=True):
            if grad is not None:
                total = sums[name]
                grad = (grad.to_dense() if grad.layout != torch.strided else grad).to(total.dtype)
                total.addcmul_(grad, grad, value=1 / batch.size if self._mean else 1.0)
