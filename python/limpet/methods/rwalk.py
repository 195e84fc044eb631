"""Riemannian walk (Chaudhry et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods import shards
from limpet.methods.path_integral import PathIntegralRegularizer, positive
from limpet.methods.quadratic import named_tensors, placed, same_shapes
from limpet.reference import wide


class RWalk(PathIntegralRegularizer):
    r"""Keep parameters that mattered, by the Fisher information and by what they did for the loss along the path.

    .. math:: \lambda \sum_i (\hat F_i + \hat s_i) (\theta_i - \theta^*_i)^2

    (Chaudhry et al. 2018, arXiv 1801.10112, eq. 6 to 8; no half in front of lambda), where in every step

    .. math:: F_i = \alpha \, g_i^2 + (1 - \alpha) F_i

    with ``g`` the batch's gradient of the task's own loss, and after every ``interval`` steps of a task

    .. math:: s^k_i \mathrel{+}= \max\Big(0, \;
        \frac{-\sum_t g_{t,i} (\theta_{t+1,i} - \theta_{t,i})}{\frac12 F_i \Delta\theta_i^2 + \epsilon}\Big)

    with the sum and :math:`\Delta\theta_i` over those steps. When a task ends, its scores are averaged with those so
    far, :math:`s = (s + s^k) / 2`, and F and s are each scaled to [0, 1] over all parameters. F goes on from task to
    task.

    F squares a batch's mean gradient, as the paper does: it is not the Fisher information (see
    :func:`limpet.diagonal_fisher`), and only its pattern is used. Apart from the path integral's own pass, F is
    updated by plain torch operations at each step. Eight tensors of the model's size are kept.

    Args:
        model: as for :class:`limpet.SynapticIntelligence`, which has all about steps, clipping and gradient scalers.
        optimizer: the same.
        strength: lambda, at least 0. It may be changed at any time.
        alpha: weight of the present batch in F, above 0 and at most 1; 0.9 in the paper.
        interval: optimizer steps to a score; 10 (MNIST) and 50 (CIFAR) in the paper.
        damping: epsilon, above 0.

    Attributes:
        fisher: F by parameter name.
        scores: s of all tasks so far, before scaling.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, or a number is none.
        ValueError: a number is out of range, or the optimizer does not own the model's parameters.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> rwalk = RWalk(model, optimizer, strength=1.0, interval=5)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.tensor([[1.0, 3.0]])).square().mean().backward()
    ...     optimizer.step()
    >>> rwalk.consolidate()
    >>> rwalk.importances["weight"].max().item() > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        strength: float,
        alpha: float = 0.9,
        interval: int = 10,
        damping: float = 1e-3,
    ) -> None:
        self.alpha = _alpha("alpha", alpha)
        self.interval = _checks.integer("interval", interval, minimum=1)
        self.damping = positive("damping", damping)
        self.fisher: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self._task_scores: dict[str, Tensor] = {}
        self._window: dict[str, Tensor] = {}  # the parameters when the present interval began
        super().__init__(model, optimizer, strength)

    def after_step(self) -> None:
        """As in the base class; every ``interval`` steps, a score is taken.

        Raises:
            RuntimeError: as in the base class.
        """
        super().after_step()
        if self.num_steps % self.interval == 0:
            params = dict(self.model.named_parameters())
            for name, integral in self.integrals.items():
                self._task_scores[name].add_(self._score(name, params[name]))
                self._window[name].copy_(params[name].detach())
                integral.zero_()

    def consolidate(self) -> None:
        """Protect what has been learnt: F and scores become importance, the parameters are anchored here.

        Raises:
            RuntimeError: there was no step since the last consolidation, a parameter was added, removed or resized
                since the first one, a path integral or F is not finite, or the parameters moved in no step that was
                seen. Nothing has been consolidated then.
        """
        params = self._check_path()
        self._check_seen(params, self.fisher)
        scores = {}
        for name, param in params.items():
            new = self._task_scores[name] + self._score(name, param)  # of the last, shorter interval
            old = self.scores.get(name)
            scores[name] = new if old is None else new.add_(placed(old, param)).div_(2)
            for what, tensor in (("score", scores[name]), ("Fisher information", self.fisher[name])):
                if not bool(shards.reduced(tensor.isfinite().all())):
                    raise RuntimeError(f"the {what} of {name!r} is not finite")
        fisher = _scaled({name: self.fisher[name] for name in params})
        scaled = _scaled(scores)
        importances = {name: fisher[name].add_(scaled[name]) for name in params}
        self._begin_task(importances)
        self.scores = {**self.scores, **scores}
        self._task_scores = {name: torch.zeros_like(t) for name, t in self._task_scores.items()}
        self._window = {name: self.anchors[name].clone() for name in self._window}

    def end_task(self, batches: object = None) -> None:
        """The same as :meth:`consolidate`; a loop may hand it the task's data, which are not looked at."""
        self.consolidate()

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with what is measured along the path."""
        return {
            **super().state_dict(),
            "alpha": self.alpha,
            "interval": self.interval,
            "damping": self.damping,
            "fisher": dict(self.fisher),
            "scores": dict(self.scores),
            "task_scores": dict(self._task_scores),
            "window": dict(self._window),
        }

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._read(state)
        read = {
            key: named_tensors(f"state[{key!r}]", state[key]) for key in ("fisher", "scores", "task_scores", "window")
        }
        for key in ("fisher", "task_scores", "window"):
            same_shapes(key, read[key], "integrals", values["integrals"])
        same_shapes("scores", read["scores"], "importances", values["importances"])
        return {
            **values,
            "alpha": _alpha("state['alpha']", state["alpha"]),
            "interval": _checks.integer("state['interval']", state["interval"], minimum=1),
            "damping": positive("state['damping']", state["damping"]),
            "fisher": read["fisher"],
            "scores": read["scores"],
            "_task_scores": read["task_scores"],
            "_window": read["window"],
        }

    def __repr__(self) -> str:
        return f"RWalk(strength={self.strength:g}, interval={self.interval}, num_tasks={self.num_tasks})"

    def _along_the_path(self) -> tuple[dict[str, Tensor], ...]:
        return self.integrals, self.fisher, self._task_scores

    def _track(self, name: str, param: Tensor) -> None:
        dtype = wide(param.dtype)
        previous = self._previous.get(name)
        super()._track(name, param)
        if name not in self._window:
            self._window[name] = param.detach().to(dtype, copy=True)
            return
        self._window[name] = placed(self._window[name], param, rest=param)
        if previous is not None and previous.shape == param.shape:
            # No step made that way. A new tensor: whoever goes back to the state before finds it unchanged.
            self._window[name] = self._window[name] + (param.detach() - placed(previous, param))

    def _update(self, params: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], strength: float) -> None:
        if any(not torch.equal(p.detach(), self._previous[name]) for name, p in params.items()):  # else it was skipped
            for name, param in params.items():
                own = grads[name].to(wide(param.dtype))
                if strength and name in self.importances:
                    own = own - strength * self.importances[name] * (self._previous[name] - self.anchors[name])
                self.fisher[name].mul_(1 - self.alpha).addcmul_(own, own, value=self.alpha)
        super()._update(params, grads, strength)

    def _score(self, name: str, param: Tensor) -> Tensor:  # [*]
        """What the interval so far adds to a parameter's score."""
        distance = (param.detach().to(self._window[name].dtype) - self._window[name]).square_().mul_(self.fisher[name])
        return self.integrals[name].clamp(min=0).div_(distance.mul_(0.5).add_(self.damping))


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scaled to [0, 1] over all tensors; zeros where all values are the same."""
    bounds = [shards.extremes(t) for t in tensors.values() if t.numel()]
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    return {name: (t - low) / (high - low) if high > low else torch.zeros_like(t) for name, t in tensors.items()}


def _alpha(name: str, value: Any) -> float:
    alpha = positive(name, value)
    if alpha > 1.0:
        raise ValueError(f"{name} must be at most 1, got {value!r}")
    return alpha
