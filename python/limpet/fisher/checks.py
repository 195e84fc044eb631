"""What is refused before anything has changed, and the buffers put back after everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from limpet import _checks, _core

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
    return [torch.is_inference_mode_enabled(), *_core.standing(model, _MAY_BE_REFUSED)]


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


class Buffers:
    """The buffers as they were: objects and bytes.

    Plain buffers of one dtype are kept and compared end to end, whatever their number: each kernel costs a GPU as much
    as a million bytes do.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = [(module, name, buffer) for module in _modules(model) for name, buffer in module._buffers.items()]
        together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._odd: list[tuple[Tensor, Tensor]] = []  # with their values
        for buffer in {id(buffer): buffer for _, _, buffer in self._found if buffer is not None}.values():
            if _is_plain(buffer):
                together.setdefault((buffer.device, buffer.dtype), []).append(buffer)
            elif not buffer.is_meta:
                self._odd.append((buffer, buffer.detach().clone()))
        self._plain = [(buffers, _end_to_end(buffers)) for buffers in together.values()]
        self._versions: list[int] | None = None if self._plain else []  # when the values were last found to be the same
        self._versions_read: list[int] = []

    def flags(self) -> list[Tensor]:
        """Whether plain buffers hold other values than they did, on their devices."""
        self._versions_read = self._current_versions()
        return [torch.ne(_end_to_end(buffers), kept).any() for buffers, kept in self._plain]

    def heed(self, flags: Sequence[float]) -> None:
        """Take the values of :meth:`flags`, and refuse a model that changes its buffers."""
        if any(flags):
            self._versions = None
            self.check()
        self._versions = self._versions_read

    def restore(self) -> list[str]:
        """Put back what has changed; the names of what had."""
        different = {id(buffer): (buffer, value) for buffer, value in self._changed()}
        changed = []
        for module, name, buffer in self._found:
            if module._buffers.get(name) is not buffer:
                changed.append((module, name))
                module._buffers[name] = buffer
            if id(buffer) in different:
                changed.append((module, name))
        with torch.no_grad():
            for buffer, value in different.values():
                buffer.copy_(value)
        paths = {module: path for path, module in self._model.named_modules()} if changed else {}
        return [f"{paths.get(module, type(module).__name__)}.{name}".lstrip(".") for module, name in changed]

    def check(self) -> None:
        """Put back what has changed, and refuse a model that changes its buffers.

        Values that :meth:`heed` saw are not compared again unless torch has written to a buffer since.
        """
        if (
            not self._odd
            and self._versions == self._current_versions()
            and all(module._buffers.get(name) is buffer for module, name, buffer in self._found)
        ):
            return
        changed = self.restore()
        if changed:
            raise RuntimeError(
                f"the model changes its buffer {changed[0]!r} in forward: "
                "the result would depend on the order of samples"
            )

    def _current_versions(self) -> list[int]:
        return [buffer._version for buffers, _ in self._plain for buffer in buffers]

    def _changed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The buffers with other values than they had, and those."""
        for buffers, kept in self._plain:
            if not torch.equal(_end_to_end(buffers), kept):
                parts = kept.split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    if not torch.equal(_end_to_end([buffer]), part):
                        yield buffer, part.view(buffer.dtype).view(buffer.shape)
        yield from ((buffer, value) for buffer, value in self._odd if not _same_values(buffer, value))


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[Buffers]:
    """Leave every buffer as it was, byte for byte, if anything is raised inside; otherwise its ``check`` does."""
    buffers = Buffers(model)
    try:
        yield buffers
    except BaseException:
        buffers.restore()
        raise


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_PLAIN = (*_checks.FLOAT_DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _is_plain(buffer: Tensor) -> bool:
    return (
        type(buffer) is Tensor
        and buffer.layout == torch.strided
        and buffer.dtype in _PLAIN
        and not (buffer.is_meta or buffer.is_inference())
    )


def _end_to_end(buffers: Sequence[Tensor]) -> Tensor:  # of one dtype -> integers [*]
    """The bits of buffers, copied: integers are equal where all bits are."""
    with torch.no_grad():
        flat = torch.cat([buffer if buffer.dim() == 1 else buffer.reshape(-1) for buffer in buffers])
    return flat.view(_BITS[flat.element_size()])


def _same_values(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())
