"""The quadratic penalty of EWC and its relatives, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide
from limpet.reference.narrow import dense_anchor, dense_importance


def quadratic_penalty(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """``strength / 2 * sum_i F_i (theta_i - anchor_i)^2`` (Kirkpatrick et al. 2017, eq. 3), summed in float64."""
    if not params:
        return torch.zeros((), dtype=torch.float32)
    value = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for theta, anchor, importance in zip(params, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        value = value + (dense_importance(importance, theta) * difference.square()).sum(dtype=torch.float64)
    return (0.5 * strength * value).to(wide(params[0].dtype))


def quadratic_penalty_grad(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
    scale: Tensor,  # []
) -> list[Tensor]:  # [*] each
    """The penalty's gradient ``scale * strength * F_i (theta_i - anchor_i)``, in each parameter's dtype."""
    grads = []
    for theta, anchor, importance in zip(params, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        grads.append((scale.to(dtype) * strength * dense_importance(importance, theta) * difference).to(theta.dtype))
    return grads


def add_quadratic_penalty_grad_(
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each, added to in place
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """Add the penalty's gradient to ``grads`` and return the penalty."""
    for theta, grad, anchor, importance in zip(params, grads, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        grad.copy_(grad.to(dtype) + strength * dense_importance(importance, theta) * difference)
    return quadratic_penalty(params, anchors, importances, strength)
