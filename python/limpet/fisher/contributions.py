"""What one use of a parameter adds to its sum of squared per-sample gradients.

Uses of one parameter in one forward pass are joined *before* squaring: matrix-shaped ones along the places,
vector-shaped ones by adding their per-sample gradients, which are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from limpet import ops


class Contribution(Protocol):
    """One parameter's use in one batch, samples in front."""

    def add_to(self, total: Tensor) -> None:
        """Add the sum over samples of the squared gradient to ``total`` (the parameter's shape)."""


def joinable(kinds: Sequence[type[Contribution]]) -> bool:
    """Whether uses of these kinds can be added per sample before squaring."""
    return len(set(kinds)) == 1 and hasattr(kinds[0], "join")


def join(uses: Sequence[Any]) -> Contribution:
    """The contribution of several uses of one parameter, all of one joinable kind."""
    return uses[0] if len(uses) == 1 else type(uses[0]).join(uses)


def _places(rows: Tensor) -> Tensor:  # [N, *, C] -> [N, T, C]
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


class Matrix(NamedTuple):
    """A weight ``[O, I]`` used as ``y = x W^T``."""

    output_grad: Tensor  # [N, *, O]
    input: Tensor  # [N, *, I]

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        ops.sum_grad_squared_linear(self.output_grad, self.input, into=total)

    @staticmethod
    def join(uses: Sequence[Matrix]) -> Matrix:  # noqa: D102
        return Matrix(
            torch.cat([_places(use.output_grad) for use in uses], dim=1),
            torch.cat([_places(use.input) for use in uses], dim=1),
        )


class Table(NamedTuple):
    """A table of rows ``[V, E]`` read by index."""

    output_grad: Tensor  # [N, *, E]
    indices: Tensor  # [N, *], int64 or int32
    padding_idx: int | None

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        ops.sum_grad_squared_embedding(
            self.output_grad, self.indices, total.shape[0], padding_idx=self.padding_idx, into=total
        )

    @staticmethod
    def join(uses: Sequence[Table]) -> Table:  # noqa: D102
        return Table(
            torch.cat([_places(use.output_grad) for use in uses], dim=1),
            torch.cat([use.indices.reshape(use.indices.shape[0], -1) for use in uses], dim=1),
            uses[0].padding_idx,
        )


class Vector(NamedTuple):
    """A vector ``[C]`` added (``input`` None) or multiplied along the channels.

    ``gain`` is a constant per channel that multiplies every sample's gradient.
    """

    output_grad: Tensor  # [N, *, C] or [N, C, *]
    input: Tensor | None  # the same shape
    channel_dim: int  # -1 or 1
    gain: Tensor | None = None  # [C]

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        flat, direct = total.view(-1), total.view(-1) if self.gain is None else None
        if self.input is None:
            result = ops.sum_grad_squared_bias(self.output_grad, channel_dim=self.channel_dim, into=direct)
        else:
            result = ops.sum_grad_squared_scale(self.output_grad, self.input, channel_dim=self.channel_dim, into=direct)
        if self.gain is not None:
            flat.addcmul_(result, self.gain.to(result.dtype).square())

    def per_sample(self, dtype: torch.dtype) -> Tensor:  # [N, C]
        """Each sample's own gradient."""
        grad = self.output_grad.to(dtype)
        if self.input is not None:
            grad = grad * self.input
        grad = grad.movedim(self.channel_dim, -1)
        grad = grad.reshape(grad.shape[0], -1, grad.shape[-1]).sum(dim=1)
        return grad if self.gain is None else grad * self.gain

    @staticmethod
    def join(uses: Sequence[Vector]) -> PerSample:  # noqa: D102
        dtype = torch.float64 if uses[0].output_grad.dtype == torch.float64 else torch.float32
        return PerSample(torch.stack([use.per_sample(dtype) for use in uses]).sum(dim=0))


class PerSample(NamedTuple):
    """Per-sample gradients of a vector, already summed over its uses."""

    grad: Tensor  # [N, C]

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        total.view(-1).add_(self.grad.square().sum(dim=0))


class Convolution(NamedTuple):
    """A kernel ``[O, C / groups, *k]``."""

    output_grad: Tensor  # [N, O, *]
    input: Tensor  # [N, C, *]
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        frames = len(self.kernel_size) - (total.dim() - 2)  # 1 where places became a spatial dimension
        ops.sum_grad_squared_conv(
            self.output_grad,
            self.input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            into=total.unsqueeze(2) if frames else total,
        )
