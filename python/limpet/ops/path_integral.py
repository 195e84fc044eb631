"""Path integral family: Synaptic Intelligence's running importance, over all tensors of a model in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _core, _launch, reference
from limpet.ops._library import LIBRARY, define, serve_by_triton

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


# --- launch ----------------------------------------------------------------------------------------------------------


def _launch_core(launch: Callable[..., None], lists: Sequence[Sequence[Tensor]], strength: float, *where: int) -> None:
    """Run ``launch`` of the core over flat tensors, then bring what was copied back to where it lies."""
    tensors, copies = _launch.flat(lists, written=2)
    integral, previous, theta, grad, anchor, importance = ([t.data_ptr() for t in ts] for ts in tensors)
    numel = [t.numel() for t in tensors[2]]
    a, b, c = ([_launch.DTYPE_CODES[t.dtype] for t in ts] for ts in (tensors[2], tensors[4], tensors[5]))
    core = _core.PathIntegralLists(integral, previous, theta, grad, anchor, importance, numel, a, b, c)
    launch(core, strength, *where)
    for original, copy in copies:
        original.copy_(copy)


def _update_cpu(*arguments: Any) -> None:
    *lists, strength = arguments
    _launch_core(_core.path_integral, lists, strength, _launch.threads())


def _update_cuda(*arguments: Any) -> None:
    *lists, strength = arguments
    device = lists[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream
    _launch_core(_core.cuda_path_integral, lists, strength, device.index, stream)


LIBRARY.impl("path_integral_update_", _update_cpu, "CPU")
_TRITON = "limpet.triton_kernels.path_integral"
if _core.build_info()["cuda"] and torch.version.cuda is not None:  # on AMD the CUDA key is HIP
    LIBRARY.impl("path_integral_update_", _update_cuda, "CUDA")
    serve_by_triton("path_integral_update_", _TRITON, keys=["XPU"])
else:
    serve_by_triton("path_integral_update_", _TRITON)


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
        ValueError: lengths, shapes or devices differ, ``strength`` is not finite, or what is written shares its memory
            with another tensor, as a ``previous`` that was never cloned does. Nothing has changed then.

    >>> omega, before = torch.zeros(2), torch.tensor([1.0, 3.0])
    >>> path_integral_update_([omega], [before], [torch.tensor([0.5, 3.0])], [torch.tensor([2.0, 4.0])])
    >>> omega, before
    (tensor([1., 0.]), tensor([0.5000, 3.0000]))
    """
    lists = {
        name: _checks.tensor_list(name, value)
        for name, value in (
            ("integrals", integrals),
            ("previous", previous),
            ("params", params),
            ("grads", grads),
            ("anchors", anchors),
            ("importances", importances),
        )
    }
    penalty = ("anchors", "importances") if lists["anchors"] or lists["importances"] else ()
    kinds = _kinds(lists["params"])
    wide = [(shape, device, reference.wide(dtype)) for shape, device, dtype in kinds]
    for name in ("integrals", "previous", "grads", *penalty):
        # Whole lists are compared first: this runs after every step, and the loop takes half as long again.
        if _kinds(lists[name]) != (wide if name == "integrals" else kinds):
            _checks.like_params(name, lists[name], lists["params"])
    if any(device != kinds[0][1] for _, device, _ in kinds):
        raise ValueError(f"params must be on one device, got {sorted({str(p.device) for p in lists['params']})}")
    strength = _checks.finite_number("strength", strength)
    if not torch.compiler.is_compiling():  # there are no addresses then
        _own_memory(lists)
    if params:
        _update(*lists.values(), strength)


def _kinds(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.device, torch.dtype]]:
    return [(t.shape, t.device, t.dtype) for t in tensors]


def _own_memory(lists: dict[str, list[Tensor]]) -> None:
    """Refuse what is written where another tensor lies: a ``previous`` that is the parameter itself never differs."""
    plain = (Tensor, torch.nn.Parameter)  # of fake and other wrapped tensors no address is to be had
    owners: dict[int, str] = {}
    for name in ("params", "grads", "anchors", "importances"):
        owners |= dict.fromkeys([t.data_ptr() for t in lists[name] if type(t) in plain], name)
    for name in ("integrals", "previous"):
        for k, tensor in enumerate(lists[name]):
            if type(tensor) not in plain or tensor.is_meta or tensor.numel() == 0:
                continue
            address = tensor.data_ptr()
            if address in owners:
                raise ValueError(f"{name}[{k}] must have memory of its own, got that of a tensor in {owners[address]}")
            owners[address] = name
