"""Elastic weight consolidation (Kirkpatrick et al. 2017), offline and online (Schwarz et al. 2018)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks, ops
from limpet.fisher import diagonal_fisher

_log = logging.getLogger("limpet")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class EWC:
    r"""Keep the weights that earlier tasks need near where those tasks left them.

    .. math:: \frac{\lambda}{2} \sum_k \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

    (Kirkpatrick et al. 2017, eq. 3), with ``F`` the exact diagonal Fisher information of :func:`limpet.diagonal_fisher`
    at the end of task ``k`` and ``theta*`` the parameters there. The tasks' quadratics are merged into one as they
    come, exactly: ``F = F_1 + F_2``, ``anchor = (F_1 a_1 + F_2 a_2) / F`` and a constant, so that a hundred tasks cost
    what one costs.

    Args:
        model: the network to protect. It may grow: parameters that are new since the last :meth:`consolidate` are
            free, and a tensor that grew (a wider head) keeps its old leading slice protected.
        strength: lambda, at least 0. It may be changed at any time.
        decay: gamma of online EWC in [0, 1]: older importances fade, ``F = gamma F_old + F_new``, and the anchor is
            always the latest task's parameters. ``None`` keeps every task's own quadratic (offline EWC).

    Raises:
        TypeError: ``model`` is no module, or a number is none.
        ValueError: ``strength`` or ``decay`` is out of range.

    >>> model = nn.Linear(2, 2)
    >>> ewc = EWC(model, strength=100.0)
    >>> ewc.penalty().item()
    0.0
    >>> ewc.consolidate([(torch.randn(8, 2), torch.randint(2, (8,)))])
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> ewc.penalty().item() > 0
    True
    """

    def __init__(self, model: nn.Module, strength: float, *, decay: float | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_checks.describe(model)}")
        self.model = model
        self.strength = _checks.finite_number("strength", strength, minimum=0.0)
        self.decay = None if decay is None else _checks.finite_number("decay", decay, minimum=0.0)
        if self.decay is not None and self.decay > 1.0:
            raise ValueError(f"decay must be at most 1, got {decay!r}")
        self.num_tasks = 0
        self.anchors: dict[str, Tensor] = {}
        self.importances: dict[str, Tensor] = {}
        self.constant = 0.0  # sum_i F_1 F_2 / (F_1 + F_2) (a_1 - a_2)^2 over all merges
        self._free: frozenset[str] = frozenset()

    def penalty(self) -> Tensor:  # []
        """The penalty as a differentiable 0-d tensor, to be added to the loss; zero before the first consolidation.

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        params, anchors, importances = self._protected()
        value = ops.quadratic_penalty(params, anchors, importances, self.strength)
        return value + 0.5 * self.strength * self.constant if self.constant else value

    def add_penalty_grad_(self) -> Tensor:  # []
        """Add the penalty's gradient straight into each ``.grad``, in one pass; return the penalty without a graph.

        Call it between ``loss.backward()`` and ``optimizer.step()`` in place of adding :meth:`penalty` to the loss.
        It moves half the bytes. (Under a gradient scaler, unscale first.)

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        params, anchors, importances = self._protected()
        value = ops.add_quadratic_penalty_grad_(params, anchors, importances, self.strength)
        return value + 0.5 * self.strength * self.constant if self.constant else value

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        max_samples: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """Protect what has been learnt: measure the Fisher information on a task's data, anchor the parameters here.

        The model is evaluated in evaluation mode and comes back as it was.

        Args:
            batches: the finished task's ``(inputs, targets)``, as :func:`limpet.diagonal_fisher` takes them.
            loss: one value per sample; cross-entropy by default.
            max_samples: use at most so many samples.
            progress: called with the samples done so far, and their number where it is known.

        Raises:
            TypeError: as :func:`limpet.diagonal_fisher`.
            ValueError: as :func:`limpet.diagonal_fisher`.
            RuntimeError: as :func:`limpet.diagonal_fisher`; nothing has been consolidated then.
        """
        self._protected()  # before the expensive part: the model must still hold what is protected
        with _evaluating(self.model):
            fisher = diagonal_fisher(self.model, batches, loss=loss, max_samples=max_samples, progress=progress)
        for name, param in self.model.named_parameters():
            if name in fisher:
                self._merge(name, param.detach(), fisher[name])
        self.num_tasks += 1
        self._free = frozenset()

    end_task = consolidate

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; the tensors are the live ones, as in torch."""
        return {
            "strength": self.strength,
            "decay": self.decay,
            "num_tasks": self.num_tasks,
            "constant": self.constant,
            "anchors": dict(self.anchors),
            "importances": dict(self.importances),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`; tensors follow the model's parameters to their device when first used.

        Raises:
            ValueError: keys are missing or unknown, or anchors and importances do not match each other.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, dict) or state.keys() != expected:
            got = sorted(state) if isinstance(state, dict) else _checks.describe(state)
            raise ValueError(f"state must have the keys {sorted(expected)}, got {got}")
        anchors, importances = state["anchors"], state["importances"]
        shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (anchors, importances)]
        if shapes[0] != shapes[1]:
            names = sorted({n for n, _ in shapes[0].items() ^ shapes[1].items()})
            raise ValueError(f"state must hold anchors and importances of the same names and shapes, not so: {names}")
        self.strength, self.decay = state["strength"], state["decay"]
        self.num_tasks, self.constant = state["num_tasks"], state["constant"]
        self.anchors = {name: t.detach().clone() for name, t in anchors.items()}
        self.importances = {name: t.detach().clone() for name, t in importances.items()}

    def __repr__(self) -> str:
        return f"EWC(strength={self.strength:g}, decay={self.decay}, num_tasks={self.num_tasks})"

    def _protected(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters with their anchors and importances, each where and as large as the parameter is now."""
        params: list[Tensor] = []
        anchors: list[Tensor] = []
        importances: list[Tensor] = []
        free: list[str] = []
        missing = set(self.anchors)
        for name, param in self.model.named_parameters():
            if name not in self.anchors:
                free.append(name)
                continue
            missing.discard(name)
            self._follow(name, param)
            if param.requires_grad:
                params.append(param)
                anchors.append(self.anchors[name])
                importances.append(self.importances[name])
        if missing:
            raise RuntimeError(f"the model has lost parameters that are protected: {sorted(missing)}")
        if self.num_tasks and free and self._free != frozenset(free):
            self._free = frozenset(free)
            _log.info("EWC: %d parameters are new since the last consolidation and left free", len(free))
        return params, anchors, importances

    def _follow(self, name: str, param: Tensor) -> None:
        """Bring a parameter's anchor and importance to its device, and to its size if it grew."""
        anchor = self.anchors[name]
        if anchor.shape != param.shape:
            if anchor.dim() != param.dim() or any(a > p for a, p in zip(anchor.shape, param.shape, strict=True)):
                raise RuntimeError(
                    f"parameter {name!r} was consolidated with shape {list(anchor.shape)}; "
                    f"it may grow, but has shape {list(param.shape)}"
                )
            old = tuple(slice(size) for size in anchor.shape)
            for tensors in (self.anchors, self.importances):
                grown = torch.zeros(param.shape, dtype=tensors[name].dtype, device=tensors[name].device)
                grown[old] = tensors[name]
                tensors[name] = grown
            _log.info(
                "EWC: %s grew from %s to %s; its old slice stays protected",
                name,
                *map(list, (anchor.shape, param.shape)),
            )
        if anchor.device != param.device:
            self.anchors[name] = self.anchors[name].to(param.device)
            self.importances[name] = self.importances[name].to(param.device)

    def _merge(self, name: str, param: Tensor, fisher: Tensor) -> None:
        """Merge a new task's quadratic about ``param`` into the one that stands for all tasks so far."""
        if name not in self.anchors:
            self.anchors[name] = param.to(fisher.dtype, copy=True)
            self.importances[name] = fisher.clone()
            return
        if self.decay is not None:
            self.importances[name].mul_(self.decay).add_(fisher)
            self.anchors[name].copy_(param)
            return
        old, new = self.importances[name].double(), fisher.double()
        anchor, here = self.anchors[name].double(), param.double()
        total = old + new
        share = torch.where(total > 0, new / total, torch.ones_like(total))  # unimportant to all: anchored here
        self.constant += float((old * share * (here - anchor).square()).sum())
        self.anchors[name].copy_(anchor + share * (here - anchor))
        self.importances[name].copy_(total)
