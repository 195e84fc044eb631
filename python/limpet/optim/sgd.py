"""Stochastic gradient descent with momentum, fused, with regularizers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from limpet import _launch
from limpet.optim.base import Call, FusedOptimizer
from limpet.optim.regularization import Regularizer


class SGD(FusedOptimizer):
    """``torch.optim.SGD``, with the gradients of quadratic penalties and path integrals in the step's own pass.

    Penalties are part of the gradient that momentum follows; path integrals follow the task's gradient alone, without
    weight decay. The loss given to ``backward()`` holds no penalty.

    Args:
        params: parameters, named parameters or groups, as torch takes them; float32, float64, bfloat16 or float16.
        lr: learning rate; a number or a tensor of one element.
        momentum: decay of the momentum buffers; without one there are none.
        dampening: how much less than all of the gradient enters the buffers, after the first step.
        weight_decay: ``weight_decay * theta`` is added to the gradient.
        nesterov: Nesterov momentum.
        maximize: maximize what the gradients are of. Penalties still pull to their anchors.
        foreach: must not be true; there is one implementation.
        differentiable: must be false.
        fused: must not be ``False``.
        regularizers: as for :class:`limpet.optim.AdamW`.

    Raises:
        TypeError: a parameter or a regularizer is none.
        ValueError: a setting is out of range, or a regularizer's model shares no parameter with the optimizer.

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.randn(8, 2)).square().mean().backward()
    >>> optimizer.step()
    """

    _moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        regularizers: Iterable[Regularizer] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, regularizers)

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("nesterov", "maximize"):
                group.setdefault(name, False)
            group.update(foreach=None, differentiable=False, fused=True)

    def _alike(self, param: Tensor, group: dict[str, Any]) -> Hashable:
        """Parameters of which momentum has begun, and those of which it begins now, go apart."""
        return group["momentum"] != 0 and self.state.get(param, {}).get("momentum_buffer") is None

    def _update(
        self, group: dict[str, Any], call: Call, lr: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        first_step = bool(self._alike(call.params[0], group))
        if first_step:
            if found_inf is not None and found_inf.item():
                return  # momentum does not begin with a step that is skipped
            for param in call.params:
                self.state[param]["momentum_buffer"] = _launch.zeros_like(param)
        torch.ops.limpet.sgd_step_.default(
            call.params,
            call.grads,
            [self.state[param]["momentum_buffer"] for param in call.params] if group["momentum"] else [],
            call.integrals,
            call.anchors,
            call.importances,
            call.strength,
            lr,
            group["momentum"],
            group["dampening"],
            group["nesterov"],
            first_step,
            float(group["weight_decay"]),
            group["maximize"],
            grad_scale,
            found_inf,
        )
