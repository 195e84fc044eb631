"""Elastic weight consolidation (Kirkpatrick et al. 2017), offline and online (Schwarz et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.fisher import diagonal_fisher
from limpet.methods import shards
from limpet.methods.quadratic import QuadraticRegularizer, evaluating, named_tensors, same_shapes
from limpet.methods.storage import NARROW_KEYS, Storage, latest


class EWCTask(NamedTuple):
    """One task's own quadratic, as it was measured."""

    anchors: dict[str, Tensor]
    importances: dict[str, Tensor]


class EWC(QuadraticRegularizer):
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
        keep_tasks: keep each task's own anchors and importances too, in :attr:`tasks`: as much memory again for each
            task. Penalty and gradient run on the merged quadratic all the same. Not with ``decay``, nor with
            narrower formats than float32.
        importance_format: what importances are held in: ``"float32"``, ``"bfloat16"`` or ``"log8"`` (1 byte each).
        anchor_format: what anchors are held in: ``"float32"``, ``"split24"`` or ``"fixed16"`` (2 bytes each). What
            each costs in accuracy: docs/narrow.md. Packed tensors (all formats but the floats) are read where they
            lie; :func:`limpet.ops.unpack_anchor` and :func:`limpet.ops.unpack_importance` show their values. What
            merging rounds, it rounds at random, by draws that follow from the parameter's name and the number of the
            task.

    Attributes:
        tasks: each task's :class:`EWCTask`, where it was measured, if ``keep_tasks``; else empty.

    Raises:
        TypeError: ``model`` is no module, a number is none, or a parameter is float64 and a format is narrower.
        ValueError: ``strength`` or ``decay`` is out of range, there is no such format, or ``keep_tasks`` is asked for
            together with ``decay`` or with a narrower format.

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

    _optional_keys = NARROW_KEYS | {"tasks"}

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        decay: float | None = None,
        keep_tasks: bool = False,
        importance_format: str = "float32",
        anchor_format: str = "float32",
    ) -> None:
        super().__init__(model, strength, Storage(importance_format, anchor_format))
        self.decay = _decay("decay", decay)
        if keep_tasks and decay is not None:
            raise ValueError(f"keep_tasks must be False with decay={decay}: faded tasks are no sum of their quadratics")
        _only_wide("keep_tasks must be False", bool(keep_tasks), self._storage)
        self.keep_tasks = bool(keep_tasks)
        self.tasks: list[EWCTask] = []

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
        shards.require_whole(self._check_model())  # before the expensive part
        with evaluating(self.model):
            fisher = dict(
                diagonal_fisher(
                    self.model, batches, labels=labels, loss=loss, seed=seed, max_samples=max_samples, progress=progress
                )
            )
        tasks = self.tasks
        if self.keep_tasks:
            here = {name: p.detach() for name, p in self.model.named_parameters() if name in fisher}
            anchors = {name: p.to(fisher[name].dtype, copy=True) for name, p in here.items()}
            tasks = [*tasks, EWCTask(anchors, {name: fisher[name].clone() for name in here})]
        self._merge(fisher, _merged if self.decay is None else latest(self.decay))
        self.tasks = tasks

    end_task = consolidate

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with ``decay``, and with ``tasks`` where they are kept."""
        state = {**super().state_dict(), "decay": self.decay}
        return {**state, "tasks": [task._asdict() for task in self.tasks]} if self.keep_tasks else state

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        tasks = state.get("tasks", ())
        if not isinstance(tasks, (list, tuple)):
            raise TypeError(f"state['tasks'] must be a list, got {_checks.describe(tasks)}")
        decay = _decay("state['decay']", state["decay"])
        if decay is not None and "tasks" in state:
            raise ValueError(f"state['decay'] must be None where tasks are kept, got {decay}")
        read = [_task(f"state['tasks'][{k}]", task) for k, task in enumerate(tasks)]
        values = super()._read(state)
        _only_wide("state must not have the key 'tasks'", "tasks" in state, values["_storage"])
        return {**values, "decay": decay, "keep_tasks": "tasks" in state, "tasks": read}

    def __repr__(self) -> str:
        return f"EWC(strength={self.strength:g}, decay={self.decay}, num_tasks={self.num_tasks}{self._storage.text})"


def _merged(
    anchor: Tensor, old: Tensor, here: Tensor, new: Tensor
) -> tuple[Tensor, Tensor, float]:  # [*] each -> [*], [*]
    """Anchor, importance and constant of the one quadratic that is the sum of ``old`` and ``new``."""
    total = old.double() + new
    share = torch.where(total > 0, new / total, 1.0)  # unimportant to all: anchored here
    step = here.double() - anchor
    constant = float((old * share * step.square()).sum())
    return (anchor + share * step).to(anchor.dtype), total.to(old.dtype), constant


def _only_wide(what: str, kept: bool, storage: Storage) -> None:
    if kept and storage.narrow:
        raise ValueError(f"{what} with {storage}: tasks are kept as they were measured, in float32")


def _decay(name: str, value: Any) -> float | None:
    if value is None:
        return None
    decay = _checks.finite_number(name, value, minimum=0.0)
    if decay > 1.0:
        raise ValueError(f"{name} must be at most 1, got {value!r}")
    return decay


def _task(name: str, value: Any) -> EWCTask:
    if not isinstance(value, Mapping) or value.keys() != set(EWCTask._fields):
        raise ValueError(f"{name} must have the keys {list(EWCTask._fields)}, got {_checks.describe(value)}")
    task = EWCTask(*(named_tensors(f"{name}[{key!r}]", value[key]) for key in EWCTask._fields))
    same_shapes(f"{name} anchors", task.anchors, "importances", task.importances)
    return task
