"""The arithmetic of gradients: autocast's loss scale, backward outside autocast, no TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from limpet.reference import wide

_FIRST_SCALE = 2.0**12  # of a float16 model's losses; torch's GradScaler starts at 2**16 over a batch's mean


def gradients(
    losses: Tensor,  # [N] or [N, K]
    inputs: Tensor | Sequence[Tensor],
    weights: Tensor,  # like losses
    *,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradient of ``sum(weights * losses)``; None where it does not reach. Outside autocast, as torch asks for."""
    device = losses.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)


class LossScale:
    """Keeps float16 gradients from vanishing: losses are multiplied before backward, squared gradients divided.

    The scale is halved until no gradient of the batch overflows (Micikevicius et al. 2018, section 3.2).

    Attributes:
        scale: a power of two; the next batch's losses are multiplied by it.
    """

    def __init__(self) -> None:
        self.scale = _FIRST_SCALE

    def add(
        self,
        sums: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        add_scaled: Callable[[Mapping[str, Tensor], float], None],
    ) -> None:
        """Add what ``add_scaled(into, scale)`` adds, with ``scale**2`` taken out; nothing is scaled without float16."""
        if not _is_half(params):
            add_scaled(sums, 1.0)
            return
        while True:
            squares = {name: torch.empty(p.shape, dtype=wide(p.dtype), device=p.device) for name, p in params.items()}
            torch._foreach_zero_(list(squares.values()))
            add_scaled(squares, self.scale)
            filled = [square for square in squares.values() if square.numel()]
            if self.scale <= 1 or not filled or bool(torch.stack(torch._foreach_max(filled)).isfinite().all()):
                break
            self.scale /= 2
        torch._foreach_add_([sums[name] for name in squares], list(squares.values()), alpha=self.scale**-2)


def _is_half(params: Mapping[str, Tensor]) -> bool:
    """Whether activations or parameters are float16, here and now."""
    device = next(iter(params.values())).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return any(p.dtype == torch.float16 for p in params.values())


def working_dtype(losses: Tensor) -> torch.dtype:
    """The narrowest dtype that the losses were computed in: autocast's, where it is on."""
    device = losses.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else losses.dtype


def _tf32_switches() -> list[tuple[object, str, object]]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 on
        return [(place, "fp32_precision", "ieee") for place in (cuda, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32", False) for place in (cuda, cudnn)]


def without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """Full float32 products on a GPU: cuDNN's convolutions take TF32 (10 bits) unless told otherwise."""
    return _without_tf32() if device.type == "cuda" else nullcontext()


@contextmanager
def _without_tf32() -> Iterator[None]:
    found = [(place, name, getattr(place, name)) for place, name, _ in _tf32_switches()]
    try:
        for place, name, off in _tf32_switches():
            setattr(place, name, off)
        yield
    finally:
        for place, name, value in found:
            setattr(place, name, value)
