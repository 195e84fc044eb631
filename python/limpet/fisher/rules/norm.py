"""Normalisation layers, whose samples do not interact, and PReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.contributions import Contribution, Normalised, Vector
from limpet.fisher.operands import Operand
from limpet.fisher.rules.base import Call, Find, Match, Names, Rule, Saved, Split, tracked
from limpet.ops.batch_norm_grads import batch_norm_grads, is_plain
from limpet.reference import wide


class _Norm(Call):
    """``y = xhat * w + b``; subclasses say what ``xhat`` is."""

    weight_kind: type[Contribution] = Vector
    bias_kind = Vector
    autocast: ClassVar[bool | None] = False
    repeatable = True

    def __init__(self, names: Names, lead: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__(names, lead, weight, bias)
        self.eps = eps


# --- over the last dimensions -------------------------------------------------------------------------------


class LayerNorm(_Norm):
    """Mean and variance over the last dimensions, of the weight's shape."""

    function = "layer_norm"
    weight_kind: type[Contribution] = Normalised

    def __init__(
        self,
        names: Names,
        lead: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        shape: list[int],
    ) -> None:
        super().__init__(names, lead, weight, bias, eps)
        self.shape = shape

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        y, mean, rstd = torch.native_layer_norm(x, self.shape, self.w, self.b, self.eps)
        return y, (x, mean, rstd)

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        return torch.ops.aten.native_layer_norm_backward(
            dy, saved[0], self.shape, *saved[1:], self.w, self.b, (True, False, False)
        )[0]

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        d = split(dy.flatten(self.lead))
        if self.weight is not None:
            yield self.weight, self.factor(d, saved, split)
        if self.bias is not None:
            yield self.bias, Vector(d, None, -1)

    def factor(self, d: Tensor, saved: Saved, split: Split) -> Contribution:  # [N, *, C]
        """The weight's contribution."""
        x, mean, rstd = (split(value.flatten(self.lead)) for value in saved)
        dtype = wide(x.dtype)
        return Normalised(d, x, mean.to(dtype), rstd.to(dtype))


class RMSNorm(LayerNorm):
    """Root of the mean square over the last dimensions."""

    function = "rms_norm"
    weight_kind = Vector

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        return F.rms_norm(x, self.shape, self.w, self.eps), (x,)

    def factor(self, d: Tensor, saved: Saved, split: Split) -> Contribution:  # noqa: D102
        x = saved[0].to(wide(saved[0].dtype))
        xhat = x * self._rstd(x)
        return Vector(d.to(xhat.dtype), split(xhat.flatten(self.lead)), -1)

    def _rstd(self, x: Tensor) -> Tensor:  # [*lead, *shape] -> [*lead, 1...]
        return torch.rsqrt(x.square().mean(dim=self._dims(), keepdim=True) + self.eps)

    def _dims(self) -> list[int]:
        return list(range(-len(self.shape), 0))

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        x = saved[0].to(wide(dy.dtype))
        rstd = self._rstd(x)
        xhat = x * rstd
        g = dy if self.w is None else dy * self.w
        return ((g - xhat * (g * xhat).mean(dim=self._dims(), keepdim=True)) * rstd).to(dy.dtype)


def layer_norm(
    find: Find,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Match | None:
    """``F.layer_norm`` and ``torch.layer_norm``."""
    found = tracked(find, weight, bias)
    if found is None:
        return None
    shape = list(normalized_shape)
    return Match(input, LayerNorm(found, input.dim() - len(shape), weight, bias, eps, shape))


def rms_norm(
    find: Find,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Match | None:
    """``F.rms_norm`` and ``torch.rms_norm``."""
    found = tracked(find, weight, None)
    if found is None:
        return None
    shape = list(normalized_shape)
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    return Match(input, RMSNorm(found, input.dim() - len(shape), weight, None, epsilon, shape))


# --- over channels ------------------------------------------------------------------------------------------


def channels(rows: Tensor, dims: int) -> Tensor:  # [N, C, *] or [N, T, C, *] -> [N, C, *]
    """Put the channels behind the samples, and the places, where there are any, behind the channels."""
    return rows if rows.dim() == dims else rows.movedim(1, 2)


_Deviations = tuple[Tensor, Tensor]  # [C] each: 1 / standard deviation, and its product with the weight


def _deviations(calls: Sequence[BatchNorm]) -> list[_Deviations]:
    """Those of several layers, in a few kernels for all; each layer keeps its own."""
    with torch.no_grad():
        rstds = torch._foreach_add([call.var for call in calls], [call.eps for call in calls])
        torch._foreach_pow_(rstds, -0.5)
        with_weight = [(rstd, call.w) for call, rstd in zip(calls, rstds, strict=True) if call.w is not None]
        products = iter(torch._foreach_mul(*map(list, zip(*with_weight, strict=True))) if with_weight else ())
    found = [(rstd, rstd if call.w is None else next(products)) for call, rstd in zip(calls, rstds, strict=True)]
    for call, own in zip(calls, found, strict=True):
        call.known = own
    return found


class BatchNorm(_Norm):
    """Batch normalisation by running statistics: a fixed factor and shift per channel."""

    function = "batch_norm"
    autocast = None  # statistics and parameters meet narrow activations as they are

    def __init__(
        self, names: Names, weight: Tensor | None, bias: Tensor | None, eps: float, mean: Tensor, var: Tensor
    ) -> None:
        super().__init__(names, 1, weight, bias, eps)
        self.mean, self.var = mean, var  # [C]
        self.known: _Deviations | None = None
        self._leads_on = False  # whether a gradient at the input will be asked for
        self._scaled: tuple[Tensor, Tensor] | None = None  # an output's gradient, and the input's that goes with it

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        self.known, self._leads_on = None, x.requires_grad
        y = F.batch_norm(x, self.mean, self.var, self.w, self.b, training=False, momentum=0.0, eps=self.eps)
        return y, (x,) if self.weight is not None else ()

    def preparation(self) -> Callable[[Sequence[Any]], object]:  # noqa: D102
        return _deviations

    def _rstd_and_factor(self) -> _Deviations:
        return self.known or _deviations([self])[0]

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        scaled, self._scaled = self._scaled, None
        if scaled is not None and scaled[0] is dy:
            return scaled[1]
        factor = self._rstd_and_factor()[1].view(-1, *[1] * (dy.dim() - 2))
        if factor.dtype == dy.dtype:
            return dy * factor
        return torch.mul(dy, factor, out=torch.empty_like(dy))  # rounded once, and never whole in another dtype

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        rstd, factor = self._rstd_and_factor()
        x = saved[0] if self.weight is not None else None
        if self._leads_on and is_plain(dy, x, self.mean, factor):
            dx, of_weight, of_bias = batch_norm_grads(dy, x, self.mean, factor)
            self._scaled = dy, dx
            if self.weight is not None and of_weight is not None:
                yield self.weight, Vector(split(of_weight), None, -1, rstd)
            if self.bias is not None:
                yield self.bias, Vector(split(of_bias), None, -1)
            return
        d = channels(split(dy), dy.dim())
        if x is not None and self.weight is not None:
            x = channels(split(x), dy.dim())
            yield self.weight, Vector(d, x, 1, rstd, self.mean.to(wide(dy.dtype)))
        if self.bias is not None:
            yield self.bias, Vector(d, None, 1)


def batch_norm(
    find: Find,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Match | None:
    """``F.batch_norm`` and ``torch.batch_norm``; the statistics of a batch make its samples interact."""
    if training or running_mean is None or running_var is None:
        raise RuntimeError(
            "batch_norm with the statistics of the batch makes samples interact: call model.eval() first"
        )
    found = tracked(find, weight, bias)
    if found is None or running_mean.requires_grad or running_var.requires_grad:
        return None
    return Match(input, BatchNorm(found, weight, bias, eps, running_mean, running_var))


class GroupNorm(_Norm):
    """Mean and variance over groups of channels of each sample."""

    function = "group_norm"

    def __init__(self, names: Names, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int) -> None:
        super().__init__(names, 1, weight, bias, eps)
        self.groups = groups

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2:].numel(), self.groups

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        x = x.contiguous()
        y, mean, rstd = torch.native_group_norm(x, self.w, self.b, *self._sizes(x), self.eps)
        return y, (x, mean, rstd)

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        return torch.ops.aten.native_group_norm_backward(
            dy.contiguous(), *saved, self.w, *self._sizes(saved[0]), (True, False, False)
        )[0]

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        d = channels(split(dy), dy.dim())
        if self.weight is not None:
            x, mean, rstd = saved  # [N, C, *], [N, G], [N, G]
            grouped = x.to(wide(x.dtype)).reshape(x.shape[0], self.groups, -1)
            xhat = (grouped - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1)).view(x.shape)
            yield self.weight, Vector(d.to(xhat.dtype), channels(split(xhat), dy.dim()), 1)
        if self.bias is not None:
            yield self.bias, Vector(d, None, 1)


def group_norm(
    find: Find,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Match | None:
    """``F.group_norm`` and ``torch.group_norm``."""
    found = tracked(find, weight, bias)
    return None if found is None else Match(input, GroupNorm(found, weight, bias, eps, num_groups))


def instance_norm(
    find: Find,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Match | None:
    """``F.instance_norm``: a group per channel, or with running statistics what batch normalisation does."""
    if not use_input_stats:
        return batch_norm(find, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise RuntimeError("instance_norm would update its running statistics: call model.eval() first")
    return group_norm(find, input, input.shape[1], weight, bias, eps)


# --- PReLU --------------------------------------------------------------------------------------------------


class PReLU(Call):
    """``max(x, 0) + w min(x, 0)``, one ``w`` or one per channel."""

    function = "prelu"
    weight_kind = Vector
    repeatable = True
    w: Tensor

    def __init__(self, name: Operand, lead: int, weight: Tensor) -> None:  # [1] or [C]
        super().__init__((name, None), lead, weight, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:  # noqa: D102
        return torch.prelu(x, self.w), (x,)

    def input_grad(self, dy: Tensor, saved: Saved) -> Tensor:  # noqa: D102
        w = self.w if self.w.numel() == 1 else self.w.view(-1, *[1] * (dy.dim() - 2))
        return torch.where(saved[0] > 0, dy, dy * w)

    def contributions(self, dy: Tensor, saved: Saved, split: Split) -> Iterator[tuple[Operand, Contribution]]:  # noqa: D102
        if self.weight is None:
            return
        d, x = split(dy), split(saved[0].clamp(max=0))
        if self.w.numel() == 1:
            yield self.weight, Vector(d.reshape(d.shape[0], -1, 1), x.reshape(d.shape[0], -1, 1), -1)
        else:
            yield self.weight, Vector(channels(d, dy.dim()), channels(x, dy.dim()), 1)


def prelu(find: Find, input: Tensor, weight: Tensor) -> Match | None:
    """``F.prelu``."""
    name = find(weight)
    if name is None or input.dim() == 0 or (weight.numel() > 1 and input.dim() < 2):
        return None
    return Match(input, PReLU(name, input.dim() if weight.numel() == 1 else 1, weight))


RULES: dict[object, Rule] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: batch_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: instance_norm,
    F.prelu: prelu,
}
