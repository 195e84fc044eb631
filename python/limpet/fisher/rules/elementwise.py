"""Functions of each element with a broadcast parameter: of the parameter repeated, which has a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.rules.arithmetic import repeated_beside

_NAMES = (
    *("where", "lerp", "addcmul", "addcdiv", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum"),
    *("fmax", "fmin", "max", "min", "pow", "__pow__", "atan2", "arctan2", "hypot", "logaddexp", "logaddexp2", "xlogy"),
    *("div", "divide", "true_divide", "__truediv__", "copysign", "fmod", "remainder", "__mod__"),
)
_MOST = 1 << 24  # elements of a parameter's copies, one for each row of distances


def _repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    def repeated(*args: Any, **options: Any) -> Any:
        tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        if len({value.dtype for value in tensors if value.dtype != torch.bool}) > 1:
            return None  # which dtype the result has depends on which of them have dimensions
        shape = torch.broadcast_shapes(*(value.shape for value in tensors))
        if all(value.shape == shape for value in tensors if value.requires_grad):
            return None

        def full(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad or value.shape == shape:
                return value
            largest = max((other for other in tensors if other is not value), key=Tensor.numel)
            return repeated_beside(value, largest.detach().expand(shape))

        return function(*map(full, args), **{name: full(value) for name, value in options.items()})

    return repeated


def cdist(
    x1: Tensor,  # [N, D]
    x2: Tensor,  # [R, D]
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor | None:
    """``torch.cdist`` of rows to the rows of a parameter: each of its own to a copy of the parameter."""
    if x1.dim() != 2 or x2.dim() != 2 or not x2.requires_grad or x1.shape[0] * x2.numel() > _MOST:
        return None
    x1 = x1.unsqueeze(1)
    beside = x1.detach().expand(-1, *x2.shape)
    return torch.cdist(x1, repeated_beside(x2, beside), p, compute_mode).squeeze(1)


def attention(
    query: Tensor,  # [*, T, D]
    key: Tensor,  # [*, S, D]
    value: Tensor,
    attn_mask: Tensor | None = None,  # broadcasts to [*, T, S]
    *args: Any,
    **options: Any,
) -> Tensor | None:
    """``F.scaled_dot_product_attention`` with a parameter that is added to the scores."""
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask is None or not attn_mask.requires_grad or attn_mask.shape == scores:
        return None
    return F.scaled_dot_product_attention(query, key, value, attn_mask.expand(scores), *args, **options)


# None where it does not apply.
OPENED: dict[object, Callable[..., Any]] = {
    **{
        getattr(owner, name): _repeated(getattr(owner, name))
        for name in _NAMES
        for owner in (torch, Tensor)
        if hasattr(owner, name)
    },
    torch.cdist: cdist,
    F.scaled_dot_product_attention: attention,
}
