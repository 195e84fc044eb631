"""The sigmoid gate, until the op is there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_lateral(
    x: Tensor,  # [*, H]
    h: Tensor,  # [*, H]
    weight: Tensor,  # [H, H]
    bias: Tensor | None,  # [H]
) -> Tensor:  # [*, H]
    """``x * g + h * (1 - g)``, ``g = sigmoid(h W^T + b)``."""
    return torch.lerp(h, x, F.linear(h, weight, bias).sigmoid())
