"""Synaptic Intelligence's path integrals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide


def path_integral_update_(
    integrals: Sequence[Tensor],  # [*] each, added to in place
    previous: Sequence[Tensor],  # [*] each, becomes params
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
) -> None:
    """One step's share ``-(g - strength * F (theta_before - anchor)) (theta - theta_before)`` of each path integral.

    (Zenke et al. 2017, eq. 3; ``g`` holds the gradient of the penalty ``strength / 2 * sum F (theta - anchor)^2``
    too, which is taken out.) What did not move adds nothing, whatever its gradient is.
    """
    for k, (integral, before, theta, grad) in enumerate(zip(integrals, previous, params, grads, strict=True)):
        dtype = wide(theta.dtype)
        g, old = grad.to(dtype), before.to(dtype)
        if anchors:
            g = g - strength * importances[k].to(dtype) * (old - anchors[k].to(dtype))
        moved = theta.to(dtype) - old
        integral.copy_(integral.to(dtype) - torch.where(moved == 0, 0.0, g * moved))
        before.copy_(theta)
