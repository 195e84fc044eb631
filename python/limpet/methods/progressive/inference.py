"""Which column should answer: its output's entropy, and the rows of columns that were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


def chosen_rows(outputs: Mapping[int, Tensor], chosen: Tensor) -> Tensor:  # columns' [N, C], int64 [N] -> [N, C]
    """For each sample the output of the column with the chosen number."""
    if len({output.shape[1:] for output in outputs.values()}) > 1:
        shapes = [list(output.shape) for output in outputs.values()]
        raise ValueError(f"outputs must be of one shape where the task is inferred, got {shapes}: use infer_task")
    numbers = torch.tensor(sorted(outputs), device=chosen.device)
    stacked = torch.stack([outputs[number] for number in sorted(outputs)])
    return stacked[torch.searchsorted(numbers, chosen), torch.arange(len(chosen), device=chosen.device)]
