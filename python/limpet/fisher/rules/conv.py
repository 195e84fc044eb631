"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.contributions import Contribution, Convolution, Vector
from limpet.fisher.operands import Operand
from limpet.fisher.rules.base import Call, Find, Match, Names, Rule, Saved, Split, tracked
from limpet.ops.conv_input_grad import conv_input_grad, is_faster, is_plain

Sizes = int | Sequence[int]

_PLACES = 64  # from which on products sample by sample are faster than a convolution (0.75 to 1.4 at 7 x 7)


class Conv(Call):
    """A convolution, or a transposed one: the same contraction with input and output gradient exchanged."""

    weight_kind, bias_kind = Convolution, Vector
    autocast = True
    repeatable = True
    w: Tensor

    def __init__(
        self,
        names: Names,
        weight: Tensor,  # [O, C / groups, *k]; transposed [C, O / groups, *k]
        bias: Tensor | None,  # [O]
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        output_padding: list[int],
        groups: int,
        transposed: bool,
    ) -> None:
        super().__init__(names, 1, weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.output_padding, self.transposed = output_padding, transposed

    @property
    def function(self) -> str:  # type: ignore[override]
        """``conv`` or ``conv_transpose``."""
        return "conv_transpose" if self.transposed else "conv"

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        y = torch.convolution(
            x,
            self.w,
            self.b,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return y, (x,)

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        (x,) = saved
        if not self.transposed and self.groups == 1 and is_plain(dy, x, self.w):
            points = set(self.w.shape[2:]) == {1} and not any(self.padding)
            if points and (max(self.stride) > 1 or dy.shape[2:].numel() >= _PLACES):
                return self._input_grad_of_points(dy, x)
            if is_faster(dy, x, self.w, self.stride, self.padding, self.dilation):
                return conv_input_grad(dy, self.w, x.shape[2:], self.stride, self.padding)
        return torch.ops.aten.convolution_backward(
            dy, x, self.w, None, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups, (True, False, False),
        )[0]  # fmt: skip

    def _input_grad_of_points(self, dy: Tensor, x: Tensor) -> Tensor:
        """Of a kernel of one element: a product, for which torch's convolutions take 1.1 to 4 times as long."""
        w = self.w.flatten(1).t().expand(len(dy), -1, -1)  # matmul would turn dy round first
        product = torch.bmm(w, dy.flatten(2)).view(*x.shape[:2], *dy.shape[2:])
        if max(self.stride) == 1:
            return product
        dx = torch.zeros_like(x)
        seen = tuple(slice(None, None, step) for step in (1, 1, *self.stride))
        dx[seen] = product
        return dx

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        rows = split(dy)
        if self.weight is not None:
            x = split(saved[0])
            yield self.weight, self._kernel(x, rows) if self.transposed else self._kernel(rows, x)
        if self.bias is not None:
            yield self.bias, Vector(rows if rows.dim() == dy.dim() else rows.movedim(1, 2), None, 1)

    def _kernel(self, d: Tensor, x: Tensor) -> Convolution:  # [N, O, *], [N, C, *], or with places [N, T, ...]
        """The contraction of the kernel's gradient; places (frames) become a spatial dimension, of which three are."""
        one: list[int] = []
        zero: list[int] = []
        padding = self.padding
        if d.dim() > self.w.dim() and d.shape[1] == 1:
            d, x = d.squeeze(1), x.squeeze(1)
        elif d.dim() > self.w.dim() and d.dim() < 6:
            d, x, one, zero = d.movedim(1, 2), x.movedim(1, 2), [1], [0]
        elif d.dim() == 6:
            d, x = self._one_depth(d, x)
            padding = [0, *padding[1:]]
        return Convolution(
            output_grad=d,
            input=x,
            kernel_size=one + list(self.w.shape[2:]),
            stride=one + self.stride,
            padding=zero + padding,
            dilation=one + self.dilation,
            groups=self.groups,
            exchanged=self.transposed,
        )

    def _one_depth(self, d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lay volumes one behind another, ``[N, T, C, D, H, W]`` as ``[N, C, T D, H, W]``, each with its padding.

        What would be computed between two of them has no gradient.
        """
        stride, padding, reach = self.stride[0], self.padding[0], self.dilation[0] * (self.w.shape[2] - 1)
        steps = -(-(x.shape[3] + 2 * padding) // stride)  # of each volume
        x = F.pad(x, (0, 0, 0, 0, padding, steps * stride - x.shape[3] - padding)).movedim(1, 2).flatten(2, 3)
        d = F.pad(d, (0, 0, 0, 0, 0, steps - d.shape[3])).movedim(1, 2).flatten(2, 3)
        return d[:, :, : (x.shape[2] - reach - 1) // stride + 1], x


def _conv(dims: int, transposed: bool) -> Rule:
    def sizes(value: Sizes) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    def build(
        find: Find,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sizes,
        padding: Sizes | str,
        output_padding: Sizes,
        dilation: Sizes,
        groups: int,
    ) -> Match | None:
        found = tracked(find, weight, bias)
        if found is None or input.dim() != dims + 2 or weight.dim() != dims + 2:
            return None
        dilations = sizes(dilation)
        if isinstance(padding, str):
            input, pads = _string_padding(padding, input, weight.shape[2:], dilations)
        else:
            pads = sizes(padding)
        call = Conv(found, weight, bias, sizes(stride), pads, dilations, sizes(output_padding), groups, transposed)
        return Match(input, call)

    def conv(
        find: Find,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Match | None:
        return build(find, input, weight, bias, stride, padding, 0, dilation, groups)

    def conv_transpose(
        find: Find,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Match | None:
        return build(find, input, weight, bias, stride, padding, output_padding, dilation, groups)

    return conv_transpose if transposed else conv


def _string_padding(
    padding: str, input: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """``"valid"`` and ``"same"`` as numbers; what ``"same"`` needs more on the right is padded to the input."""
    if padding == "valid":
        return input, [0] * len(kernel_size)
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
    return input, [t // 2 for t in total]


RULES: dict[object, Rule] = {
    F.conv1d: _conv(1, transposed=False),
    F.conv2d: _conv(2, transposed=False),
    F.conv3d: _conv(3, transposed=False),
    F.conv_transpose1d: _conv(1, transposed=True),
    F.conv_transpose2d: _conv(2, transposed=True),
    F.conv_transpose3d: _conv(3, transposed=True),
}
