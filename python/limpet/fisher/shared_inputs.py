"""Inputs that belong to all samples where their size is by chance the batch's: a mask ``[T, T]`` where ``T = N``."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import torch
from torch import nn

from limpet.fisher.batches import Batch, Objective, losses_of, tensors
from limpet.fisher.per_sample import same_loss


def told_apart(model: nn.Module, batch: Batch, objective: Objective) -> Batch:
    """The batch, with the square inputs named that the first sample needs whole.

    Only where there are any beside inputs of samples with ``N`` places. Then a sample alone must have its loss in the
    batch; a batch for which it never has stays as it is, and is refused when it is computed.
    """
    rows = [t for t in tensors(batch.inputs) if t.dim() > 0 and t.shape[0] == batch.size]
    square = [t for t in rows if t.shape == (batch.size, batch.size) and not t.requires_grad]
    if batch.size == 1 or not square or not any(batch.size in t.shape[1:] for t in rows if t.dim() > 2):
        return batch
    with torch.no_grad():
        together = losses_of(model, batch, objective)
        for count in range(len(square) + 1):
            for shared in combinations(square, count):
                found = replace(batch, shared=frozenset(map(id, shared)))
                try:
                    alone = losses_of(model, found.take(slice(0, 1)), objective)
                    same_loss(alone, together[:1], batch, torch.tensor([0]))
                except (RuntimeError, ValueError, IndexError):  # a shape that does not fit, or another loss
                    continue
                return found
    return batch
