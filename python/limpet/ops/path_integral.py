"""Path integral family: Synaptic Intelligence's running importance, over all tensors of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, reference
from limpet.ops._library import define

# --- schema, reference backend, fake ---------------------------------------------------------------------------------


def _fake(*args: Any) -> None:
    return None


define(
    "path_integral_update_(Tensor(a!)[] integrals, Tensor(b!)[] previous, Tensor[] params, Tensor[] grads, "
    "Tensor[] anchors, Tensor[] importances, float strength) -> ()",
    default=reference.path_integral_update_,
    fake=_fake,
)

_update = torch.ops.limpet.path_integral_update_.default


# --- public function -------------------------------------------------------------------------------------------------


@torch.no_grad()
def path_integral_update_(
    integrals: Sequence[Tensor],  # [*] each
    previous: Sequence[Tensor],  # [*] each
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    *,
    anchors: Sequence[Tensor] = (),  # [*] each
    importances: Sequence[Tensor] = (),  # [*] each
    strength: float = 0.0,
) -> None:
    r"""Add one optimizer step to the path integrals of Synaptic Intelligence, and move on.

    .. math:: \omega_i \mathrel{-}= g_i \, (\theta_i - \theta_i^\text{before}), \qquad
        \theta_i^\text{before} = \theta_i

    (Zenke et al. 2017, eq. 3), with ``g`` the gradient of the *unregularised* loss before the step. One pass: 24 bytes
    per float32 parameter. Where ``grads`` hold the gradient of a penalty ``strength / 2 * sum F (theta - anchor)^2``
    beside it, give its ``anchors``, ``importances`` and ``strength``, and it is taken out on the way. A parameter that
    did not move adds nothing, whatever its gradient is: a step that a gradient scaler skipped leaves no trace.

    Args:
        integrals: omega, added to; float32 (float64 for float64 parameters), on one device.
        previous: the parameters before the step, of the parameters' dtypes; become ``params``.
        params: the parameters after the step, float32, float64, bfloat16 or float16.
        grads: the gradients at ``previous``, of the parameters' dtypes.
        anchors: of the penalty that the gradients hold, or nothing; any floating dtype (float64 with float64 alone).
        importances: as many, the same choice of dtypes.
        strength: the penalty's factor; finite.

    Raises:
        TypeError: an argument is no list of floating tensors, or a dtype is another one.
        ValueError: lengths, shapes or devices differ, or ``strength`` is not finite. Nothing has changed then.

    >>> omega, before = torch.zeros(2), torch.tensor([1.0, 3.0])
    >>> path_integral_update_([omega], [before], [torch.tensor([0.5, 3.0])], [torch.tensor([2.0, 4.0])])
    >>> omega, before
    (tensor([1., 0.]), tensor([0.5000, 3.0000]))
    """
    lists = [
        _checks.tensor_list(name, value)
        for name, value in (
            ("params", params),
            ("integrals", integrals),
            ("previous", previous),
            ("grads", grads),
            ("anchors", anchors),
            ("importances", importances),
        )
    ]
    names = ("integrals", "previous", "grads", *(("anchors", "importances") if anchors or importances else ()))
    for name, other in zip(names, lists[1:], strict=False):
        _like_params(name, other, lists[0])
    if any(p.device != lists[0][0].device for p in lists[0]):
        raise ValueError(f"params must be on one device, got {sorted({str(p.device) for p in lists[0]})}")
    strength = _checks.finite_number("strength", strength)
    if params:
        _update(lists[1], lists[2], lists[0], lists[3], lists[4], lists[5], strength)


def _like_params(name: str, tensors: list[Tensor], params: list[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have as many tensors as params ({len(params)}), got {len(tensors)}")
    for k, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(
                f"{name}[{k}] must be of shape {list(param.shape)} on {param.device} as params[{k}] is, "
                f"got {_checks.describe(tensor)}"
            )
        if name == "integrals":
            allowed = {reference.wide(param.dtype)}
        elif name in ("previous", "grads"):
            allowed = {param.dtype}
        else:
            allowed = {d for d in _checks.FLOAT_DTYPES if (d == torch.float64) == (param.dtype == torch.float64)}
        if tensor.dtype not in allowed:
            wanted = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name}[{k}] must be {wanted} for params[{k}] ({param.dtype}), got {tensor.dtype}")
