"""What a sequence of tasks left behind: the accuracy matrix and the numbers read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks


class AccuracyMatrix:
    """Accuracy on every task after each task was learned: ``R[i][j]``, and the metrics defined on it.

    Rows are recorded one at a time, in the order of learning. All metrics are over the tasks learned *so far*, so that
    they can be read at any time; T below is the number of recorded rows. An entry that was not evaluated is NaN, and a
    metric that needs it is NaN too: nothing is skipped in silence. A difference between tasks needs two of them, so for
    T = 1 backward transfer, forward transfer and forgetting are NaN.

    Backward and forward transfer are sums over T - 1 tasks divided by T - 1, as in the paper of Lopez-Paz and Ranzato
    (2017, "Gradient Episodic Memory for Continual Learning", section 2, eq. 2-4). The public code of that paper divides
    the same sums by T: ``over_tasks=True`` gives that number.

    Args:
        num_tasks: how many tasks the sequence has.
        baseline: [num_tasks] accuracy on each task before any training, in [0, 1]; only :meth:`fwt` needs it.

    Raises:
        TypeError: ``num_tasks`` is not an integer.
        ValueError: ``num_tasks`` is below 1, or ``baseline`` has another length or a value outside [0, 1].

    >>> matrix = AccuracyMatrix(2, baseline=[0.5, 0.4])
    >>> matrix.record([0.9, 0.5])
    >>> matrix.record([0.7, 1.0])
    >>> f"{matrix.average_accuracy():.2f} {matrix.bwt():.2f} {matrix.fwt():.2f} {matrix.forgetting():.2f}"
    '0.85 -0.20 0.10 0.20'
    """

    def __init__(self, num_tasks: int, *, baseline: Sequence[float] | Tensor | None = None) -> None:
        self._values = torch.full((_checks.integer("num_tasks", num_tasks, minimum=1),) * 2, math.nan).double()
        self._num_learned = 0
        self._baseline = None if baseline is None else _accuracies("baseline", baseline, num_tasks)
        if self._baseline is not None and len(self._baseline) != num_tasks:
            raise ValueError(f"baseline must have {num_tasks} values, one for each task, got {len(self._baseline)}")

    @property
    def num_tasks(self) -> int:
        """How many tasks the sequence has."""
        return len(self._values)

    @property
    def num_learned(self) -> int:
        """How many rows have been recorded: T in the formulas."""
        return self._num_learned

    @property
    def values(self) -> Tensor:
        """A copy of R: [num_tasks, num_tasks] float64, NaN where nothing was evaluated."""
        return self._values.clone()

    @property
    def baseline(self) -> Tensor | None:
        """A copy of the accuracy before any training: [num_tasks] float64."""
        return None if self._baseline is None else self._baseline.clone()

    def record(self, accuracies: Sequence[float] | Tensor) -> None:
        """Record the next row: the accuracy on each task, now that one more task has been learned.

        Args:
            accuracies: at most ``num_tasks`` values in [0, 1], NaN where a task was not evaluated; the tasks beyond the
                last value count as not evaluated.

        Raises:
            RuntimeError: every task has its row already.
            TypeError: a value is not a number.
            ValueError: there are more values than tasks, or a value lies outside [0, 1].
        """
        if self._num_learned == self.num_tasks:
            raise RuntimeError(f"all {self.num_tasks} rows have been recorded")
        row = _accuracies("accuracies", accuracies, self.num_tasks)
        self._values[self._num_learned, : len(row)] = row
        self._num_learned += 1

    def average_accuracy(self) -> float:
        """Mean accuracy over the tasks learned so far, after the last of them: ``1/T sum_i R[T][i]``."""
        learned = self._learned()
        return float(learned[-1].mean())

    def bwt(self, *, over_tasks: bool = False) -> float:
        """Backward transfer: ``1/(T-1) sum_{i<T} R[T][i] - R[i][i]``; negative where learning made old tasks worse.

        Args:
            over_tasks: divide by T, as the public code of GEM does.
        """
        learned = self._learned()
        return _mean((learned[-1] - learned.diagonal())[:-1], over_tasks)

    def fwt(self, *, over_tasks: bool = False) -> float:
        """Forward transfer: ``1/(T-1) sum_{i>1} R[i-1][i] - b_i``, with b the accuracy before any training.

        Args:
            over_tasks: divide by T, as the public code of GEM does.

        Raises:
            RuntimeError: the matrix was made without ``baseline``, or no row has been recorded.
        """
        learned = self._learned()
        if self._baseline is None:
            raise RuntimeError("fwt needs the accuracy before any training: AccuracyMatrix(..., baseline=...)")
        return _mean(learned.diagonal(1) - self._baseline[1 : len(learned)], over_tasks)

    def forgetting(self) -> float:
        """Forgetting: ``1/(T-1) sum_{i<T} max_{l<T} R[l][i] - R[T][i]``, from the best a task ever was.

        (Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 3.1.) A task's maximum is over the
        rows in which it was evaluated.
        """
        learned = self._learned()
        best = learned[:-1, :-1].nan_to_num(nan=-math.inf)
        if not len(best):
            return math.nan
        best = best.amax(0)
        return _mean(best.masked_fill(best.isinf(), math.nan) - learned[-1, :-1], over_tasks=False)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded: ``values`` [T, T], ``num_learned`` and ``baseline`` [T] or None."""
        return {"values": self.values, "num_learned": self._num_learned, "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the matrix takes its number of tasks.

        Raises:
            ValueError: a key is missing, or shapes or values do not belong to an accuracy matrix.
        """
        missing = {"values", "num_learned", "baseline"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        values = _checks.float_tensor("state['values']", state["values"])
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(f"state['values'] must be square, got {_checks.describe(values)}")
        restored = AccuracyMatrix(len(values), baseline=state["baseline"])
        learned = _checks.integer("state['num_learned']", state["num_learned"], minimum=0)
        if learned > len(values):
            raise ValueError(f"state['num_learned'] must be at most {len(values)}, got {learned}")
        for row in values[:learned]:
            restored.record(row)
        self.__dict__.update(restored.__dict__)

    def __repr__(self) -> str:
        return f"AccuracyMatrix(num_tasks={self.num_tasks}, num_learned={self.num_learned})"

    def _learned(self) -> Tensor:
        """The square of R that concerns the tasks learned so far: [T, T]."""
        if not self._num_learned:
            raise RuntimeError("no row has been recorded yet")
        return self._values[: self._num_learned, : self._num_learned]


def _mean(differences: Tensor, over_tasks: bool) -> float:
    """Sum of T - 1 differences over T - 1, or over T; NaN where there is none."""
    if not len(differences):
        return math.nan
    return float(differences.sum()) / (len(differences) + over_tasks)


def _accuracies(name: str, values: Sequence[float] | Tensor, at_most: int) -> Tensor:
    """Validate accuracies: at most ``at_most`` values in [0, 1] or NaN, as a float64 tensor on the CPU."""
    try:
        row = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a sequence of numbers, got {_checks.describe(values)}") from None
    if row.ndim != 1 or len(row) > at_most:
        raise ValueError(f"{name} must have one dimension and at most {at_most} values, got shape {list(row.shape)}")
    outside = row[(row < 0) | (row > 1)]
    if len(outside):
        raise ValueError(f"{name} must lie in [0, 1], got {outside[0].item()!r}")
    return row.clone()
