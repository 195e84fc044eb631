"""From the tensors of an optimizer step to the compiled kernels, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _core, _launch


class Lists:
    """The tensors as the kernels take them; what lies in memory differently is brought into one order first."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],  # first, second, largest
        anchors: Sequence[Tensor],
        importances: Sequence[Tensor],
        integrals: Sequence[Tensor],
        steps: Sequence[Tensor] = (),
    ) -> None:
        lists = (params, *moments, integrals, grads, anchors, importances)
        self._alive, self._copies = _launch.flat(lists, written=5)
        codes = _launch.DTYPE_CODES
        theta, first, second, largest, integral, grad, anchor, importance, step = (
            [t.data_ptr() for t in tensors] for tensors in (*self._alive, steps)
        )
        numel = [t.numel() for t in params]
        a, b, c = ([codes[t.dtype] for t in tensors] for tensors in (params, anchors, importances))
        self.core = _core.OptimLists(
            theta, grad, first, second, largest, anchor, importance, integral, step, numel, a, b, c
        )
        self.device = params[0].device

    def finish(self) -> None:
        """Bring what was copied and has changed back to where it lies."""
        for tensor, packed in self._copies:
            tensor.copy_(packed)


def step_cpu(name: str, lists: Lists, own: Sequence[Any], shared: tuple[float, float, float], *scalars: Any) -> None:
    """One step, now; nothing where ``found_inf`` is not zero."""
    lr, grad_scale, found_inf = scalars
    weight_decay, sign, strength = shared
    if found_inf is not None and found_inf.item():
        return
    factor = sign if grad_scale is None else sign / float(grad_scale)
    getattr(_core, name)(lists.core, (float(lr), weight_decay, factor, strength), *own, _launch.threads())
    lists.finish()


def step_cuda(name: str, lists: Lists, own: Sequence[Any], shared: tuple[float, float, float], *scalars: Any) -> None:
    """Launch only: what the device alone knows is passed by its address, or 0."""
    lr, *scaler = scalars
    device = lists.device
    rate = 0.0 if lr.is_cuda else float(lr)
    lr = lr.double() if lr.is_cuda else None
    on_device = [lr, *(None if t is None else t.to(device, torch.float32) for t in scaler)]
    addresses = [0 if t is None else t.data_ptr() for t in on_device]
    stream = torch.cuda.current_stream(device).cuda_stream
    weight_decay, sign, strength = shared
    launch = getattr(_core, f"cuda_{name}")
    launch(lists.core, (rate, weight_decay, sign, strength), *own, addresses, device.index, stream)
    lists.finish()
