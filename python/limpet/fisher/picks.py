"""Models that pick rows by their values: routed experts, packed sequences, tokens selected by a mask.

Which row is whose is established on a few samples. That holds for every batch as long as it follows from the shapes
alone. Where values decide (a boolean mask, a sort, ``nonzero``), :func:`misplaced` checks it in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from limpet.fisher.layout import rounding
from limpet.fisher.precision import gradients
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved, Split

if TYPE_CHECKING:  # the recorder asks picks_rows
    from limpet.fisher.recorder import Key, Recorder

_SEARCHES = {"argsort", "argwhere", "kthvalue", "msort", "nonzero", "searchsorted", "sort", "topk", "unique"}
_MOVES = {
    *("gather", "index_add", "index_copy", "index_put", "index_select", "masked_scatter", "masked_select"),
    *("repeat_interleave", "scatter", "scatter_add", "scatter_reduce", "take", "take_along_dim", "unique_consecutive"),
    *("_pack_padded_sequence", "_pad_packed_sequence"),
}
_NUMBERS = {"__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"}  # what Python may slice by
_NAMES = frozenset(_SEARCHES | _MOVES | {f"{name}_" for name in _MOVES} | _NUMBERS)
_INDEXING = frozenset({"__getitem__", "__setitem__"})


def picks_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether values may decide which row of the result of this call is whose."""
    name = getattr(func, "__name__", "")
    if name in _INDEXING:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, (Tensor, list)) for i in index)
    return name in _NAMES or (name == "where" and len(args) == 1) or isinstance(func, (OpOverload, OpOverloadPacket))


def misplaced(
    losses: Tensor,  # [N, K]
    recorder: Recorder,
    splits: Mapping[Key, Split],
) -> set[Key]:
    """The calls in which a row's gradient does not come from the sample that its split says, and from it alone.

    Each sample's losses are multiplied by a factor of its own, and then by another: the gradient of each of its rows
    must follow. The factors are powers of two, which change no rounding; no two samples have the same ratio of factors
    in all of the pairs of passes, of which up to 200 samples need one.
    """
    most = 4 if losses.dtype == torch.float16 else 50
    ratios = 4 * most + 1  # of 2**first and 2**second with both exponents in -most..most
    wrong: set[Key] = set()
    digits = torch.arange(losses.shape[0], device=losses.device)
    while True:
        ratio = digits % ratios - 2 * most
        first = ratio.clamp(-most, most)
        second = first - ratio
        sizes = [_row_sizes(losses, exponents, recorder, splits) for exponents in (first, second)]
        for key, before in sizes[0].items():
            after = sizes[1][key]
            if not ((before - after).abs() <= rounding(losses.dtype) * torch.maximum(before, after)).all():
                wrong.add(key)
        digits = digits // ratios
        if not digits.any():
            return wrong


def _row_sizes(
    losses: Tensor,  # [N, K]
    exponents: Tensor,  # int64 [N]
    recorder: Recorder,
    splits: Mapping[Key, Split],
) -> dict[Key, Tensor]:  # [N, T] each
    """The sum of magnitudes of each row's output gradient, samples in front, with each sample's factor taken out."""
    sizes: dict[Key, Tensor] = {}
    factors = torch.ldexp(losses.new_ones(()), exponents).unsqueeze(1)

    def note(key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
        if key in splits:
            rows = dy.abs().flatten(call.lead).sum(dim=-1, dtype=torch.float64) if dy.dim() > call.lead else dy.abs()
            sizes[key] = splits[key](rows).reshape(losses.shape[0], -1).double() / factors.double()

    on_backward, recorder.on_backward = recorder.on_backward, note
    try:
        gradients(losses, recorder.anchor, factors.expand_as(losses), retain_graph=True)
    finally:
        recorder.on_backward = on_backward
    return sizes
