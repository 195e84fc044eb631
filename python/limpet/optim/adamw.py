"""AdamW (Loshchilov and Hutter 2019), fused, with regularizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from limpet import _launch
from limpet.optim.base import Call, FusedOptimizer
from limpet.optim.regularization import Regularizer


class AdamW(FusedOptimizer):
    r"""``torch.optim.AdamW``, with the gradients of quadratic penalties and path integrals in the step's own pass.

    .. math:: g_t = \nabla L(\theta) + s F (\theta - \theta^*), \qquad
        \omega \mathrel{-}= \nabla L(\theta_\text{before}) \, (\theta_\text{after} - \theta_\text{before})

    The loss given to ``backward()`` holds no penalty. Parameter, gradient, moments, anchor, importance and path
    integral are each read and written once: 44 bytes per float32 parameter with EWC and Synaptic Intelligence together,
    28 with neither. Several penalties are merged into one, exactly.

    Args:
        params: parameters, named parameters or groups, as torch takes them; float32, float64, bfloat16 or float16.
        lr: learning rate; a number or a tensor of one element.
        betas: decay of the running means of gradient and square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: whether to divide by the largest second moment so far.
        maximize: maximize what the gradients are of. Penalties still pull to their anchors.
        foreach: must not be true; there is one implementation.
        capturable: for torch's states; on a GPU step counts always lie there.
        differentiable: must be false.
        fused: must not be ``False``.
        regularizers: each with a ``model`` and ``quadratic()``, and perhaps ``integrals``
            (:class:`limpet.optim.Regularizer`).

    Raises:
        TypeError: a parameter or a regularizer is none.
        ValueError: a setting is out of range, or a regularizer's model shares no parameter with the optimizer.

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = AdamW(model.parameters(), lr=0.1)
    >>> model(torch.randn(8, 2)).square().mean().backward()
    >>> optimizer.step()
    """

    _moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        regularizers: Iterable[Regularizer] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, regularizers)

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for k, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {k}: {beta}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in (("amsgrad", False), ("maximize", False), ("capturable", False)):
                group.setdefault(name, value)
            group.update(foreach=None, differentiable=False, fused=True, decoupled_weight_decay=True)
            for param in group["params"]:
                kept = self.state.get(param)
                if kept:
                    kept["step"] = torch.as_tensor(kept["step"], dtype=torch.float32, device=param.device)

    def _update(
        self, group: dict[str, Any], call: Call, lr: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        states = [self._state(param, group["amsgrad"]) for param in call.params]
        beta1, beta2 = group["betas"]
        torch.ops.limpet.adamw_step_.default(
            call.params,
            call.grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            call.integrals,
            call.anchors,
            call.importances,
            call.strength,
            lr,
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            grad_scale,
            found_inf,
        )

    def _state(self, param: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """The parameter's state, made at its first step."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = _launch.zeros_like(param)
            state["exp_avg_sq"] = _launch.zeros_like(param)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = _launch.zeros_like(param)
        return state
