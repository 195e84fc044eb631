"""Parameters that are sharded over processes: DTensors, as ``torch.distributed.fsdp.fully_shard`` makes them.

Anchors, importances and path integrals of a sharded parameter are DTensors placed as it is, so that each process holds
those of its own part. Kernels run on the parts; nothing but a penalty's value has to be summed over them. DTensor's
types take long to import, hence nothing here does so before there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from limpet import _checks, ops

_WHOLE = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether this is a DTensor: sharded, or replicated, over a mesh of processes."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:  # [*] -> [*], or the part of it
    """This process's part, in the same memory and without a graph; a whole tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def version(tensor: Tensor) -> int:
    """How often it was written to: a DTensor counts what is written to the whole, its part what is written there."""
    return tensor._version + local(tensor)._version if is_sharded(tensor) else tensor._version


def reduced(tensor: Tensor) -> Tensor:  # [] -> []
    """What a reduction gave, over all parts: read as it came, a DTensor's value is that of this process's part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def check(params: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> None:
    """Refuse parameters that anchors and importances cannot lie beside.

    Raises:
        TypeError: a parameter is placed otherwise than by Shard and Replicate: a sum that is pending, say.
        RuntimeError: a parameter that was sharded is whole, or a sharded one was resized.
    """
    for name, param in params.items():
        anchor = anchors.get(name)
        if not is_sharded(param):
            if anchor is not None and is_sharded(anchor):
                raise RuntimeError(
                    f"parameter {name!r} is whole at present, but was sharded when it was anchored: fully_shard leaves "
                    "some parameters whole after a forward pass; call model.reshard() before this"
                )
            continue
        if not _plainly_placed(param):
            raise TypeError(f"parameter {name!r} must be placed by Shard or Replicate, got {param.placements}")
        if anchor is not None and anchor.shape != param.shape:
            raise RuntimeError(
                f"parameter {name!r} is sharded over processes and cannot grow or shrink: it was anchored with shape "
                f"{list(anchor.shape)}, but has shape {list(param.shape)}"
            )


def require_whole(params: Mapping[str, Tensor]) -> None:
    """Refuse sharded parameters where a pass of samples one by one is to be made.

    Raises:
        TypeError: a parameter is sharded.
    """
    for name, param in params.items():
        if is_sharded(param):
            raise TypeError(
                f"parameter {name!r} must not be sharded over processes while importances are measured: consolidate() "
                "with a whole copy of the model, and load that state into the regularizer of the sharded one"
            )


def check_grad(name: str, param: Tensor) -> None:
    """Require that a sharded parameter's gradient, if there is one, is sharded as it is.

    Raises:
        TypeError: it is not.
    """
    if not is_sharded(param):
        return
    grad = param.grad
    if grad is not None and not (is_sharded(grad) and _placed_alike(grad, param)):
        got = f"placements {grad.placements}" if is_sharded(grad) else _checks.describe(grad)
        raise TypeError(f"the gradient of {name!r} must be placed by {param.placements} as it is, got {got}")


def placed(tensor: Tensor, param: Any, dtype: torch.dtype) -> Tensor:  # [*], [*] -> [*]
    """A tensor, whole in every process or sharded, sharded as its parameter is."""
    if is_sharded(tensor) and _placed_alike(tensor, param) and tensor.dtype == dtype and tensor.device == param.device:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    with torch.inference_mode(False), torch.no_grad():  # it outlives this call
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor.detach()
        parts = distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        return parts.to(param.device, dtype, copy=True)  # else it might keep all of the whole one


def quadratic_penalty(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """As :func:`limpet.ops.quadratic_penalty`, summed over all parts; differentiable in each process's own.

    Every process's loss must hold it, with the same factor.
    """
    if not any(map(is_sharded, params)):
        return ops.quadratic_penalty(params, anchors, importances, strength)
    values = []
    for mesh, dims, where in _alike(params):
        parts = [_differentiable(params[k]) for k in where]
        a, f = ([local(tensors[k]) for k in where] for tensors in (anchors, importances))
        values.append(_sum_over_parts(ops.quadratic_penalty(parts, a, f, strength), mesh, dims))
    return torch.stack(values).sum()


@torch.no_grad()
def add_quadratic_penalty_grad_(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """As :func:`limpet.ops.add_quadratic_penalty_grad_`; each process adds to its own parts."""
    if not any(map(is_sharded, params)):
        return ops.add_quadratic_penalty_grad_(params, anchors, importances, strength)
    values = []
    for mesh, dims, where in _alike(params):
        parts = [_with_grad(params[k]) for k in where]
        a, f = ([local(tensors[k]) for k in where] for tensors in (anchors, importances))
        values.append(_sum_over_parts(ops.add_quadratic_penalty_grad_(parts, a, f, strength), mesh, dims))
    return torch.stack(values).sum()


def extremes(tensor: Tensor) -> tuple[float, float]:  # [*], not empty
    """The least and the greatest value."""
    if not is_sharded(tensor):
        low, high = tensor.aminmax()
        return float(low), float(high)
    part = local(tensor)
    bounds = part.new_tensor([torch.inf, torch.inf])  # a process may have no part
    if part.numel():
        low, high = part.aminmax()
        bounds = torch.stack([low, -high])
    least, less = _all_reduced(bounds, tensor.device_mesh, range(tensor.device_mesh.ndim), "MIN").tolist()
    return least, -less


def _plainly_placed(tensor: Any) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    return all(type(placement) in (Shard, Replicate) for placement in tensor.placements)


def _placed_alike(tensor: Any, param: Any) -> bool:
    return bool(tensor.placements == param.placements and tensor.device_mesh == param.device_mesh)


def _alike(params: Sequence[Tensor]) -> list[tuple[Any, tuple[int, ...], list[int]]]:
    """Meshes, their dimensions over which parameters are sharded, and which parameters those are."""
    found: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for k, param in enumerate(params):
        key: tuple[Any, tuple[int, ...]] = (None, ())
        if is_sharded(param):
            key = (param.device_mesh, tuple(d for d, placement in enumerate(param.placements) if placement.is_shard()))
        found.setdefault(key, []).append(k)
    return [(mesh, dims, where) for (mesh, dims), where in found.items()]


def _differentiable(param: Tensor) -> Tensor:  # [*] -> [*], or the part of it
    return param.to_local() if is_sharded(param) else param


def _with_grad(param: Tensor) -> Tensor:  # [*] -> [*], or the part of it
    """This process's part, with its part of the gradient in ``.grad``; zeros where there was none."""
    if not is_sharded(param):
        return param
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    part = local(param).detach()
    part.grad = local(param.grad)
    return part


class _SumOverParts(torch.autograd.Function):
    """The sum over processes of what each has; every process has the whole sum's gradient already."""

    @staticmethod
    def forward(value: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:  # [] -> []
        return _all_reduced(value, mesh, dims, "SUM")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # []
        return grad, None, None


def _sum_over_parts(value: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:  # [] -> []
    result: Tensor = _SumOverParts.apply(value, mesh, dims) if dims else value
    return result


def _all_reduced(value: Tensor, mesh: Any, dims: Sequence[int], how: str) -> Tensor:  # [*] -> [*]
    """Reduced over dimensions of the mesh, by way of the device that it communicates on."""
    from torch import distributed

    result = value.to(mesh.device_type, copy=True)
    for dim in dims:
        distributed.all_reduce(result, getattr(distributed.ReduceOp, how), group=mesh.get_group(dim))
    return result.to(value.device)
