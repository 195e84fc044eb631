"""What one use of a parameter adds to its sum of squared per-sample gradients.

Uses of one parameter in one forward pass are joined *before* squaring: matrix-shaped ones along the places, others by
adding their per-sample gradients, a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap

from limpet import ops
from limpet.reference import wide


class Contribution(Protocol):
    """One operand's use in one batch, samples in front."""

    @property
    def output_grad(self) -> Tensor:  # [N, *]
        """The gradient at the output of the call."""

    def add_to(self, total: Tensor) -> None:
        """Add the sum over samples of the squared gradient to ``total`` (the operand's shape, any strides)."""

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # [n, *shape]
        """Some samples' own gradients, in float32 (float64 for float64)."""


def _add(total: Tensor, compute: Callable[[Tensor | None], Tensor]) -> None:
    """Let an op add into ``total``, or add its result where the op cannot: it writes contiguous tensors."""
    if total.is_contiguous():
        compute(total)
    else:
        total += compute(None)


def _places(rows: Tensor) -> Tensor:  # [N, *, C] -> [N, T, C]
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


class Matrix(NamedTuple):
    """A weight ``[O, I]`` used as ``y = x W^T``."""

    output_grad: Tensor  # [N, *, O]
    input: Tensor  # [N, *, I]

    def add_with_bias(self, total: Tensor, bias_total: Tensor) -> None:
        """As :meth:`add_to`, and for the bias that is added at the output, in one go; both totals contiguous."""
        ops.sum_grad_squared_linear(self.output_grad, self.input, into=total, bias_into=bias_total)

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        if total.is_contiguous():
            ops.sum_grad_squared_linear(self.output_grad, self.input, into=total)
        else:
            _add(total.t(), lambda into: ops.sum_grad_squared_linear(self.input, self.output_grad, into=into))

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # noqa: D102
        d, x = _places(self.output_grad[samples]), _places(self.input[samples])
        dtype = wide(d.dtype)
        return torch.bmm(d.to(dtype).mT, x.to(dtype)).reshape(-1, *shape)

    @staticmethod
    def join(uses: Sequence[Matrix]) -> Matrix:
        """One use with the places of all."""
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
        rows, pad = total.shape[0], self.padding_idx
        _add(
            total,
            lambda into: ops.sum_grad_squared_embedding(
                self.output_grad, self.indices, rows, padding_idx=pad, into=into
            ),
        )

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # noqa: D102
        d, at = self.rows(samples)
        grads = d.new_zeros(d.shape[0], *shape)
        at = at.unsqueeze(-1).expand_as(d)
        return grads.scatter_add_(1, at, d)

    def rows(self, samples: slice) -> tuple[Tensor, Tensor]:  # [n, T, E], int64 [n, T]
        """The gradients of the rows that were read, and which they were; zero for padding."""
        d, at = _places(self.output_grad[samples]), self.indices[samples].flatten(1).long()
        d = d.to(wide(d.dtype))
        return (d if self.padding_idx is None else d * (at != self.padding_idx).unsqueeze(-1)), at

    @staticmethod
    def join(uses: Sequence[Table]) -> Table:
        """One use with the places of all."""
        if len({use.padding_idx for use in uses}) > 1:  # zeros instead of padding
            uses = [Table(use.rows(slice(None))[0], use.indices, None) for use in uses]
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
    gain: Tensor | None = None  # [C] or []
    shift: Tensor | None = None  # [C], subtracted from the input

    def is_bias_of(self, weight: Matrix | Normalised | Vector) -> bool:
        """Whether it is added to what the weight makes."""
        return (
            self.output_grad is weight.output_grad
            and self.input is None
            and self.gain is None
            and self.channel_dim == (weight.channel_dim if isinstance(weight, Vector) else -1)
        )

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        if self.gain is not None:
            squares, factor = self._sum(None), self.gain.square().to(total.dtype)
            total.addcmul_(squares.view(total.shape), factor.view(total.shape) if factor.dim() else factor)
        elif total.is_contiguous():
            self._sum(total if total.dim() == 1 else total.view(-1))
        else:
            total += self._sum(None).view(total.shape)

    def add_squares(self, into: Tensor, bias_total: Tensor | None = None) -> None:  # [C] each
        """As :meth:`add_to`, without the square of the gain; for the bias beside it, too."""
        self._sum(into, bias_total)

    def _sum(self, into: Tensor | None, bias_total: Tensor | None = None) -> Tensor:  # [C] each
        d, x, dim = self.output_grad, self.input, self.channel_dim
        if x is None:
            return ops.sum_grad_squared_bias(d, channel_dim=dim, into=into)
        return ops.sum_grad_squared_scale(
            d, x.to(d.dtype), shift=self.shift, channel_dim=dim, into=into, bias_into=bias_total
        )

    def _along(self, channels: Tensor) -> Tensor:  # [C] -> broadcasts against the input
        return channels if self.channel_dim == -1 else channels.view(-1, *[1] * (self.output_grad.dim() - 2))

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # noqa: D102
        grad = self.output_grad[samples].to(wide(self.output_grad.dtype))
        if self.input is not None:
            x = self.input[samples].to(grad.dtype)
            grad = grad * (x if self.shift is None else x - self._along(self.shift))
        grad = grad.movedim(self.channel_dim, -1)
        grad = grad.reshape(grad.shape[0], -1, grad.shape[-1]).sum(dim=1)
        return (grad if self.gain is None else grad * self.gain).view(-1, *shape)


class Normalised(NamedTuple):
    """A vector ``[C]`` multiplied along the last dimension of ``(x - mean) rstd``."""

    output_grad: Tensor  # [N, *, C]
    input: Tensor  # [N, *, C]
    mean: Tensor  # [N, *, 1]
    rstd: Tensor  # [N, *, 1]

    def add_with_bias(self, total: Tensor, bias_total: Tensor) -> None:
        """As :meth:`add_to`, and for the bias that is added at the output, in one go; both totals contiguous."""
        ops.sum_grad_squared_norm(*self, into=total.view(-1), bias_into=bias_total.view(-1))

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        if total.is_contiguous():
            ops.sum_grad_squared_norm(*self, into=total.view(-1))
        else:
            total += ops.sum_grad_squared_norm(*self).view(total.shape)

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # noqa: D102
        d, x, mean, rstd = (t[samples] for t in self)
        dtype = wide(d.dtype)
        normalised = (x.to(dtype) - mean).mul_(rstd)
        return Vector(d.to(dtype), normalised, -1).per_sample(slice(None), shape)


class Convolution(NamedTuple):
    """A kernel ``[O, C / groups, *k]``."""

    output_grad: Tensor  # [N, O, *]
    input: Tensor  # [N, C, *]
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    exchanged: bool = False  # a transposed convolution's: the gradient is the input here

    def _geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups

    def _kernel(self) -> list[int]:
        """The shape of the kernel, with a dimension of 1 where places became a spatial dimension."""
        return [self.output_grad.shape[1], self.input.shape[1] // self.groups, *self.kernel_size]

    def add_to(self, total: Tensor) -> None:  # noqa: D102
        squares = total.view(self._kernel()) if total.is_contiguous() else None
        result = ops.sum_grad_squared_conv(self.output_grad, self.input, *self._geometry(), into=squares)
        if squares is None:
            total += result.view(total.shape)

    def per_sample(self, samples: slice, shape: Sequence[int]) -> Tensor:  # noqa: D102
        dtype = wide(self.output_grad.dtype)
        weight = self.output_grad.new_empty(self._kernel(), dtype=dtype)
        _, stride, padding, dilation, groups = self._geometry()

        def one(d: Tensor, x: Tensor) -> Tensor:  # [O, *], [C, *] -> the kernel's shape
            d, x = d.unsqueeze(0), x.unsqueeze(0)
            grads = torch.ops.aten.convolution_backward(
                d, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, (False, True, False)
            )
            return grads[1]

        return vmap(one)(self.output_grad[samples].to(dtype), self.input[samples].to(dtype)).reshape(-1, *shape)


def joined(uses: Sequence[Any]) -> list[Any]:
    """As few contributions to one operand as their kinds can be joined to, before squaring."""
    result: list[Any] = []
    for kind in dict.fromkeys(map(type, uses)):
        same = [use for use in uses if type(use) is kind]
        result += [kind.join(same)] if len(same) > 1 and hasattr(kind, "join") else same
    return result


def add_tied(matrix: Matrix, table: Table, total: Tensor) -> None:  # total [V, E]
    """Add the squares of a table's and a matrix's common gradient: an embedding that is also the output head.

    A sample's gradient is ``M + S``, ``M`` dense and ``S`` zero but for the rows that the sample read. So ``(M + S)^2
    = M^2 + (2 M + S) S``, where the last product is formed for those rows alone: for each place ``t`` that read row
    ``v``, with ``S[v]`` the sum of the places' gradients ``e[t]``, it adds ``(2 M[v] + S[v]) e[t]`` to row ``v``.
    """
    matrix.add_to(total)
    e, at = table.rows(slice(None))  # [N, T, E], [N, T]
    d, h = _places(matrix.output_grad), _places(matrix.input)  # [N, P, V], [N, P, E]
    read = d.gather(2, at.unsqueeze(1).expand(-1, d.shape[1], -1))  # [N, P, T]
    m = torch.bmm(read.to(e.dtype).mT, h.to(e.dtype))  # [N, T, E]
    s = torch.bmm((at.unsqueeze(2) == at.unsqueeze(1)).to(e.dtype), e)  # [N, T, E]
    rows = ((2 * m + s) * e).flatten(0, 1)
    if total.is_cuda:  # where it adds equal rows in order, and index_add_ in any
        total.index_put_((at.flatten(),), rows, accumulate=True)
    else:
        total.index_add_(0, at.flatten(), rows)
