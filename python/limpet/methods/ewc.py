"""Elastic weight consolidation (Kirkpatrick et al. 2017), offline and online (Schwarz et al. 2018)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks, ops
from limpet.fisher import diagonal_fisher
from limpet.reference import wide

_log = logging.getLogger("limpet")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:  # parents first; train() may do more than set the flag, and undoes it here
            if module.training != training:
                module.train(training)
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
        self.decay = _decay("decay", decay)
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
        return self._with_constant(ops.quadratic_penalty(*self._lists(self._protected()), self.strength))

    def add_penalty_grad_(self) -> Tensor:  # []
        """Add the penalty's gradient straight into each ``.grad``, in one pass; return the penalty without a graph.

        Call it between ``loss.backward()`` and ``optimizer.step()`` in place of adding :meth:`penalty` to the loss.
        It moves half the bytes. (Under a gradient scaler, unscale first.)

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        params = self._protected()
        learning = {name: p for name, p in params.items() if p.requires_grad}
        frozen = {name: p for name, p in params.items() if not p.requires_grad}
        value = ops.add_quadratic_penalty_grad_(*self._lists(learning), self.strength)
        if frozen:
            value = value + ops.quadratic_penalty(*self._lists(frozen), self.strength)
        return self._with_constant(value)

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        labels: str = "data",
        loss: Callable[[Any, Any], Tensor] | None = None,
        seed: int = 0,
        max_samples: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """Protect what has been learnt: measure the Fisher information on a task's data, anchor the parameters here.

        The model is evaluated in evaluation mode and comes back as it was. Parameters that are frozen meanwhile keep
        the protection they had.

        Args:
            batches: the finished task's ``(inputs, targets)``, as :func:`limpet.diagonal_fisher` takes them.
            labels: whose labels the Fisher information is taken with, as for :func:`limpet.diagonal_fisher`.
            loss: one value per sample; cross-entropy by default.
            seed: what labels are drawn from, where ``labels`` says that they are.
            max_samples: use at most so many samples.
            progress: called with the samples done so far, and their number where it is known.

        Raises:
            TypeError: as :func:`limpet.diagonal_fisher`.
            ValueError: as :func:`limpet.diagonal_fisher`.
            RuntimeError: as :func:`limpet.diagonal_fisher`, or a protected parameter has left the model or shrunk.
                Whatever is raised, nothing has been consolidated then.
        """
        self._check_model()  # before the expensive part
        with _evaluating(self.model):
            fisher = diagonal_fisher(
                self.model, batches, labels=labels, loss=loss, seed=seed, max_samples=max_samples, progress=progress
            )
        params = self._protected()
        anchors, importances, constant = dict(self.anchors), dict(self.importances), self.constant
        for name, param in self.model.named_parameters():
            if name not in fisher:
                continue
            here = param.detach().to(fisher[name].dtype, copy=True)
            new = torch.empty_like(here).copy_(fisher[name])  # laid out as the parameter is: read in one flat pass
            if name not in params:
                anchors[name], importances[name] = here, new
            elif self.decay is not None:
                anchors[name], importances[name] = here, new.add_(importances[name], alpha=self.decay)
            else:
                anchors[name], importances[name], added = _merged(anchors[name], importances[name], here, new)
                constant += added
        self.anchors, self.importances, self.constant = anchors, importances, constant
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; tensors follow the model's parameters to device and dtype when first used.

        Raises:
            TypeError: a number or a tensor of the state is none.
            ValueError: keys are missing or unknown, a number is out of range, or anchors and importances do not match
                each other. Nothing has been taken over then.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else _checks.describe(state)
            raise ValueError(f"state must have the keys {sorted(expected)}, got {got}")
        strength = _checks.finite_number("state['strength']", state["strength"], minimum=0.0)
        decay = _decay("state['decay']", state["decay"])
        num_tasks = _checks.integer("state['num_tasks']", state["num_tasks"], minimum=0)
        constant = _checks.finite_number("state['constant']", state["constant"], minimum=0.0)
        anchors, importances = (_tensors(f"state[{key!r}]", state[key]) for key in ("anchors", "importances"))
        shapes = [{(name, tuple(t.shape)) for name, t in tensors.items()} for tensors in (anchors, importances)]
        if shapes[0] != shapes[1]:
            names = sorted({name for name, _ in shapes[0] ^ shapes[1]})
            raise ValueError(f"state must hold anchors and importances of the same names and shapes, not so: {names}")
        self.strength, self.decay, self.num_tasks, self.constant = strength, decay, num_tasks, constant
        self.anchors, self.importances = anchors, importances
        self._free = frozenset()

    def __repr__(self) -> str:
        return f"EWC(strength={self.strength:g}, decay={self.decay}, num_tasks={self.num_tasks})"

    def _with_constant(self, value: Tensor) -> Tensor:  # [] -> []
        return value + 0.5 * self.strength * self.constant if self.constant else value

    def _lists(self, params: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters with their anchors and importances."""
        return (
            list(params.values()),
            [self.anchors[name] for name in params],
            [self.importances[name] for name in params],
        )

    def _check_model(self) -> dict[str, nn.Parameter]:
        """The model's parameters, once it is clear that it still holds what is protected."""
        params = dict(self.model.named_parameters())
        missing = self.anchors.keys() - params.keys()
        if missing:
            raise RuntimeError(f"the model has lost parameters that are protected: {sorted(missing)}")
        for name, anchor in self.anchors.items():
            old, new = anchor.shape, params[name].shape
            if old != new and (len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True))):
                raise RuntimeError(
                    f"parameter {name!r} was consolidated with shape {list(old)}; "
                    f"it may grow, but has shape {list(new)}"
                )
        return params

    def _protected(self) -> dict[str, nn.Parameter]:
        """The protected parameters, once anchors and importances are where and as large as those are now."""
        params = self._check_model()
        free = frozenset(name for name, p in params.items() if name not in self.anchors and p.requires_grad)
        if self.num_tasks and free and self._free != free:
            _log.info("EWC: %d parameters are new since the last consolidation and left free", len(free))
            self._free = free
        protected = {name: params[name] for name in self.anchors}
        for name, param in protected.items():
            self._follow(name, param)
        return protected

    def _follow(self, name: str, param: Tensor) -> None:
        """Bring a parameter's anchor and importance to its device and dtype, and to its size if it grew."""
        dtype = wide(param.dtype)
        shape = self.anchors[name].shape
        if shape != param.shape:
            _log.info("EWC: %s grew from %s to %s; its old slice stays protected", name, list(shape), list(param.shape))
        for tensors in (self.anchors, self.importances):
            tensor = tensors[name]
            if tensor.shape == param.shape and tensor.dtype == dtype and tensor.device == param.device:
                continue
            with torch.inference_mode(False), torch.no_grad():  # they outlive this call
                placed = torch.zeros_like(param, dtype=dtype)
                placed[tuple(slice(size) for size in tensor.shape)] = tensor.to(param.device, dtype)
                tensors[name] = placed


def _merged(
    anchor: Tensor, old: Tensor, here: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, float]:  # [*] each -> [*], [*]
    """Anchor, importance and constant of the one quadratic that is the sum of ``old`` and ``new``."""
    total = old.double() + new
    share = torch.where(total > 0, new / total, 1.0)  # unimportant to all: anchored here
    step = here.double() - anchor
    constant = float((old * share * step.square()).sum())
    return (anchor + share * step).to(anchor.dtype), total.to(old.dtype), constant


def _decay(name: str, value: Any) -> float | None:
    if value is None:
        return None
    decay = _checks.finite_number(name, value, minimum=0.0)
    if decay > 1.0:
        raise ValueError(f"{name} must be at most 1, got {value!r}")
    return decay


def _tensors(name: str, value: Any) -> dict[str, Tensor]:
    """Copies of a mapping's floating tensors."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from names to tensors, got {_checks.describe(value)}")
    return {key: _checks.float_tensor(f"{name}[{key!r}]", t).detach().clone() for key, t in value.items()}
