"""How much a column's answers depend on each column's features (Rusu et al. 2016, section 3 and appendix)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods.progressive.column import Column, Features, Probe
from limpet.methods.progressive.points import first_input, first_output, with_first

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Earlier = Callable[[Any], Mapping[int, Features]]  # inputs -> the features of the columns that are read
Read = tuple[int, int]  # (point, column)

_OCTAVES = 10  # noise between 2^-10 and 2^10 of a unit's deviation
_HALVINGS = 11  # of the octaves between: to 0.01 octave


@dataclass(frozen=True, repr=False)
class LateralSensitivity:
    """Which column feeds which point of a task's column; ``print`` shows the table, :meth:`plot` a picture.

    Attributes:
        measure: ``"fisher"`` or ``"perturbation"``.
        task: whose column reads.
        points: the paths of its lateral points.
        tasks: of the columns that are read; the last one is the column's own.
        shares: [points, columns] float64, each row with the sum 1; 0 where nothing is read or nothing counts.
    """

    measure: str
    task: str | int
    points: tuple[str, ...]
    tasks: tuple[str | int, ...]
    shares: Tensor

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the shares as a heat map: points over columns.

        Args:
            path: also write the picture here, as its suffix says (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: matplotlib knows no format with the suffix of ``path``.
        """
        from limpet.methods.progressive.picture import draw

        return draw(self, None if path is None else Path(path))

    def __repr__(self) -> str:
        return f"LateralSensitivity(measure={self.measure!r}, task={self.task!r}, points={list(self.points)})"

    def __str__(self) -> str:
        rows = [["", *map(str, self.tasks)]]
        rows += [
            [path, *(f"{share:.3f}" for share in row)]
            for path, row in zip(self.points, self.shares.tolist(), strict=True)
        ]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def fisher(column: Column, number: int, earlier: Earlier, batches: Iterable[Any]) -> Tensor:  # [points, number + 1]
    r"""``sum_m Var(h_m) E[(d log p(y | x) / d h_m)^2]``, y from the model, over its sum in a point.

    (The paper takes ``AFS(i, k, m) = F_i^{(k)}(m, m) / sum_k F_i^{(k)}(m, m)`` of normalised features m; a feature of
    one column has no counterpart in another, and widths may differ, so here features are summed before the division.)
    Channels of images are summed over places.
    """
    information, units = dict[Read, Tensor](), dict[Read, _Units]()
    for inputs, _ in pairs(batches):
        read = dict[Read, Tensor]()

        def leaf(point: int, source: int, features: Tensor, read: dict[Read, Tensor] = read) -> Tensor:
            tied = features.view_as(features) if features.requires_grad else features.detach().requires_grad_()
            read[point, source] = tied  # its own node: what the feature does on other ways is not seen
            return tied

        with torch.enable_grad(), reading(column, number, leaf):
            logits, _ = column(inputs, earlier(inputs))
            log_p = _logits(logits).float().log_softmax(1)
        for key, features in read.items():
            units.setdefault(key, _Units(column.points[key[0]].features_dim)).add(features.detach())
        for label in range(log_p.shape[1]):
            last = label == log_p.shape[1] - 1
            grads = torch.autograd.grad(
                log_p[:, label].sum(), list(read.values()), retain_graph=not last, allow_unused=True
            )
            weight = log_p[:, label].detach().exp().double()
            for key, grad in zip(read, grads, strict=True):
                if grad is not None:
                    rows = _by_unit(grad, column.points[key[0]].features_dim)  # [N, places, units]
                    squares = torch.einsum("n,npu,npu->u", weight, rows, rows)
                    information[key] = information.get(key, 0) + squares
    return _shares(
        column, number, {key: float((units[key].variance() * info).sum()) for key, info in information.items()}
    )


def perturbation(column: Column, number: int, earlier: Earlier, batches: Iterable[Any]) -> Tensor:
    """``1 / sigma^2`` over its sum in a point; sigma the noise that takes half of the accuracy above chance.

    (The paper takes half of the performance. A task of two classes never falls below half by noise alone.) Noise is in
    units of each feature's standard deviation.
    """
    held = [(inputs, labels, earlier(inputs)) for inputs, labels in pairs(batches)]
    units = dict[Read, _Units]()

    def note(point: int, source: int, features: Tensor) -> Tensor:
        units.setdefault((point, source), _Units(column.points[point].features_dim)).add(features)
        return features

    def accuracy(probe: Probe) -> tuple[float, int]:
        right = total = classes = 0
        with torch.no_grad(), reading(column, number, probe):
            for inputs, labels, features in held:
                logits = _logits(column(inputs, features)[0])
                right += int((logits.argmax(1) == labels).sum())
                total, classes = total + len(labels), logits.shape[1]
        return right / total, classes

    whole, classes = accuracy(note)
    chance = 1 / classes
    if whole <= chance:
        raise ValueError(f"batches must be answered better than by chance ({chance:.3f}), accuracy is {whole:.3f}")
    half = 0.5 * (whole + chance)

    def precision(key: Read) -> float:
        deviation = units[key].variance().sqrt()

        def holds(octave: float) -> bool:
            generator = torch.Generator().manual_seed(0)  # the same draws at every strength

            def noisy(point: int, source: int, features: Tensor) -> Tensor:
                if (point, source) != key:
                    return features
                dim = column.points[point].features_dim
                shape = [1] * features.dim()
                shape[dim] = -1
                noise = torch.randn(features.shape, generator=generator, dtype=torch.float64)
                scale = (2.0**octave * deviation).view(shape)
                return features + (noise.to(features.device) * scale).to(features.dtype)

            return accuracy(noisy)[0] > half

        low, high = float(-_OCTAVES), float(_OCTAVES)
        if holds(high):
            return 0.0
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if holds(middle) else (low, middle)
        return 4.0**-high

    return _shares(column, number, {key: precision(key) for key in units})


MEASURES = {"fisher": fisher, "perturbation": perturbation}


def pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Read pairs (inputs, labels), one at least."""
    number = -1
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"batches must give pairs (inputs, labels), got {_checks.describe(batch)} as batch {number}"
            )
        yield batch[0], batch[1]
    if number < 0:
        raise ValueError("batches must give at least one batch, got none")


@contextmanager
def reading(column: Column, number: int, probe: Probe) -> Iterator[None]:
    """Let a probe see, and replace, what each point reads: of earlier columns, and the column's own."""

    def own_input(point: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            old = first_input(args, kwargs)
            new = probe(point, number, old)
            return (
                tuple(new if value is old else value for value in args),
                {key: new if value is old else value for key, value in kwargs.items()},
            )

        return hook

    def own_output(point: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, probe(point, number, first_output(output)))

        return hook

    handles = []
    try:
        column.probe = probe
        for point, ends in enumerate(column.points):
            module = column.network.get_submodule(ends.path)
            if column.reads_input:
                handles.append(module.register_forward_pre_hook(own_input(point), with_kwargs=True))
            else:  # before the lateral's own hook
                handles.append(module.register_forward_hook(own_output(point), prepend=True))
        yield
    finally:
        column.probe = None
        for handle in handles:
            handle.remove()


class _Units:
    """Mean and variance of each unit over samples and places, batch by batch."""

    def __init__(self, features_dim: int) -> None:
        self._dim, self._count = features_dim, 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        rows = _by_unit(features.detach(), self._dim).flatten(0, 1)
        self._count += len(rows)
        self._sum, self._squares = self._sum + rows.sum(0), self._squares + rows.square().sum(0)

    def variance(self) -> Tensor:  # [units] float64
        mean = torch.as_tensor(self._sum / self._count)
        return (torch.as_tensor(self._squares / self._count) - mean.square()).clamp_min(0)


def _by_unit(features: Tensor, features_dim: int) -> Tensor:  # [N, places, units] float64
    return (
        features.movedim(features_dim, -1).flatten(1, -2).double() if features.dim() > 2 else features[:, None].double()
    )


def _logits(outputs: Any) -> Tensor:  # [N, C]
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        raise ValueError(f"outputs must be [N, C] to measure laterals, got {_checks.describe(outputs)}")
    return outputs


def _shares(column: Column, number: int, values: Mapping[Read, float]) -> Tensor:
    table = torch.zeros(len(column.points), number + 1, dtype=torch.float64)
    for (point, source), value in values.items():
        if not math.isfinite(value):
            raise RuntimeError(f"the sensitivity at {column.points[point].path!r} is {value}")
        table[point, source] = value
    return table / table.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
