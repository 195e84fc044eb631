"""Which column should answer: the one whose output has the lowest entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limpet import _checks


def entropies(outputs: Sequence[Tensor]) -> Tensor:  # K of [N, C_k] -> [N, K]
    """The entropy of each column's softmax outputs, over the largest that so many classes can have: in [0, 1]."""
    for number, output in enumerate(outputs):
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ValueError(
                f"outputs must be [N, C] to infer a task, column {number} gives {_checks.describe(output)}"
            )
    logs = [output.detach().float().log_softmax(1) for output in outputs]
    return torch.stack([-(log.exp() * log).sum(1) / math.log(max(log.shape[1], 2)) for log in logs], dim=1)


def of_lowest_entropy(outputs: Sequence[Tensor]) -> Tensor:  # K of [N, C] -> [N, C]
    """For each sample the output of the column that is surest."""
    chosen = entropies(outputs).argmin(1)
    if len({output.shape[1] for output in outputs}) > 1:
        shapes = [list(output.shape) for output in outputs]
        raise ValueError(f"outputs must be of one shape where the task is inferred, got {shapes}: use infer_task")
    return torch.stack(list(outputs))[chosen, torch.arange(len(chosen), device=chosen.device)]
