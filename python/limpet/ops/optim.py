"""Optimizer family: a step of AdamW or SGD with a quadratic penalty and path integrals, over all tensors in one call.

Parameter, gradient, moments, anchor, importance and integral are each read and written once; the gradient itself does
not change. Lists are whole or empty: all parameters of a call have an anchor or none has, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _core, reference
from limpet.ops._library import LIBRARY, define
from limpet.ops._optim_launch import Lists, step_cpu, step_cuda

# --- schemas, reference backend, fakes -------------------------------------------------------------------------------


def _fake(*args: Any) -> None:
    return None


_PENALTY = "Tensor(z!)[] integrals, Tensor[] anchors, Tensor[] importances, float strength, Tensor lr"
_SCALER = "float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf"
define(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, "
    f"{_PENALTY}, float beta1, float beta2, float eps, {_SCALER}) -> ()",
    default=reference.adamw_step_,
    fake=_fake,
)
define(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    f"{_PENALTY}, float momentum, float dampening, bool nesterov, bool first_step, {_SCALER}) -> ()",
    default=reference.sgd_step_,
    fake=_fake,
)

_adamw = torch.ops.limpet.adamw_step_.default
_sgd = torch.ops.limpet.sgd_step_.default


# --- kernels ---------------------------------------------------------------------------------------------------------


def _kernels(step: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Both ops with the arguments of their schemas, on the device of ``step``."""

    def adamw(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        integrals: Sequence[Tensor],
        anchors: Sequence[Tensor],
        importances: Sequence[Tensor],
        strength: float,
        lr: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        lists = Lists(params, grads, moments, anchors, importances, integrals, steps)
        shared = (weight_decay, -1.0 if maximize else 1.0, strength)
        step("adamw_step", lists, (beta1, beta2, eps), shared, lr, grad_scale, found_inf)

    def sgd(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        integrals: Sequence[Tensor],
        anchors: Sequence[Tensor],
        importances: Sequence[Tensor],
        strength: float,
        lr: Tensor,
        momentum: float,
        dampening: float,
        nesterov: bool,
        first_step: bool,
        weight_decay: float,
        maximize: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        lists = Lists(params, grads, (momentum_buffers, (), ()), anchors, importances, integrals)
        shared = (weight_decay, -1.0 if maximize else 1.0, strength)
        step("sgd_step", lists, (momentum, dampening, nesterov, first_step), shared, lr, grad_scale, found_inf)

    return adamw, sgd


_devices = {"CPU": step_cpu}
if _core.build_info()["cuda"] and torch.version.cuda is not None:  # on AMD the CUDA key is HIP: the reference serves
    _devices["CUDA"] = step_cuda
for _key, _step in _devices.items():
    for _name, _kernel in zip(("adamw_step_", "sgd_step_"), _kernels(_step), strict=True):
        LIBRARY.impl(_name, _kernel, _key)


# --- validation ------------------------------------------------------------------------------------------------------


def _validate(params: Any, optional: Sequence[str] = (), **lists: Any) -> None:
    """Require lists of tensors like ``params``, or, where ``optional``, none at all."""
    params = _checks.tensor_list("params", params)
    if any(p.device != params[0].device for p in params):
        raise ValueError(f"params must be on one device, got {sorted({str(p.device) for p in params})}")
    for name, value in lists.items():
        tensors = _checks.tensor_list(name, value)
        if tensors or name not in optional:
            _checks.like_params(name, tensors, params)


def _validate_steps(steps: Any, params: Sequence[Tensor]) -> None:
    if len(_checks.tensor_list("steps", steps)) != len(params):
        raise ValueError(f"steps must have as many tensors as params ({len(params)}), got {len(steps)}")
    for k, (step, param) in enumerate(zip(steps, params, strict=True)):
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != param.device:
            raise ValueError(
                f"steps[{k}] must be one float32 on {param.device} as params[{k}] is, got {_checks.describe(step)}"
            )


def _scalar(name: str, value: Any) -> Tensor:  # []
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got {_checks.describe(value)}")
        return value.reshape(())
    return torch.tensor(_checks.finite_number(name, value), dtype=torch.float64)


def _optional_scalar(name: str, value: Tensor | None) -> Tensor | None:  # []
    return None if value is None else _scalar(name, _checks.tensor(name, value))


# --- public functions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    exp_avgs: Sequence[Tensor],  # [*] each
    exp_avg_sqs: Sequence[Tensor],  # [*] each
    steps: Sequence[Tensor],  # [] each
    *,
    lr: float | Tensor,  # []
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    max_exp_avg_sqs: Sequence[Tensor] = (),  # [*] each
    anchors: Sequence[Tensor] = (),  # [*] each
    importances: Sequence[Tensor] = (),  # [*] each
    strength: float = 0.0,
    integrals: Sequence[Tensor] = (),  # [*] each
    grad_scale: Tensor | None = None,  # []
    found_inf: Tensor | None = None,  # []
) -> None:
    r"""One step of AdamW (Loshchilov and Hutter 2019) on the task's loss and a quadratic penalty, in one pass.

    With the gradient ``g`` of the task's loss (``grads / grad_scale``, and minus that to ``maximize``) the moments and
    the update follow :math:`g + s F (\theta - \text{anchor})`, with ``s`` the strength, in the order of operations of
    torch's fused AdamW; path integrals follow the task alone (Zenke et al. 2017, eq. 3):

    .. math:: \omega \mathrel{-}= g \, (\theta_\text{after} - \theta_\text{before})

    What did not move adds nothing, whatever its gradient is. The gradients themselves do not change.

    Args:
        params: tensors on one device, float32, float64, bfloat16 or float16; narrow ones are computed in float32.
        grads: like the parameters.
        exp_avgs: running means of the gradients, like the parameters.
        exp_avg_sqs: running means of their squares, like the parameters.
        steps: steps taken, one float32 each on the parameters' device; raised by one.
        lr: learning rate, a number or a tensor of one element.
        beta1: decay of the first running mean.
        beta2: decay of the second.
        eps: added to the denominator.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay`` beside the gradient's step.
        maximize: whether the gradients are those of something to be maximized. The penalty still pulls to the anchor.
        max_exp_avg_sqs: the largest ``exp_avg_sqs`` so far, for AMSGrad; or nothing.
        anchors: of a penalty ``strength / 2 * sum F (theta - anchor)^2``, or nothing; float32, bfloat16 or float16
            (float64 with float64 parameters).
        importances: ``F``, as many, the same choice of dtypes.
        strength: the penalty's factor; finite.
        integrals: omega, added to, or nothing; float32 (float64 for float64 parameters).
        grad_scale: what the gradients are too large by, one element; a gradient scaler's.
        found_inf: where it is not zero, nothing happens; one element.

    Raises:
        TypeError: an argument is no list of floating tensors, or a dtype is another one.
        ValueError: lengths, shapes or devices differ, or a number is not finite. Nothing has changed then.

    >>> theta, mean, square, step = torch.tensor([1.0, 3.0]), torch.zeros(2), torch.zeros(2), torch.zeros(())
    >>> omega = torch.zeros(2)
    >>> adamw_step_([theta], [torch.tensor([2.0, 0.0])], [mean], [square], [step], lr=0.5, integrals=[omega],
    ...             weight_decay=0.0)
    >>> theta, omega
    (tensor([0.5000, 3.0000]), tensor([1., 0.]))
    """
    _validate(params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _validate(
        params,
        ("max_exp_avg_sqs", "integrals", *(() if anchors or importances else ("anchors", "importances"))),
        max_exp_avg_sqs=max_exp_avg_sqs,
        anchors=anchors,
        integrals=integrals,
        importances=importances,
    )
    _validate_steps(steps, params)
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    settings = [_checks.finite_number(name, value) for name, value in numbers.items()]
    scalars = _optional_scalar("grad_scale", grad_scale), _optional_scalar("found_inf", found_inf)
    strength = _checks.finite_number("strength", strength)
    rate = _scalar("lr", lr)
    if params:
        _adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            integrals,
            anchors,
            importances,
            strength,
            rate,
            *settings,
            bool(maximize),
            *scalars,
        )


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    momentum_buffers: Sequence[Tensor] = (),  # [*] each
    *,
    lr: float | Tensor,  # []
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    anchors: Sequence[Tensor] = (),  # [*] each
    importances: Sequence[Tensor] = (),  # [*] each
    strength: float = 0.0,
    integrals: Sequence[Tensor] = (),  # [*] each
    grad_scale: Tensor | None = None,  # []
    found_inf: Tensor | None = None,  # []
) -> None:
    r"""One step of SGD, with momentum where there are buffers for it, on the task's loss and a quadratic penalty.

    The gradient, the penalty and the path integrals are those of :func:`adamw_step_`; weight decay is part of the
    gradient that momentum follows, as in torch, and no part of the path integral's.

    Args:
        params: as in :func:`adamw_step_`.
        grads: like the parameters.
        momentum_buffers: like the parameters; or nothing, for SGD without momentum.
        lr: learning rate, a number or a tensor of one element.
        momentum: the buffers' decay.
        dampening: how much less than all of the gradient enters the buffers.
        nesterov: whether the step looks ahead.
        first_step: whether the buffers start as the gradient; what they hold is not used then.
        weight_decay: ``weight_decay * theta`` is added to the gradient.
        maximize: as in :func:`adamw_step_`; so are the others below.
        anchors: of the penalty, or nothing.
        importances: of the penalty, or nothing.
        strength: of the penalty.
        integrals: omega, or nothing.
        grad_scale: of a gradient scaler.
        found_inf: of a gradient scaler.

    Raises:
        TypeError: as :func:`adamw_step_`.
        ValueError: as :func:`adamw_step_`.

    >>> theta, anchor = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    >>> sgd_step_([theta], [torch.tensor([2.0, 0.0])], lr=0.25, anchors=[anchor], importances=[torch.ones(2)],
    ...           strength=1.0)
    >>> theta
    tensor([0.5000, 2.5000])
    """
    _validate(params, grads=grads)
    _validate(
        params,
        ("momentum_buffers", "integrals", *(() if anchors or importances else ("anchors", "importances"))),
        momentum_buffers=momentum_buffers,
        anchors=anchors,
        integrals=integrals,
        importances=importances,
    )
    numbers = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "strength": strength}
    values = {name: _checks.finite_number(name, value) for name, value in numbers.items()}
    scalars = _optional_scalar("grad_scale", grad_scale), _optional_scalar("found_inf", found_inf)
    rate = _scalar("lr", lr)
    if params:
        _sgd(
            params,
            grads,
            momentum_buffers,
            integrals,
            anchors,
            importances,
            values["strength"],
            rate,
            values["momentum"],
            values["dampening"],
            bool(nesterov),
            bool(first_step),
            values["weight_decay"],
            bool(maximize),
            *scalars,
        )
