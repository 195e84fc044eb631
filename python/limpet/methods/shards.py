"""Parameters that are sharded over processes: DTensors, as ``torch.distributed.fsdp.fully_shard`` makes them.

A regularizer holds DTensors beside them, sharded alike, so whatever goes element by element is written as for whole
tensors. Kernels run on each process's own shards, and the values that they give are summed over the processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; told without its type, whose import takes long."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def check(params: Mapping[str, Any]) -> None:
    """Refuse parameters that are replicated, or that not all processes of one mesh hold parts of."""
    for name, param in params.items():
        placements = getattr(param, "placements", ())
        if is_sharded(param) and not all(placement.is_shard() for placement in placements):
            raise TypeError(f"parameter {name!r} must be sharded along every dimension of its mesh, got {placements}")
    meshes = {getattr(param, "device_mesh", None) for param in params.values()}
    if len(meshes) > 1:
        raise TypeError(
            f"parameters must all be sharded over one mesh, or none of them, got {sorted(map(str, meshes))}"
        )


def require_whole(params: Mapping[str, Tensor]) -> None:
    """Refuse sharded parameters, where each process must have whole ones."""
    for name, param in params.items():
        if is_sharded(param):
            raise TypeError(
                f"parameter {name!r} must not be sharded over processes here: do this with the whole model, "
                "and load the state into the sharded one"
            )


def local(tensor: Any) -> Tensor:  # [*] -> [*], this process's part of it
    """A DTensor's shard, differentiable; any other tensor as it is."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


def like(tensor: Tensor, param: Any) -> Tensor:  # [*], [*] -> [*]
    """A tensor that every process has whole, sharded as a parameter is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements)


def total(value: Tensor, params: Iterable[Any]) -> Tensor:  # [] -> []
    """The sum of what the processes that share ``params`` computed of their shards; all of them must call it.

    Differentiable: each process's gradient is that of the sum with respect to its own shards.
    """
    mesh = next((param.device_mesh for param in params if is_sharded(param)), None)
    if mesh is None:
        return value
    result: Tensor = _Total.apply(value, mesh)
    return result


class LocalGrad:
    """A leaf in a parameter's place for what adds to ``.grad``: its shard, whose gradient is the parameter's shard."""

    def __init__(self, param: Any) -> None:
        self._param = param
        self.leaf = param.to_local().detach().requires_grad_()
        if param.grad is not None:
            self.leaf.grad = param.grad.to_local()

    def write_back(self) -> None:
        """Give the parameter a gradient, where it had none."""
        from torch.distributed.tensor import DTensor

        param = self._param
        if param.grad is None and self.leaf.grad is not None:
            param.grad = DTensor.from_local(
                self.leaf.grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Any) -> Tensor:  # [] -> []
        value = value.clone()
        for dim in range(mesh.ndim):
            distributed.all_reduce(value, group=mesh.get_group(dim))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
