"""Steps of optimizers with penalty and path integral."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide


def adamw_step_(
    params: Sequence[Tensor],  # [*] each, changed in place
    grads: Sequence[Tensor],  # [*] each
    exp_avgs: Sequence[Tensor],  # [*] each, changed in place
    exp_avg_sqs: Sequence[Tensor],  # [*] each, changed in place
    max_exp_avg_sqs: Sequence[Tensor],  # [*] each, changed in place; or none at all: AMSGrad
    steps: Sequence[Tensor],  # [] each, raised by 1
    integrals: Sequence[Tensor],  # [*] each, added to in place; or none at all
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    lr: Tensor,  # []
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
    found_inf: Tensor | None,  # []
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on the task's loss and a quadratic penalty, as torch counts it."""
    if found_inf is not None and found_inf.item():
        return
    for k, theta in enumerate(params):
        before, task_grad, grad = _grads(k, theta, grads, anchors, importances, strength, maximize, grad_scale)
        steps[k].add_(1)
        t = steps[k].double()
        first = exp_avgs[k].to(before.dtype).lerp(grad, 1 - beta1)
        second = exp_avg_sqs[k].to(before.dtype) * beta2 + (1 - beta2) * grad * grad
        largest = second
        if max_exp_avg_sqs:
            largest = torch.maximum(max_exp_avg_sqs[k].to(before.dtype), second)
            max_exp_avg_sqs[k].copy_(largest)
        exp_avgs[k].copy_(first)
        exp_avg_sqs[k].copy_(second)
        denominator = largest.sqrt() / (1 - beta2**t).sqrt() + eps
        theta.copy_(before * (1 - lr * weight_decay) - lr / (1 - beta1**t) * first / denominator)
        if integrals:
            _add_path(integrals[k], task_grad, before, theta)


def sgd_step_(
    params: Sequence[Tensor],  # [*] each, changed in place
    grads: Sequence[Tensor],  # [*] each
    momentum_buffers: Sequence[Tensor],  # [*] each, changed in place; or none at all
    integrals: Sequence[Tensor],  # [*] each, added to in place; or none at all
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    lr: Tensor,  # []
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
    found_inf: Tensor | None,  # []
) -> None:
    """One step of SGD on the task's loss and a quadratic penalty, as torch counts it.

    On the ``first_step`` the momentum becomes the gradient, whatever its buffer held.
    """
    if found_inf is not None and found_inf.item():
        return
    for k, theta in enumerate(params):
        before, task_grad, grad = _grads(k, theta, grads, anchors, importances, strength, maximize, grad_scale)
        grad = grad + weight_decay * before
        if momentum_buffers:
            buffer = momentum_buffers[k].to(before.dtype)
            buffer = grad if first_step else momentum * buffer + (1 - dampening) * grad
            momentum_buffers[k].copy_(buffer)
            grad = grad + momentum * buffer if nesterov else buffer
        theta.copy_(before - lr * grad)
        if integrals:
            _add_path(integrals[k], task_grad, before, theta)


def _grads(
    k: int,
    theta: Tensor,  # [*]
    grads: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [*] each
    """The parameter before the step, the gradient of the task's loss, and that of the loss with the penalty.

    What is maximized is minus a loss: its gradient changes sign, and the penalty still pulls to the anchor.
    """
    before = theta.to(wide(theta.dtype), copy=True)
    task_grad = grads[k].to(before.dtype)
    if grad_scale is not None:
        task_grad = task_grad / grad_scale
    if maximize:
        task_grad = -task_grad
    if not anchors:
        return before, task_grad, task_grad
    pull = strength * importances[k].to(before.dtype) * (before - anchors[k].to(before.dtype))
    return before, task_grad, task_grad + pull


def _add_path(integral: Tensor, task_grad: Tensor, before: Tensor, theta: Tensor) -> None:  # [*] each
    moved = theta.to(before.dtype) - before
    integral.sub_(torch.where(moved == 0, 0.0, task_grad * moved))
