"""What crosses from earlier columns into one lateral point of a new one: adapters, gates and sums.

All of them work on features that come last, ``[N, *, D]``, or on images, ``[N, C, *]``, where a matrix becomes a
convolution with a kernel of 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from limpet import ops
from limpet.methods.progressive.points import Ends

Activation = Callable[[Tensor], Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FIRST_ALPHA = 0.1  # scalars begin uniform below it
_FIRST_GATE_BIAS = 2.0  # sigmoid(2) = 0.88: a column begins with its own features


class Lateral(nn.Module, ABC):
    """Brings the features of earlier columns into a point's output.

    Attributes:
        sources: what is done with each earlier column's features; its keys are the columns' numbers.
        columns: the numbers of the columns that are read.
    """

    reads_input: bool  # whether features are what goes into the point in the earlier columns, or what comes out there

    def __init__(self, sources: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.sources = nn.ModuleDict({str(number): source for number, source in sources.items()})
        self.columns = list(sources)

    def prune(self, column: int) -> None:
        """Read a column no more."""
        del self.sources[str(column)]
        self.columns.remove(column)

    @abstractmethod
    def forward(self, output: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The point's output with what crosses over; ``features`` are those of :attr:`columns`, in their order."""


class Adapter(Lateral):
    """``output + U f(sum_j V_j (alpha_j h_j))`` (Rusu et al. 2016, eq. 2), with ``h_j`` what goes into the point.

    V's rows are as many as the column's own inputs there. ``U`` of a convolution is one of the same kernel and stride.
    By linearity the scalar is multiplied where there is less: ``alpha_j (V_j h_j)``, whose gradient needs no product
    with ``V``.
    """

    reads_input = True

    def __init__(self, module: nn.Module, own: Ends, sources: Mapping[int, Ends], activation: Activation) -> None:
        super().__init__(
            {number: _Scaled(_projection(own, ends.inputs, own.inputs)) for number, ends in sources.items()}
        )
        self.up = _up(module, own)
        self.activation = activation

    def forward(self, output: Tensor, features: Sequence[Tensor]) -> Tensor:
        """All projections, summed; f; up."""
        hidden: Any = None  # a lateral has one source at least
        for source, read in zip(self.sources.values(), features, strict=True):
            hidden = source(read, hidden)
        up: Tensor = self.up(self.activation(hidden))
        return output + up


class Gated(Lateral):
    """``y <- y * g_j + h_j * (1 - g_j)``, ``g_j = sigmoid(h_j W_j^T + b_j)``, one column after the other.

    ``h_j`` is what comes out of the point in the earlier column, projected where it has another width. (A variant of
    our own: the published lateral has no gate.)
    """

    reads_input = False

    def __init__(self, module: nn.Module, own: Ends, sources: Mapping[int, Ends], activation: Activation) -> None:
        super().__init__({number: _Gate(own, ends.outputs) for number, ends in sources.items()})

    def forward(self, output: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Gate after gate."""
        for source, read in zip(self.sources.values(), features, strict=True):
            output = source(output, read)
        return output


class Summed(Lateral):
    """``output + sum_j h_j``, with ``h_j`` what comes out of the point, projected where it has another width."""

    reads_input = False

    def __init__(self, module: nn.Module, own: Ends, sources: Mapping[int, Ends], activation: Activation) -> None:
        super().__init__({number: _to_width(own, ends.outputs) for number, ends in sources.items()})

    def forward(self, output: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Sum."""
        crossed: list[Tensor] = [source(read) for source, read in zip(self.sources.values(), features, strict=True)]
        total = output + crossed[0]
        for more in crossed[1:]:
            total += more  # in its own memory
        return total


KINDS: dict[str, type[Adapter] | type[Gated] | type[Summed]] = {"adapter": Adapter, "gated": Gated, "sum": Summed}


class _Scaled(nn.Module):
    """``alpha V h``, added to what there is."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(()) * _FIRST_ALPHA)
        self.projection = projection

    def forward(self, features: Tensor, onto: Tensor | None) -> Tensor:
        projected: Tensor = self.projection(features)
        return projected * self.alpha if onto is None else torch.addcmul(onto, projected, self.alpha)


class _Gate(nn.Module):
    """One column's gate."""

    def __init__(self, own: Ends, width: int) -> None:
        super().__init__()
        self.features_dim = own.features_dim
        self.projection = _to_width(own, width)
        linear = nn.Linear(own.outputs, own.outputs)
        self.weight, self.bias = linear.weight, nn.Parameter(torch.full_like(linear.bias, _FIRST_GATE_BIAS))

    def forward(self, output: Tensor, features: Tensor) -> Tensor:
        features = self.projection(features)
        weight, bias = self.weight.to(output.dtype), self.bias.to(output.dtype)  # autocast leaves the op alone
        return ops.gated_lateral(output, features.to(output.dtype), weight, bias, channel_dim=self.features_dim)


def _projection(ends: Ends, inputs: int, outputs: int, stride: int | tuple[int, ...] = 1) -> nn.Module:
    """A matrix over the features, without bias."""
    if ends.features_dim == -1:
        return nn.Linear(inputs, outputs, bias=False)
    return _CONVOLUTIONS[ends.num_spatial - 1](inputs, outputs, 1, stride=stride, bias=False)  # type: ignore[arg-type]


def _to_width(own: Ends, width: int) -> nn.Module:
    """The features as they are where they have the point's width, else projected."""
    return nn.Identity() if width == own.outputs else _projection(own, width, own.outputs)


def _up(module: nn.Module, own: Ends) -> nn.Module:
    """From as many features as go into a point to what comes out of it, at its places."""
    if isinstance(module, _ConvNd):
        return _CONVOLUTIONS[own.num_spatial - 1](
            own.inputs,
            own.outputs,
            module.kernel_size,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
            padding=module.padding,  # type: ignore[arg-type]
            dilation=module.dilation,  # type: ignore[arg-type]
            groups=module.groups,
            bias=False,
            padding_mode=module.padding_mode,
        )
    if own.input_places == own.output_places:
        return _projection(own, own.inputs, own.outputs)
    before, after = own.input_places or (), own.output_places or ()
    strides = tuple(-(-m // n) for m, n in zip(before, after, strict=True))  # a block that makes images smaller
    if own.features_dim == -1 or any((m - 1) // s + 1 != n for m, s, n in zip(before, strides, after, strict=True)):
        raise ValueError(
            f"a lateral point must keep its places or be strided over an image, {own.path!r} makes {list(after)} "
            f"of {list(before)}"
        )
    return _projection(own, own.inputs, own.outputs, strides)


def build(kind: str, module: nn.Module, own: Ends, sources: Mapping[int, Ends], activation: Activation) -> Lateral:
    """The lateral into one point, from the same point of earlier columns.

    Raises:
        ValueError: their shapes do not fit.
    """
    lateral = KINDS[kind]
    for number, ends in sources.items():
        here, there = (
            (e.features_dim, e.num_spatial, e.input_places if lateral.reads_input else e.output_places)
            for e in (own, ends)
        )
        if here[:2] != there[:2] or (None not in (here[2], there[2]) and here[2] != there[2]):
            raise ValueError(
                f"columns must have the same places at a lateral point, {own.path!r} of the new column and "
                f"{ends.path!r} of column {number} have {_places(own, lateral)} and {_places(ends, lateral)}"
            )
    return lateral(module, own, sources, activation)


def _places(ends: Ends, lateral: type[Lateral]) -> str:
    places = ends.input_places if lateral.reads_input else ends.output_places
    layout = "[N, *, D]" if ends.features_dim == -1 else f"[N, C{', *' * ends.num_spatial}]"
    return layout if places is None else f"{layout} with {list(places)}"
