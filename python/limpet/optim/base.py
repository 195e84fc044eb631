"""What the fused optimizers share: parameters sorted into calls of one op, regularizers, and refusals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limpet import _checks
from limpet.methods.collapse import Quadratic
from limpet.optim.regularization import Regularization, Regularizer


@dataclass
class Call:
    """Parameters that one call of an op takes together."""

    strength: float
    params: list[Tensor] = field(default_factory=list)  # [*] each
    grads: list[Tensor] = field(default_factory=list)  # [*] each
    anchors: list[Tensor] = field(default_factory=list)  # [*] each, or none at all
    importances: list[Tensor] = field(default_factory=list)  # [*] each, or none at all
    integrals: list[Tensor] = field(default_factory=list)  # [*] each, or none at all


class FusedOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose step is one call of an op for all parameters that are alike."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf instead of unscaling first

    def __init__(self, params: Any, defaults: dict[str, Any], regularizers: Iterable[Regularizer]) -> None:
        self._regularization = Regularization(regularizers)
        if defaults["foreach"]:
            raise ValueError("foreach=True asks for another implementation; this optimizer is fused")
        if defaults["fused"] is False:
            raise ValueError("fused=False asks for another implementation; this optimizer is fused")
        if defaults["differentiable"]:
            raise ValueError("differentiable=True is not possible: a fused step has no graph")
        self._check_settings(defaults)
        # As torch's fused optimizers say it in their states: step counts lie beside the parameters.
        super().__init__(params, {**defaults, "fused": True})
        self._regularization.require_shared(p for group in self.param_groups for p in group["params"])

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Raise ValueError, with torch's words, for settings out of range; subclasses add their own."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not group["lr"] >= 0.0:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")

    def _alike(self, param: Tensor, group: dict[str, Any]) -> Hashable:
        """What, beside dtype, device and regularization, parameters of one call have in common."""
        return None

    @abstractmethod
    def _update(
        self, group: dict[str, Any], call: Call, lr: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Take the step of one call's parameters."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch's optimizers do.

        Raises:
            ValueError: a setting of the group is out of range.
            TypeError: a parameter is neither float32, float64, bfloat16 nor float16, or is sharded over processes.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_settings(group)
            for k, param in enumerate(group["params"]):
                if hasattr(param, "device_mesh"):  # a DTensor: its type imports slowly
                    raise TypeError(f"{self._name(group, k)} must not be sharded over processes: use torch.optim")
                if param.dtype not in _checks.FLOAT_DTYPES:
                    raise TypeError(
                        f"{self._name(group, k)} must be float32, float64, bfloat16 or float16, "
                        f"got {_checks.describe(param.data)}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._regularization.forget_names()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_regularization": self._regularization}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: the optimizer's, the regularizers' penalties and their path integrals.

        The loss must then hold no penalty, and ``.grad`` the gradient of the task alone; it does not change. (Under a
        gradient scaler it stays scaled.) With ``maximize`` the penalty still pulls to the anchor, and path integrals
        count by how much *minus* what is maximized falls.

        Args:
            closure: computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse, or not like its parameter, or a moment does not fit its parameter.
                Nothing has changed then.
            ValueError: a regularizer's tensors do not fit their parameters. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._regularization.begin_step()
        quadratics, integrals = self._regularization.quadratics(), self._regularization.integrals()
        planned = [(group, self._calls(group, quadratics, integrals)) for group in self.param_groups]
        for group, calls in planned:
            lr = group["lr"]
            lr = lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
            for call in calls:
                device = call.params[0].device
                self._update(group, call, lr, self._scaler("grad_scale", device), self._scaler("found_inf", device))
        self._regularization.end_step()
        return loss

    def _scaler(self, name: str, device: torch.device) -> Tensor | None:  # []
        value: Tensor | None = getattr(self, name, None)
        return None if value is None else value.to(device, non_blocking=True)

    def _calls(
        self, group: dict[str, Any], quadratics: dict[Tensor, Quadratic], integrals: dict[Tensor, Tensor]
    ) -> Iterable[Call]:
        """The group's parameters that have a gradient, those of one call together."""
        calls: dict[Hashable, Call] = {}
        for k, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            self._check_grad(group, k, grad)
            quadratic, integral = quadratics.get(param), integrals.get(param)
            strength = 0.0 if quadratic is None else quadratic.strength
            key = (param.device, quadratic is None, integral is None, strength, self._alike(param, group))
            call = calls.setdefault(key, Call(strength))
            call.params.append(param)
            call.grads.append(grad)
            if quadratic is not None:
                call.anchors.append(quadratic.anchor)
                call.importances.append(quadratic.importance)
            if integral is not None:
                call.integrals.append(integral)
        return calls.values()

    def _check_grad(self, group: dict[str, Any], k: int, grad: Tensor) -> None:
        param = group["params"][k]
        shape, dtype, device = param.shape, param.dtype, param.device
        if grad.layout != torch.strided or grad.dtype != dtype or grad.device != device:
            raise RuntimeError(
                f"the gradient of {self._name(group, k)} must be dense, {param.dtype} and on {param.device}, "
                f"got {_checks.describe(grad)}"
            )
        state = self.state.get(param, {})
        for name in self._moments:
            moment = state.get(name)
            if moment is not None and (moment.shape != shape or moment.dtype != dtype or moment.device != device):
                raise RuntimeError(
                    f"{name} of {self._name(group, k)} must be like the parameter, "
                    f"{_checks.describe(param.data)}, got {_checks.describe(moment)}"
                )

    _moments: tuple[str, ...] = ()

    def _name(self, group: dict[str, Any], k: int) -> str:
        names = group.get("param_names")
        return f"parameter {names[k]!r}" if names else f"params[{k}] of its group"
