"""Reservoirs that hold equal shares of groups, or weighted items, by keys.

Sorts of fixed size, and nothing that waits for the device: this is what runs on GPUs, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.random import WORD, philox

_KEY = 3  # what a draw is for; reservoirs and samples have 1 and 2
_ONE, _ROOT_HALF, _FRACTION, _INFINITY = 0x3FF0 << 48, 0x3FE6A09E667F3BCD, (1 << 52) - 1, 0x7FF0 << 48
_LN2 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)  # of FreeBSD's log


def exponential(bits: Tensor) -> Tensor:  # int64 [n], 63 bits -> float64 [n]
    """``-log(1 - bits / 2^63)`` from operations that round in one way on every device, so not torch's own logarithm."""
    rest = ((2**63 - 1 - bits).double() + 1.0) * 2.0**-63
    shifted = rest.view(torch.int64) + (_ONE - _ROOT_HALF)
    mantissa = ((shifted & _FRACTION) + _ROOT_HALF).view(torch.float64)
    small = bits < 2**61
    f = torch.where(small, bits.double() * -(2.0**-63), mantissa - 1.0)
    exponent = torch.where(small, 0, (shifted >> 52) - 1023).double()
    half_square, s = 0.5 * f * f, f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (_LOG[0] + w * (_LOG[2] + w * (_LOG[4] + w * _LOG[6])))
    even = w * (_LOG[1] + w * (_LOG[3] + w * _LOG[5]))
    log = s * (half_square + (even + odd)) + exponent * _LN2[1] - half_square + f + exponent * _LN2[0]
    return 0.0 - log


def item_keys(
    items: Tensor,  # int64 [n]
    weight: Tensor | None,  # float64 [n]
    seed: int,
) -> Tensor:  # int64 [n]
    """63 random bits of each item, or the bits of an exponential of rate ``weight``, which are ordered as it is.

    An item of weight 0 comes behind all others, as in the limit of ever smaller weights.
    """
    pairs = items >> 1
    counter = torch.stack([pairs & WORD, pairs >> 32, 0 * pairs, 0 * pairs + (_KEY << 16)], dim=1)
    words = philox(counter, (seed & WORD, seed >> 32))
    high, low = torch.where((items % 2 == 1).unsqueeze(1), words[:, 2:], words[:, :2]).unbind(1)
    bits = (high << 31) | (low >> 1)
    if weight is None:
        return bits
    keys = (exponential(bits) / weight).view(torch.int64)
    return torch.where(weight > 0, keys, _INFINITY + (bits >> 11))


def keyed_order(
    items: Tensor,  # int64 [n], -1 where there is none
    keys: Tensor,  # int64 [n]
    groups: Tensor,  # int64 [n]
) -> Tensor:  # int64 [n]
    """Places of the items ordered by their rank within their group (by key, then number), then by the group's value.

    A keyed reservoir holds the first ones. So every group has as many rows as the others, or all of its items where
    they are fewer; and of each group those with the smallest keys.
    """
    order = items.argsort(stable=True)
    for note in (keys, groups, (items < 0).long()):
        order = order[note[order].argsort(stable=True)]
    place, group = torch.arange(order.numel(), device=order.device), groups[order]
    first = torch.where(group[1:] != group[:-1], place[1:], 0).cummax(0).values  # where each row's group begins
    rank = place - torch.cat([place[:1], first])
    return order[torch.where(items[order] < 0, order.numel(), rank).argsort(stable=True)]


def keyed_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each, written
    items: Tensor,  # int64 [capacity], the number of the item in each slot or -1, written
    keys: Tensor,  # int64 [capacity], written
    groups: Tensor,  # int64 [capacity], written
    seen: Tensor,  # int64 [], raised by count
    batch: Sequence[Tensor],  # [count, *] each
    group: Tensor | None,  # int64 [count]
    weight: Tensor | None,  # float64 [count]
    seed: int,
) -> None:
    """Of the items held and those of the batch, hold the first ones of :func:`keyed_order`.

    What is held already stays in its slot; new items take the slots that become free in their order.
    """
    count, capacity = batch[0].shape[0], items.numel()
    if count == 0:
        return
    numbers = seen + torch.arange(count, device=items.device)
    notes = numbers, item_keys(numbers, weight, seed), torch.zeros_like(numbers) if group is None else group
    order = keyed_order(*(torch.cat(pair) for pair in zip((items, keys, groups), notes, strict=True)))
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:capacity], True)
    some = min(count, capacity)
    slots = (kept[:capacity] & (items >= 0)).long().argsort(stable=True)[:some]  # those that are free first
    rows = (~kept[capacity:]).long().argsort(stable=True)[:some]  # those that come first
    comes = kept[capacity:][rows]
    for old, new in zip((items, keys, groups, *stored), (*notes, *batch), strict=True):
        old[slots] = torch.where(comes.view(-1, *(1,) * (old.dim() - 1)), new[rows], old[slots])
    seen += count
