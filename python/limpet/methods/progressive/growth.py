"""New columns: what a factory makes, put beside earlier columns, with laterals that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.fisher.batches import mapped
from limpet.methods.progressive import points
from limpet.methods.progressive.column import Column
from limpet.methods.progressive.laterals import KINDS, Activation, Lateral, build


@dataclass(frozen=True)
class ColumnMaker:
    """How columns are made; the arguments are those of :class:`limpet.ProgressiveNetwork`."""

    factory: Callable[..., nn.Module]
    lateral: str
    lateral_points: Sequence[str] | None
    activation: Activation
    example: Any

    def __call__(self, arguments: Mapping[str, Any], earlier: Sequence[Column], place: Tensor) -> Column:
        """A column beside earlier ones, which do not change.

        Args:
            arguments: for the factory.
            earlier: the columns before it.
            place: a tensor that lies where the first column is to be, and has its dtype.

        Raises:
            TypeError: the factory gives no module.
            ValueError: it gives a module that an earlier column has or shares parts with, or one whose lateral points
                do not exist or do not fit.
        """
        network = self.factory(**arguments)
        if not isinstance(network, nn.Module):
            raise TypeError(f"column_factory must give a torch.nn.Module, got {_checks.describe(network)}")
        _check_unshared(network, earlier)
        kind = KINDS[self.lateral]
        paths = points.find(network, self.lateral_points, before=kind.reads_input)
        _place(network, earlier, place)
        own = points.measure(network, paths, _beside(self.example, network))
        laterals: dict[int, Lateral] = {}
        for point, ends in enumerate(own):
            sources = {number: c.points[point] for number, c in enumerate(earlier) if point < len(c.points)}
            if sources:
                module = network.get_submodule(ends.path)
                laterals[point] = build(self.lateral, module, ends, sources, self.activation)
        like = next((p for p in network.parameters() if p.is_floating_point()), place)
        for lateral in laterals.values():
            lateral.to(like.device, like.dtype)
        return Column(network, own, laterals, reads_input=kind.reads_input)


def _place(network: nn.Module, earlier: Sequence[Column], place: Tensor) -> None:
    """Move a network to where the first column is, and cast it to the dtype if that has only one."""
    if earlier:
        floats = [p for p in earlier[0].network.parameters() if p.is_floating_point()]
        if floats:
            network.to(floats[0].device, floats[0].dtype if len({p.dtype for p in floats}) == 1 else None)
        return
    if place.device.type != "cpu":  # else the factory may have chosen
        network.to(place.device)
    if place.dtype != torch.float32:
        network.to(place.dtype)


def _check_unshared(network: nn.Module, earlier: Sequence[Column]) -> None:
    """Require that no earlier column has the network or a part of it."""
    for number, column in enumerate(earlier):
        theirs = column.network
        for mine, others, what in (
            (network.named_modules(), theirs.modules(), "module"),
            (network.named_parameters(), theirs.parameters(), "parameter"),
            (network.named_buffers(), theirs.buffers(), "buffer"),
        ):
            known = set(map(id, others))
            for name, part in mine:
                if id(part) in known:
                    shared = f"one that shares the {what} {name!r} with" if name else "that of"
                    raise ValueError(f"column_factory must give a new module each time, got {shared} column {number}")


def _beside(example: Any, network: nn.Module) -> Any:
    """The example where a network is, its floating tensors in the network's dtype."""
    like = next((p for p in network.parameters() if p.is_floating_point()), None)
    if like is None:
        return example
    return mapped(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), example)
