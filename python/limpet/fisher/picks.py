"""The values by which models pick rows: routed experts, packed sequences, tokens selected by a mask.

Which row is whose is established on a few samples and checked on a whole batch. That holds for every batch of the same
shapes, as long as it follows from the shapes. Where values decide (a boolean mask, a sort, ``nonzero``), it holds for
batches in which those values are the same, too: constant positions are checked once, a router in every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

_SEARCHES = (
    *("argmax", "argmin", "argsort", "argwhere", "kthvalue", "msort", "nonzero", "searchsorted", "sort", "topk"),
    *("unique", "unique_consecutive"),
)
_MOVES = (
    *("gather", "index_add", "index_copy", "index_put", "index_select", "masked_scatter", "masked_select"),
    *("repeat_interleave", "scatter", "scatter_add", "scatter_reduce", "take", "take_along_dim"),
    *("_pack_padded_sequence", "_pad_packed_sequence"),
)
_COUNTS = ("bincount", "histc", "multinomial")
_NUMBERS = ("__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist")  # what Python may decide by
_INDEXING = frozenset({"__getitem__", "__setitem__"})
_MOVING = frozenset({*_MOVES, *(f"{name}_" for name in _MOVES), *_INDEXING})
_NAMES = frozenset({*_MOVING, *_SEARCHES, *_COUNTS, *_NUMBERS}) - _INDEXING
_unlike = count()  # numbers that stand for values which nothing is known of


def deciding_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> object | None:
    """What identifies the values by which a call may decide which row is whose; None if it cannot.

    They are integers, truth values and Python's numbers, as arguments or as the result; without any, what is equal to
    nothing else. What is moved by an index says nothing of where to: a padding mask may differ in each batch.
    """
    if not _picks_rows(func, args):
        return None
    moves = len(args) > 1 and func.__name__ in _MOVING
    values = tuple(_values((*(args[1:] if moves else args), *kwargs.values(), None if moves else result)))
    return values or _unknown()


def may_pick(func: Any) -> bool:
    """Whether some calls of a function pick rows."""
    name = getattr(func, "__name__", "")
    return name in _NAMES or name in _INDEXING or name == "where" or isinstance(func, (OpOverload, OpOverloadPacket))


def _picks_rows(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if name in _INDEXING:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, (Tensor, list)) for i in index)
    return name in _NAMES or (name == "where" and len(args) == 1) or isinstance(func, (OpOverload, OpOverloadPacket))


def _values(tree: Any) -> Iterator[object]:
    if isinstance(tree, Tensor):
        if not tree.is_floating_point() and not tree.is_complex():
            yield (tree.shape, _bytes(tree))
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _values(part)
    elif isinstance(tree, (bool, int, float)):
        yield tree
    elif not isinstance(tree, (str, slice, torch.dtype, torch.device, type(None), type(...))):
        yield _unknown()


def _unknown() -> object:
    return ("unknown", next(_unlike))


def _bytes(tensor: Tensor) -> object:
    try:
        return hash(tensor.detach().cpu().numpy().tobytes())
    except RuntimeError:  # inside a transform of torch.func
        return _unknown()
