"""Synaptic Intelligence (Zenke, Poole and Ganguli 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from limpet.methods.path_integral import PathIntegralRegularizer, positive


class SynapticIntelligence(PathIntegralRegularizer):
    r"""Keep parameters that lowered the loss on earlier tasks near where those tasks left them.

    .. math:: c \sum_i \Omega_i (\theta_i - \theta^*_i)^2, \qquad
        \Omega_i \mathrel{+}= \frac{\max(\omega_i, 0)}{\Delta_i^2 + \xi}, \qquad
        \omega_i = - \sum_t g_{t,i} \, (\theta_{t+1,i} - \theta_{t,i})

    (Zenke et al. 2017, eq. 3 to 5; no half in front of ``c``), with ``g`` the gradient of the task's *own* loss,
    without the penalty's, and :math:`\Delta_i = \theta_i - \theta^*_i` the way from the last consolidation, or from
    where the parameters were when this was made. Importances come from training alone; no data are needed at a task's
    end. (The authors' code clips the sum of old and new importance at zero, not the path integral: the same for the
    first task, less importance later for what a later task's path went against.)

    With an optimizer it runs in that optimizer's step hooks, and nothing else of a training loop changes; without one,
    call :meth:`before_step` and :meth:`after_step` around each step. Gradients count as they stand in ``.grad`` when
    :meth:`before_step` runs: after accumulation, and after clipping, unless it is called by hand before that. A step
    that a :class:`torch.amp.GradScaler` skips adds nothing. What moves a parameter between two steps (a loaded state,
    clamping, a moving average) adds nothing either, as long as it goes through the parameter itself: writing through
    ``param.data`` cannot be seen.

    Args:
        model: the network to protect. It may change between :meth:`consolidate` and the next step: new parameters are
            free, and a tensor that grew keeps its old leading slice protected. Frozen parameters cost nothing until
            they are trained.
        optimizer: the one that trains all of the model; see :meth:`attach`.
        strength: c, at least 0. It may be changed at any time.
        damping: xi, above 0, in squared units of the parameters: bounds the importance of what hardly moved.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer, or a number is none.
        ValueError: ``strength`` or ``damping`` is out of range, or the optimizer does not own the model's parameters.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> si = SynapticIntelligence(model, optimizer, strength=1.0)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(4, 2)).square().mean().backward()
    ...     optimizer.step()
    >>> si.consolidate()
    >>> si.importances["weight"].min().item() > 0
    True
    >>> si.penalty().item()
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        strength: float,
        damping: float = 0.1,
    ) -> None:
        self.damping = positive("damping", damping)
        super().__init__(model, optimizer, strength)

    def consolidate(self) -> None:
        """Protect what has been learnt: path integrals become importance, the parameters are anchored here.

        Raises:
            RuntimeError: there was no step since the last consolidation, a parameter was added, removed or resized
                since the first one, a path integral is not finite, or the parameters moved though every path integral
                is zero. Nothing has been consolidated then.
        """
        params = self._check_path()
        self._check_seen(params, self.integrals)
        importances = {}
        for name, param in params.items():
            integral, anchor = self.integrals[name], self.anchors[name]
            delta = param.detach().to(anchor.dtype) - anchor  # [*]
            new = integral.clamp(min=0).div_(delta.square_().add_(self.damping))
            importances[name] = new.add_(self.importances[name]) if name in self.importances else new
        self._begin_task(importances)

    def end_task(self, batches: object = None) -> None:
        """The same as :meth:`consolidate`; a loop may hand it the task's data, which are not looked at."""
        self.consolidate()

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with ``damping``."""
        return {**super().state_dict(), "damping": self.damping}

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._read(state), "damping": positive("state['damping']", state["damping"])}

    def __repr__(self) -> str:
        return f"SynapticIntelligence(strength={self.strength:g}, damping={self.damping:g}, num_tasks={self.num_tasks})"
