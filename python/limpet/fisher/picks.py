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

_RANGE = 8.0  # the factors run from 2**-8 to 2**8

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

    Each sample's loss is multiplied by a factor of its own, and so must be the gradient of each of its rows.
    """
    samples = losses.shape[0]
    factors = torch.logspace(-_RANGE, _RANGE, samples, base=2.0, dtype=losses.dtype, device=losses.device).unsqueeze(1)
    plain = _row_sizes(losses, torch.ones_like(factors), recorder, splits)
    scaled = _row_sizes(losses, factors, recorder, splits)
    tolerance = min(rounding(losses.dtype), (2.0 ** (2 * _RANGE / (samples - 1)) - 1) / 4)
    wrong = set()
    for key, sizes in plain.items():
        expected = sizes * factors.to(sizes)
        noise = 8 * torch.finfo(losses.dtype).eps * expected.amax() if expected.numel() else 0.0
        if not ((scaled[key] - expected).abs() <= tolerance * expected + noise).all():
            wrong.add(key)
    return wrong


def _row_sizes(
    losses: Tensor,  # [N, K]
    factors: Tensor,  # [N, 1]
    recorder: Recorder,
    splits: Mapping[Key, Split],
) -> dict[Key, Tensor]:  # [N, T] each
    """The sum of magnitudes of each row's output gradient, samples in front."""
    sizes: dict[Key, Tensor] = {}

    def note(key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
        if key in splits:
            rows = dy.abs().flatten(call.lead).sum(dim=-1, dtype=torch.float64) if dy.dim() > call.lead else dy.abs()
            sizes[key] = splits[key](rows).reshape(losses.shape[0], -1)

    on_backward, recorder.on_backward = recorder.on_backward, note
    try:
        gradients(losses, recorder.anchor, factors.expand_as(losses), retain_graph=True)
    finally:
        recorder.on_backward = on_backward
    return sizes
