"""Which task is a sample of: learned in closed form, task after task, without data of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods.progressive.column import Columns
from limpet.methods.progressive.sensitivity import pairs

_LEAST_SPREAD = 1e-12  # of the means' squares: above rounding where no class has two different samples


class Selector(nn.Module):
    r"""A Gaussian for each class of each task, around its own mean, with one covariance for all.

    .. math:: p(k \mid x) \propto \sum_{c \in k} \exp(m_c^T S^{-1} z - \tfrac12 m_c^T S^{-1} m_c)

    with z the features of the *first* column at all its lateral points: the only ones that every task's data have met
    when the task is learned. (Streaming linear discriminant analysis on frozen features: Hayes and Kanan 2020,
    arXiv 1909.01520.) S is shrunk towards a multiple of the identity as far as the number of samples asks for (the
    oracle approximating estimate of Chen et al. 2010, eq. 23), so that nothing has to be chosen.

    Attributes:
        covariance: float64 [D, D], within classes, over all samples.
        means: float64 [C, D] of the classes.
        counts: int64 [C], samples of each class.
        column: int64 [C], the number of each class's column.
        weight: float64 [C, D], ``S^{-1} m_c``.
        bias: float64 [C], ``-m_c^T S^{-1} m_c / 2``.
    """

    covariance: Tensor
    means: Tensor
    counts: Tensor
    column: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("covariance", (0, 0)), ("means", (0, 0)), ("weight", (0, 0)), ("bias", (0,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        for name in ("counts", "column"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def learn(self, columns: Columns, number: int, batches: Iterable[Any]) -> None:
        """Add a task: one pass of the first column over its batches, and one system of D equations."""
        if (self.column == number).any():
            raise ValueError("task must be one that the selector has not learned yet")
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        squares: Tensor | float = 0.0
        for inputs, labels in pairs(batches):
            rows = first_features(columns, inputs).double()
            if not isinstance(labels, Tensor) or labels.shape != rows.shape[:1] or labels.is_floating_point():
                raise ValueError(f"labels must be integers [{len(rows)}], got {_checks.describe(labels)}")
            squares = squares + rows.T @ rows
            for label in labels.unique().tolist():
                of_class = rows[labels.to(rows.device) == label]
                sums[label] = sums.get(label, torch.zeros_like(rows[0])) + of_class.sum(0)
                counts[label] = counts.get(label, 0) + len(of_class)
        number_of = torch.tensor([counts[label] for label in sums], device=self.counts.device)
        means = torch.stack([sums[label] / counts[label] for label in sums])
        scatter = squares - (means.T * number_of) @ means
        if not torch.isfinite(scatter).all():
            raise ValueError("features of the first column must be finite to learn a task")
        if len(self.counts):
            scatter = scatter + self.covariance * self.counts.sum()
            means = torch.cat([self.means, means])
        self.counts = torch.cat([self.counts, number_of])
        self.column = torch.cat([self.column, torch.full_like(number_of, number)])
        self.means = means
        self.covariance = scatter / self.counts.sum()
        self._solve()

    def forward(self, columns: Columns, x: Any) -> Tensor:  # -> int64 [N]
        """The number of the likeliest column of each sample."""
        missing = set(range(len(columns))) - set(self.column.tolist())
        if missing or not len(columns):
            raise RuntimeError(f"the selector has not learned the tasks of columns {sorted(missing)}: learn_selector")
        features = first_features(columns, x)
        scores = torch.addmm(self.bias, features.double(), self.weight.T)
        of_task = [scores[:, self.column == number].logsumexp(1) for number in range(len(columns))]
        return torch.stack(of_task, 1).argmax(1)

    def _solve(self) -> None:
        means, scatter = self.means, self.covariance * self.counts.sum()
        size, freedom = len(scatter), max(1, int(self.counts.sum()) - len(self.counts))
        covariance = scatter / freedom
        trace, squares = covariance.trace(), covariance.square().sum()
        excess = (freedom + 1 - 2 / size) * (squares - trace.square() / size)
        wanted = (1 - 2 / size) * squares + trace.square()
        shrinkage = float((wanted / excess).clamp(0.0, 1.0)) if excess > 0 else 1.0
        spread = max(float(shrinkage * trace / size), _LEAST_SPREAD * float(means.square().sum(1).max()))
        covariance.mul_(1 - shrinkage).diagonal().add_(spread or 1.0)
        self.weight = torch.linalg.solve(covariance, means.T).T.contiguous()
        self.bias = -0.5 * (self.weight * means).sum(1)

    def _apply(self, fn: Any, recurse: bool = True) -> Selector:
        """Goes where the network is moved, and is not cast: a narrow covariance would be singular."""
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """As large as in the state."""
        for name, buffer in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor):
                setattr(self, name, buffer.new_zeros(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def first_features(columns: Columns, x: Any) -> Tensor:  # -> [N, D]
    """What the first column keeps for later ones, point by point, averaged over places."""
    _, features = columns.run(x, [0])
    kept = []
    for ends, read in zip(columns[0].points, features[0], strict=True):
        if read is None:
            raise RuntimeError(f"the lateral point {ends.path!r} of the first column did not run")
        last = read.movedim(ends.features_dim, -1)
        kept.append(last if last.dim() == 2 else last.flatten(1, -2).mean(1))
    return torch.cat(kept, 1)
