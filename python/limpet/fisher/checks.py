"""What is refused before anything has changed, and the buffers put back after everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from limpet import _checks

_MAY_BE_REFUSED = (_BatchNorm, _DropoutNd, nn.Embedding, nn.EmbeddingBag)


def tracked_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters to compute for, by name, once model and surroundings have been checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_checks.describe(model)}")
    params: dict[str, nn.Parameter] = {}
    seen = set()
    for prefix, module in model.named_modules():
        if isinstance(module, _MAY_BE_REFUSED):
            _refuse_module(prefix, module)
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                params[f"{prefix}.{name}" if prefix else name] = p
    if not params:
        raise ValueError("model has no parameters that require a gradient")
    devices: dict[torch.device, str] = {}
    for name, p in params.items():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once first")
        if p.dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"parameter {name!r} must be floating, got {_checks.describe(p)}")
        devices.setdefault(p.device, name)
    if len(devices) > 1:
        (one, first), (other, second) = list(devices.items())[:2]
        raise ValueError(f"parameters must share a device, got {first!r} on {one} and {second!r} on {other}")
    if (meta := torch.device("meta")) in devices:
        raise ValueError(f"parameter {devices[meta]!r} must hold values, got one on the meta device")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("diagonal_fisher needs gradients: call it outside torch.inference_mode()")
    return params


def standing(model: nn.Module) -> list[Any]:
    """What :func:`tracked_parameters` depends on: while it is the same (with ``==``), so is the answer.

    Modules and parameters are named by their ``id``: whoever keeps the answer keeps them, too.
    """
    found: list[Any] = [torch.is_inference_mode_enabled()]
    for module in _modules(model):
        found += (id(module), module.training)
        if isinstance(module, _MAY_BE_REFUSED):
            found += (
                getattr(module, "p", None),
                getattr(module, "max_norm", None),
                id(module._buffers.get("running_mean")),
            )
        for p in module._parameters.values():
            if p is not None:
                found += (id(p), p.requires_grad, p.dtype, p.device, p.shape)
    return found


def _modules(model: nn.Module) -> list[nn.Module]:
    """As ``model.modules()``, whose nested generators take as long as all that is asked of the modules."""
    modules: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    for module in waiting:
        if module is not None and module not in modules:
            modules[module] = None
            waiting += module._modules.values()
    return [*modules]


def _refuse_module(name: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        what = (
            "would normalise by the statistics of the batch, which makes samples interact: "
            "call model.eval() first (with track_running_stats=True)"
        )
    elif isinstance(module, _DropoutNd) and module.training and module.p > 0:
        what = "drops at random in training mode: call model.eval() first"
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        what = f"has max_norm={module.max_norm}, which changes the weights in forward"
    else:
        return
    raise RuntimeError(f"{name!r} ({type(module).__name__}) {what}")


class _Buffers:
    """The buffers as they were: objects and values."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in _modules(model)
            for name, buffer in module._buffers.items()
        ]

    def restore(self) -> list[str]:
        """Put back what has changed; the names of what had."""
        changed = []
        for module, name, buffer, value in self._found:
            if module._buffers.get(name) is not buffer:
                changed.append((module, name))
                module._buffers[name] = buffer
            if buffer is not None and value is not None and not _same_bytes(buffer, value):
                changed.append((module, name))
                with torch.no_grad():
                    buffer.copy_(value)
        paths = {module: path for path, module in self._model.named_modules()} if changed else {}
        return [f"{paths.get(module, type(module).__name__)}.{name}".lstrip(".") for module, name in changed]

    def check(self) -> None:
        """Put back what has changed, and refuse a model that changes its buffers."""
        changed = self.restore()
        if changed:
            raise RuntimeError(
                f"the model changes its buffer {changed[0]!r} in forward: "
                "the result would depend on the order of samples"
            )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[_Buffers]:
    """Leave every buffer as it was, byte for byte, whatever happens inside."""
    buffers = _Buffers(model)
    try:
        yield buffers
    finally:
        buffers.restore()


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())
