"""The uses of each parameter in one batch: joined per sample, then squared and summed when the last has arrived."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limpet.fisher.contributions import Contribution, Matrix, Normalised, Table, Vector, add_tied, joined
from limpet.fisher.operands import Operand, Region, disjoint
from limpet.fisher.recorder import Key
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved, Split
from limpet.fisher.together import Together

_BYTES = 64 << 20  # of per-sample gradients formed at a time


class Uses:
    """Takes each call's output gradient, in backward; after :meth:`finish` it is ready for a batch of the same calls.

    Args:
        sums: by parameter's name, the sum to add to.
        params: by name.
        computed: the tensors that stand for parameters, by place.
        columns: how many gradients per sample there will be.
    """

    def __init__(
        self, sums: Mapping[str, Tensor], params: Mapping[str, Tensor], computed: Sequence[Tensor], columns: int
    ) -> None:
        self.sums, self._params, self._computed, self._columns = sums, params, computed, columns
        self.splits: dict[Key, Split] = {}
        self._gradients: dict[Operand, list[_Gradient]] = defaultdict(list)
        self._all: list[_Gradient] = []
        self._joined: list[_Gradient] = []  # those of which something may be left when all have arrived
        self.materialised: set[str] = set()  # parameters whose per-sample gradients are formed

    def plan(self, name: str, kinds: Mapping[Operand, list[type[Contribution]]]) -> None:
        """Announce a parameter's uses: by operand, their kinds."""
        for operands in _overlapping(kinds):
            found = [kind for operand in operands for kind in kinds[operand]]
            whole = len(operands) > 1 or operands[0].computed is not None
            if whole or not _fuses(found):
                self.materialised.add(name)
            region = None if whole else operands[0].region
            gradient = _Gradient(
                self.sums, name, region, self._params[name], self._computed, len(found), whole, self._columns
            )
            self._all.append(gradient)
            if not gradient.alone:
                self._joined.append(gradient)
            for operand in operands:
                self._gradients[operand].append(gradient)

    def arrived(self, key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
        """Take one call's output gradient."""
        if call.weight is None and call.bias is None:
            return
        uses = tuple(call.contributions(dy, saved, self.splits[key]))
        if len(uses) == 2 and self._add_both(*uses):
            return
        for operand, contribution in uses:
            for gradient in self._gradients[operand]:
                gradient.take(operand, contribution)

    def alone(self, call: Call) -> tuple[str, str | None] | None:
        """The names of a call's weight and bias, if both are whole parameters that no other use is joined with."""
        if call.weight is None or not all(map(self._is_alone, (call.weight, call.bias))):
            return None
        return call.weight.name, None if call.bias is None else call.bias.name

    def _is_alone(self, operand: Operand | None) -> bool:
        if operand is None:
            return True
        gradients = self._gradients[operand]
        return operand.region is None and operand.computed is None and len(gradients) == 1 and gradients[0].alone

    def _add_both(self, weight: tuple[Operand, Contribution], bias: tuple[Operand, Contribution]) -> bool:
        """Add a layer's two sums in one go, if it is one that allows it and nothing is to be joined before."""
        factor, vector = weight[1], bias[1]
        if (
            not isinstance(factor, (Matrix, Normalised, Vector))
            or not isinstance(vector, Vector)
            or not vector.is_bias_of(factor)
        ):
            return False
        gain = factor.gain if isinstance(factor, Vector) else None
        if isinstance(factor, Vector) and (factor.input is None or gain is None or gain.dim() != 1):
            return False
        gradients = self._gradients[weight[0]], self._gradients[bias[0]]
        if len(gradients[0]) != 1 or len(gradients[1]) != 1:
            return False
        (of_weight,), (of_bias,) = gradients
        if not (of_weight.alone and of_bias.alone):
            return False
        total, bias_total = of_weight.total(), of_bias.total()
        if not (total.is_contiguous() and bias_total.is_contiguous()):  # views of a parameter may have gaps
            return False
        if not isinstance(factor, Vector):
            factor.add_with_bias(total, bias_total)
        elif gain is not None:
            factor.add_squares(of_weight.scaled_later(gain), bias_total.view(-1))
        return True

    def finish(self, last: bool) -> None:
        """Sum what is left of a column of losses, or of the last one: some uses no loss depends on."""
        scaled = [gradient.scaled for gradient in self._all if gradient.scaled is not None]
        if not self._joined and not scaled:
            return
        with torch.no_grad():
            for gradient in self._joined:
                gradient.finish(last)
            if scaled:
                _add_scaled(scaled)
                for gradient in self._all:
                    gradient.scaled = None


class _Gradient:
    """One parameter's gradient, or that of a region of it which no other use overlaps."""

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        name: str,
        region: Region | None,
        param: Tensor,
        computed: Sequence[Tensor],
        count: int,
        whole: bool,
        columns: int,
    ) -> None:
        self._sums, self._name, self._region, self._param, self._computed = sums, name, region, param, computed
        self._count, self._whole, self._columns = count, whole, columns  # whole: of several operands, in param's shape
        self.alone = count == 1 and columns == 1 and not whole  # nearly all: nothing is joined before squaring
        self.scaled: _Scaled | None = None  # still to be added
        self._zeros: Tensor | None = None
        self._parts: list[tuple[Operand, Contribution]] = []
        self._together = Together()

    def take(self, operand: Operand, contribution: Contribution) -> None:
        if self.alone:
            if isinstance(contribution, Vector) and contribution.gain is not None and contribution.gain.dim() == 1:
                contribution.add_squares(self.scaled_later(contribution.gain))
            else:
                contribution.add_to(self.total())
            return
        self._parts.append((operand, contribution))
        if len(self._parts) == self._count and not self._whole:
            self._add()

    def finish(self, last: bool) -> None:
        if self._parts:
            self._add()
        if last:
            self._together.finish(self.total)

    def total(self) -> Tensor:
        """Where the squares are added; looked up at each use, see :class:`limpet.fisher.sums.Running`."""
        total = self._sums[self._name]
        return total if self._region is None else self._region.of(total)

    def scaled_later(self, gain: Tensor) -> Tensor:  # [C] -> [C]
        """Where squares are added that are to be multiplied by the gain's."""
        total = self.total()
        if self._zeros is None:
            self._zeros = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
        self.scaled = _Scaled(total, self._zeros, gain.view(total.shape))
        return self._zeros.view(-1)

    def _add(self) -> None:
        parts, self._parts = self._parts, []
        if self._whole:
            self._add_dense(parts)
            return
        found: list[Any] = [contribution for _, contribution in parts]
        if len(found) > 1:
            found = joined(found)
        if len(found) == 1:
            if self._columns == 1 or not self._together.take(found[0], self.total):
                found[0].add_to(self.total())
        elif {type(one) for one in found} == {Matrix, Table}:
            matrix, table = sorted(found, key=lambda one: isinstance(one, Table))
            add_tied(matrix, table, self.total())
        else:
            self._add_dense(parts)

    def _add_dense(self, parts: list[tuple[Operand, Contribution]]) -> None:
        """Form the per-sample gradients, a few samples at a time."""
        total = self.total()
        samples = parts[0][1].output_grad.shape[0]
        step = max(1, _BYTES // max(1, total.numel() * total.element_size()))
        for start in range(0, samples, step):
            some = slice(start, min(start + step, samples))
            grads = total.new_zeros(some.stop - start, *total.shape)
            computed: dict[int, Tensor] = {}
            for operand, contribution in parts:
                if operand.computed is not None:
                    grad = contribution.per_sample(some, self._computed[operand.computed].shape)
                    before = computed.get(operand.computed)
                    computed[operand.computed] = grad if before is None else before + grad
                elif operand.region is None or not self._whole:
                    grads += contribution.per_sample(some, total.shape)
                else:
                    size, stride, offset = operand.region
                    part = grads.as_strided((len(grads), *size), (total.numel(), *stride), offset)
                    part += contribution.per_sample(some, size)
            for place, grad in computed.items():
                self._pull_back(self._computed[place], grad, grads)
            total += grads.square_().sum(dim=0)

    def _pull_back(self, computed: Tensor, grad: Tensor, into: Tensor) -> None:  # [*], [n, *], [n, *shape]
        for n, one in enumerate(grad):
            (own,) = torch.autograd.grad(
                computed, self._param, one.to(computed.dtype), retain_graph=True, allow_unused=True
            )
            if own is not None:
                into[n] += own.to_dense() if own.layout != torch.strided else own


class _Scaled(NamedTuple):
    """Squares that are added to a total after they were multiplied by the square of a gain."""

    total: Tensor
    squares: Tensor
    gain: Tensor


def _add_scaled(scaled: Sequence[_Scaled]) -> None:
    """Add those of all layers in a few kernels, and leave zeros for the squares of the next batch."""
    totals, squares, gains = map(list, zip(*scaled, strict=True))
    torch._foreach_addcmul_(totals, squares, torch._foreach_mul(gains, gains))
    torch._foreach_zero_(squares)


def _fuses(kinds: Sequence[type[Contribution]]) -> bool:
    """Whether uses of these kinds are joined in less memory than an activation takes."""
    return len(kinds) == 1 or set(kinds) <= {Matrix, Table} or set(kinds) <= {Vector, Normalised}


def _overlapping(operands: Mapping[Operand, object]) -> list[list[Operand]]:
    """Groups of operands that may share elements of the parameter."""
    groups: list[list[Operand]] = []
    for operand in operands:
        touching = [
            group
            for group in groups
            if any(
                operand.computed is not None or o.computed is not None or not disjoint(o.region, operand.region)
                for o in group
            )
        ]
        groups = [group for group in groups if group not in touching]
        groups.append([o for group in touching for o in group] + [operand])
    return groups
