"""Validators: an argument's name goes in, a clear error with the value got comes out.

Every public function validates here, once, before any state changes; nothing below (ops, kernels) checks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """Say what was got: a tensor as dtype, shape and device; anything else as its type and repr."""
    if isinstance(value, Tensor):
        if not _dense(value):
            return f"a {'nested' if value.is_nested else value.layout} {value.dtype} tensor"
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def tensor(name: str, value: Any) -> Tensor:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    return value


def float_tensor(name: str, value: Any) -> Tensor:
    """Require a dense tensor of float32, float64, bfloat16 or float16."""
    if tensor(name, value).dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {describe(value)}")
    if not _dense(value):
        raise TypeError(f"{name} must be a dense tensor, got {describe(value)}")
    return value


def _dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def tensor_list(name: str, value: Any) -> list[Tensor]:
    """Require a list or tuple of floating tensors."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {describe(value)}")
    return [float_tensor(f"{name}[{i}]", t) for i, t in enumerate(value)]


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require that two tensors share a device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} as {other_name} is, got {describe(value)}")


def like_params(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Require one tensor beside each parameter, of its shape, and of a dtype that ``name`` may have there.

    ``integrals`` are float32 (float64 beside float64); ``anchors`` and ``importances`` are float64 exactly where the
    parameter is, and all others have the parameter's own dtype.
    """
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have as many tensors as params ({len(params)}), got {len(tensors)}")
    for k, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(
                f"{name}[{k}] must be of shape {list(param.shape)} on {param.device} as params[{k}] is, "
                f"got {describe(tensor)}"
            )
        if name == "integrals":
            allowed = {torch.float64 if param.dtype == torch.float64 else torch.float32}
        elif name in ("anchors", "importances"):
            allowed = {dtype for dtype in FLOAT_DTYPES if (dtype == torch.float64) == (param.dtype == torch.float64)}
        else:
            allowed = {param.dtype}
        if tensor.dtype not in allowed:
            wanted = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name}[{k}] must be {wanted} for params[{k}] ({param.dtype}), got {tensor.dtype}")


def finite_number(name: str, value: Any, *, minimum: float = -math.inf) -> float:
    """Require a finite real number, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number) or number < minimum:
        bound = "finite" if minimum == -math.inf else f"finite and at least {minimum:g}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return number


def integer(name: str, value: Any, *, minimum: int) -> int:
    """Require an integer, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Require one of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}")
    return str(value)


def optional_callable(name: str, value: Any) -> Callable[..., Any] | None:
    """Require something that can be called, or nothing."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, got {describe(value)}")
    return value


def keys(name: str, value: Any, expected: Collection[str]) -> Mapping[str, Any]:
    """Require a mapping with exactly these keys."""
    if not isinstance(value, Mapping) or value.keys() != set(expected):
        got = sorted(map(str, value)) if isinstance(value, Mapping) else describe(value)
        raise ValueError(f"{name} must have the keys {sorted(expected)}, got {got}")
    return value
