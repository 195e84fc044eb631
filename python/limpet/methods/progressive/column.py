"""One column: a network whose lateral points read earlier columns and keep what later ones read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limpet.fisher.batches import call, tensors
from limpet.methods.progressive.laterals import Lateral
from limpet.methods.progressive.points import Ends, first_input, first_output, same_places, with_first

Features = list[Tensor | None]  # of one column, point by point
Probe = Callable[[int, int, Tensor], Tensor]  # (point, column, features) -> features: what a lateral reads


class _Pass:
    """What a column reads, and keeps, while it runs: set without a module's slow way of setting attributes."""

    def __init__(self) -> None:
        self.earlier: Mapping[int, Features] | None = None
        self.kept: Features = []


class Column(nn.Module):
    """A network and the laterals into it.

    Attributes:
        network: what the factory made.
        laterals: by the number of the point they go into; a point whose laterals were all pruned has none.
        points: the lateral points, in order.
        frozen: whether it has learned its task: its parameters need no gradient, and it stays in evaluation mode.
    """

    def __init__(
        self, network: nn.Module, points: Sequence[Ends], laterals: Mapping[int, Lateral], *, reads_input: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.points = tuple(points)
        self.laterals = nn.ModuleDict({str(point): lateral for point, lateral in laterals.items()})
        self.reads_input = reads_input
        self.frozen = False
        self.probe: Probe | None = None  # sees, and may replace, what is read at a point
        self.passing = _Pass()
        for point, ends in enumerate(points):
            module = network.get_submodule(ends.path)
            module.register_forward_hook(_Point(self, point), with_kwargs=True)

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """What is read: each point with the number of a column."""
        laterals: Iterable[tuple[str, Any]] = self.laterals.items()
        return {(int(point), number) for point, lateral in laterals for number in lateral.columns}

    @property
    def sources(self) -> set[int]:
        """The numbers of the columns that are read."""
        return {number for _, number in self.pairs}

    def prune(self, pairs: set[tuple[int, int]]) -> None:
        """Read some of :attr:`pairs` no more."""
        for point, number in pairs:
            lateral: Lateral = self.laterals[str(point)]  # type: ignore[assignment]
            lateral.prune(number)
            if not lateral.columns:
                del self.laterals[str(point)]

    def freeze(self) -> None:
        """Learn no more."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Column:
        """Training mode, unless the column is frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, inputs: Any, earlier: Mapping[int, Features]) -> tuple[Any, Features]:
        """The network's output, and its own features for later columns.

        Args:
            inputs: what the network is called with, as :func:`limpet.fisher.batches.call` does.
            earlier: the features of each column in :attr:`sources`.
        """
        passing = self.passing
        passing.earlier, passing.kept = earlier, [None] * len(self.points)
        try:
            return call(self.network, inputs), passing.kept
        finally:
            passing.earlier, passing.kept = None, []


class Columns(nn.ModuleList):
    """Columns in the order in which they were added."""

    def __getitem__(self, number: int) -> Column:  # type: ignore[override]
        return super().__getitem__(number)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Column]:
        return super().__iter__()  # type: ignore[return-value]

    def run(self, x: Any, numbers: Iterable[int]) -> tuple[dict[int, Any], dict[int, Features]]:
        """The outputs and features of some columns, and of those that they read: each runs once.

        Frozen ones run without a graph, unless the inputs themselves require a gradient.
        """
        outputs: dict[int, Any] = {}
        features: dict[int, Features] = {}
        with_graph = torch.is_grad_enabled()
        through_frozen = with_graph and any(tensor.requires_grad for tensor in tensors(x))
        for number in self.needed(numbers):
            column = self[number]
            with torch.set_grad_enabled(through_frozen if column.frozen else with_graph):
                outputs[number], features[number] = column(x, features)
        return outputs, features

    def needed(self, numbers: Iterable[int]) -> list[int]:
        """Some columns and all that they read, directly or through others, in order."""
        needed = set(numbers)
        for number in range(max(needed, default=0), 0, -1):
            if number in needed:
                needed |= self[number].sources
        return sorted(needed)


class _Point:
    """A forward hook on one submodule: reads there, and keeps what is read there later."""

    def __init__(self, column: Column, point: int) -> None:
        self.column, self.point, self.key = column, point, str(point)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        column, point = self.column, self.point
        lateral: Any = column.laterals._modules.get(self.key)
        passing = column.passing
        earlier = passing.earlier
        if earlier is None:
            if lateral is None:
                return output  # the network alone; nothing is missing
            raise RuntimeError("a column with laterals runs through its ProgressiveNetwork only")
        if passing.kept[point] is not None:
            raise RuntimeError(f"a lateral point must run once in a forward, {column.points[point].path!r} ran again")
        given, result = first_input(args, kwargs), first_output(output)
        if lateral is not None:
            own = given if column.reads_input else result
            result = lateral(result, [self._read(number, earlier, own) for number in lateral.columns])
        passing.kept[point] = given if column.reads_input else result
        return with_first(output, result)

    def _read(self, number: int, earlier: Mapping[int, Features], own: Tensor) -> Tensor:
        """The features of a column that is read here, their places compared with the column's own."""
        ends, probe = self.column.points[self.point], self.column.probe
        features = earlier[number][self.point]
        if features is None:
            raise RuntimeError(f"lateral point {self.point} of column {number} did not run")
        if not same_places(own, features, ends.features_dim):
            raise ValueError(
                f"columns must have the same places at a lateral point, {ends.path!r} has {list(own.shape)} "
                f"and column {number} {list(features.shape)} there"
            )
        return features if probe is None else probe(self.point, number, features)
