"""Quadratic family: the penalty of EWC and its relatives, over all tensors of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _core, _launch, reference
from limpet.ops._library import LIBRARY, define
from limpet.ops.narrow import PACKED_ANCHORS, PACKED_IMPORTANCES, packed_size

# --- schemas, reference backend, fakes -------------------------------------------------------------------------------


def _value_fake(params: Sequence[Tensor], *args: Any) -> Tensor:
    return params[0].new_empty((), dtype=reference.wide(params[0].dtype))


def _grad_fake(params: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return [torch.empty_like(p) for p in params]


_LISTS = "Tensor[] anchors, Tensor[] importances, float strength"
define(
    f"quadratic_penalty(Tensor[] params, {_LISTS}) -> Tensor",
    default=reference.quadratic_penalty,
    fake=_value_fake,
)
define(
    f"quadratic_penalty_grad(Tensor[] params, {_LISTS}, Tensor scale) -> Tensor[]",
    default=reference.quadratic_penalty_grad,
    fake=_grad_fake,
)
define(
    f"add_quadratic_penalty_grad_(Tensor[] params, Tensor(a!)[] grads, {_LISTS}) -> Tensor",
    default=reference.add_quadratic_penalty_grad_,
    fake=_value_fake,
)

_value = torch.ops.limpet.quadratic_penalty.default
_grad = torch.ops.limpet.quadratic_penalty_grad.default
_add_grad = torch.ops.limpet.add_quadratic_penalty_grad_.default


# --- launch ----------------------------------------------------------------------------------------------------------

# csrc/quadratic_tensor.h, QuadraticGrad and Storage
_NONE, _ADD, _WRITE = 0, 1, 2
_STORAGE_CODES = {"log8": 4, "fixed16": 5, "split24": 6}
_IMPORTANCE_CODES = {**_launch.DTYPE_CODES, **{d: _STORAGE_CODES[name] for d, name in PACKED_IMPORTANCES.items()}}
_ANCHOR_CODES = {**_launch.DTYPE_CODES, **{d: _STORAGE_CODES[name] for d, name in PACKED_ANCHORS.items()}}


class _Lists:
    """The tensors as the kernels take them; what lies in memory differently is brought into one order first."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        anchors: Sequence[Tensor],
        importances: Sequence[Tensor],
    ) -> None:
        lists, self._copies = _launch.flat((grads, params, anchors, importances), written=1)
        for tensors in lists[2:]:  # the packed formats hold two bytes at once
            for k, tensor in enumerate(tensors):
                if tensor.dtype == torch.uint8 and tensor.data_ptr() % 2:
                    tensors[k] = tensor.clone()
        grad, theta, anchor, importance = ([t.data_ptr() for t in tensors] for tensors in lists)
        numel = [t.numel() for t in params]
        dtypes = [_launch.DTYPE_CODES[t.dtype] for t in params]
        stored_anchors = [_ANCHOR_CODES[t.dtype] for t in anchors]
        stored_importances = [_IMPORTANCE_CODES[t.dtype] for t in importances]
        self.core = _core.QuadraticLists(
            theta, grad, anchor, importance, numel, dtypes, stored_anchors, stored_importances
        )
        self._alive = lists

    def finish(self) -> None:
        """Bring gradients that were copied back to where they lie."""
        for grad, packed in self._copies:
            grad.copy_(packed)


# --- CPU -------------------------------------------------------------------------------------------------------------


def _pass_cpu(lists: _Lists, mode: int, factor: float) -> float:
    value = _core.quadratic(lists.core, mode, factor, _launch.threads())
    lists.finish()
    return value


def _scalar(value: float, params: Sequence[Tensor]) -> Tensor:  # []
    return torch.tensor(value, dtype=reference.wide(params[0].dtype))


def _value_cpu(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], strength: float
) -> Tensor:
    lists = _Lists(params, [], anchors, importances)
    return _scalar(0.5 * strength * _pass_cpu(lists, _NONE, 0.0), params)


def _grad_cpu(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], strength: float, scale: Tensor
) -> list[Tensor]:
    grads = [torch.empty_like(p) for p in params]
    _pass_cpu(_Lists(params, grads, anchors, importances), _WRITE, strength * float(scale))
    return grads


def _add_grad_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor],
    strength: float,
) -> Tensor:
    lists = _Lists(params, grads, anchors, importances)
    return _scalar(0.5 * strength * _pass_cpu(lists, _ADD, strength), params)


LIBRARY.impl("quadratic_penalty", _value_cpu, "CPU")
LIBRARY.impl("quadratic_penalty_grad", _grad_cpu, "CPU")
LIBRARY.impl("add_quadratic_penalty_grad_", _add_grad_cpu, "CPU")


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _pass_cuda(lists: _Lists, mode: int, strength: float, scalar: Tensor) -> None:
    device = scalar.device
    workspace = _launch.workspace(0 if mode == _WRITE else _core.cuda_quadratic_workspace(lists.core), device)
    stream = torch.cuda.current_stream(device).cuda_stream
    code = _launch.DTYPE_CODES[scalar.dtype]
    _core.cuda_quadratic(
        lists.core, mode, strength, scalar.data_ptr(), code, workspace.data_ptr(), device.index, stream
    )
    lists.finish()


def _value_cuda(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], strength: float
) -> Tensor:
    value = _value_fake(params)
    _pass_cuda(_Lists(params, [], anchors, importances), _NONE, strength, value)
    return value


def _grad_cuda(
    params: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor], strength: float, scale: Tensor
) -> list[Tensor]:
    grads = _grad_fake(params)
    _pass_cuda(_Lists(params, grads, anchors, importances), _WRITE, strength, scale.to(params[0].device))
    return grads


def _add_grad_cuda(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importances: Sequence[Tensor],
    strength: float,
) -> Tensor:
    value = _value_fake(params)
    _pass_cuda(_Lists(params, grads, anchors, importances), _ADD, strength, value)
    return value


if _core.build_info()["cuda"] and torch.version.cuda is not None:  # on AMD the CUDA key is HIP: the reference serves
    LIBRARY.impl("quadratic_penalty", _value_cuda, "CUDA")
    LIBRARY.impl("quadratic_penalty_grad", _grad_cuda, "CUDA")
    LIBRARY.impl("add_quadratic_penalty_grad_", _add_grad_cuda, "CUDA")


# --- autograd --------------------------------------------------------------------------------------------------------


class _QuadraticPenalty(torch.autograd.Function):
    """The penalty as a function of the parameters; the gradient is computed from them again, not kept in memory.

    There is no ``jvp`` (forward mode): torch.compile refuses a function that has one.
    """

    @staticmethod
    def forward(strength: float, count: int, *tensors: Tensor) -> Tensor:
        return _value(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], strength)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.strength, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        count, tensors = ctx.count, ctx.saved_tensors
        wanted = [k for k in range(count) if ctx.needs_input_grad[2 + k]]
        params, anchors, importances = ([tensors[k + i * count] for k in wanted] for i in range(3))
        # A graph of the gradient itself was asked for: the reference is plain torch, and differentiable again.
        gradient = reference.quadratic_penalty_grad if torch.is_grad_enabled() else _grad
        result: list[Tensor | None] = [None] * (2 + 3 * count)
        for k, grad in zip(wanted, gradient(params, anchors, importances, ctx.strength, scale), strict=True):
            result[2 + k] = grad
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], strength: float, count: int, *tensors: Tensor) -> tuple[Tensor, int]:
        def value(*tensors: Tensor) -> Tensor:
            return reference.quadratic_penalty(
                tensors[:count], tensors[count : 2 * count], tensors[2 * count :], strength
            )

        return torch.vmap(value, in_dims=in_dims[2:])(*tensors), 0


# --- validation ------------------------------------------------------------------------------------------------------


def _stored_list(name: str, value: Any, formats: dict[torch.dtype, str]) -> list[Tensor]:
    """Require a list or tuple of tensors that are floating or packed in one of the formats."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {_checks.describe(value)}")
    return [
        t if isinstance(t, Tensor) and t.dtype in formats else _checks.float_tensor(f"{name}[{k}]", t)
        for k, t in enumerate(value)
    ]


def _validate_stored(
    name: str, stored: Tensor, param_name: str, param: Tensor, formats: dict[torch.dtype, str]
) -> None:
    """Require that an anchor or an importance belongs to its parameter, as it is or packed."""
    packed = formats.get(stored.dtype)
    shape = list(param.shape) if packed is None else [packed_size(packed, param.numel())]
    if list(stored.shape) != shape or stored.device != param.device:
        what = f"as {param_name} is" if packed is None else f"to be {param_name} packed as {packed}"
        raise ValueError(f"{name} must be of shape {shape} on {param.device} {what}, got {_checks.describe(stored)}")
    if (stored.dtype == torch.float64) != (param.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 exactly where {param_name} is ({param.dtype}), got {stored.dtype}")


def _validate(params: Any, anchors: Any, importances: Any, strength: Any) -> float:
    lists = [
        _checks.tensor_list("params", params),
        _stored_list("anchors", anchors, PACKED_ANCHORS),
        _stored_list("importances", importances, PACKED_IMPORTANCES),
    ]
    for name, other, formats in (
        ("anchors", lists[1], PACKED_ANCHORS),
        ("importances", lists[2], PACKED_IMPORTANCES),
    ):
        if len(other) != len(lists[0]):
            raise ValueError(f"{name} must have as many tensors as params ({len(lists[0])}), got {len(other)}")
        for k, (param, tensor) in enumerate(zip(lists[0], other, strict=True)):
            _validate_stored(f"{name}[{k}]", tensor, f"params[{k}]", param, formats)
    if any(p.device != lists[0][0].device for p in lists[0]):
        raise ValueError(f"params must be on one device, got {sorted({str(p.device) for p in lists[0]})}")
    return _checks.finite_number("strength", strength)


# --- public functions ------------------------------------------------------------------------------------------------


def quadratic_penalty(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """The penalty ``strength / 2 * sum_i F_i (theta_i - anchor_i)^2`` (Kirkpatrick et al. 2017, eq. 3).

    Differentiable in ``params`` (twice); the gradient is computed in backward, and no intermediate is kept.

    Args:
        params: tensors on one device, float32, bfloat16, float16 or float64.
        anchors: the same shapes; float32, bfloat16 or float16, whatever the parameter is (float64 with float64). Or
            what :func:`pack_anchor` made of them, for any parameter but a float64 one.
        importances: the same shapes; the same choice of dtypes. Or what :func:`pack_importance` made of them.
        strength: a finite number, lambda.

    Returns:
        A 0-d float32 tensor (float64 for float64 parameters), summed in float64.

    Raises:
        TypeError: an argument is no list of floating tensors, or float64 is mixed with narrower.
        ValueError: lengths, shapes or devices differ, or ``strength`` is not finite.

    >>> theta = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> value = quadratic_penalty([theta], [torch.zeros(2)], [torch.tensor([2.0, 1.0])], strength=10.0)
    >>> value.backward()
    >>> value.item(), theta.grad
    (55.0, tensor([20., 30.]))
    """
    strength = _validate(params, anchors, importances, strength)
    if not params:
        return torch.zeros(())
    value: Tensor = _QuadraticPenalty.apply(strength, len(params), *params, *anchors, *importances)
    return value


@torch.no_grad()
def add_quadratic_penalty_grad_(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """Add the gradient of :func:`quadratic_penalty` straight into each ``param.grad``; return the penalty.

    One pass: parameter, anchor and importance are read, the gradient is read and written, nothing is allocated
    (20 bytes per float32 parameter; 15 with importances in 8 bits and anchors in 16). A ``.grad`` that is ``None``
    becomes zeros first. The value carries no graph.

    Args:
        params: leaves whose ``.grad`` is added to; otherwise as in :func:`quadratic_penalty`.
        anchors: as in :func:`quadratic_penalty`.
        importances: as in :func:`quadratic_penalty`.
        strength: a finite number, lambda.

    Returns:
        A 0-d float32 tensor (float64 for float64 parameters).

    Raises:
        TypeError: as :func:`quadratic_penalty`, or a ``.grad`` is not dense or not of its parameter's dtype.
        ValueError: as :func:`quadratic_penalty`, or a parameter is no leaf.

    >>> theta = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> value = add_quadratic_penalty_grad_([theta], [torch.zeros(2)], [torch.tensor([2.0, 1.0])], strength=10.0)
    >>> value.item(), theta.grad
    (55.0, tensor([20., 30.]))
    """
    strength = _validate(params, anchors, importances, strength)
    if not params:
        return torch.zeros(())
    for k, param in enumerate(params):
        if not param.is_leaf:
            raise ValueError(f"params[{k}] must be a leaf, whose .grad is kept, got one computed by {param.grad_fn}")
        if param.grad is not None and _checks.float_tensor(f"params[{k}].grad", param.grad).dtype != param.dtype:
            raise TypeError(f"params[{k}].grad must have its parameter's dtype {param.dtype}, got {param.grad.dtype}")
    grads = []
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grads.append(param.grad)
    value: Tensor = _add_grad(params, grads, anchors, importances, strength)
    return value
