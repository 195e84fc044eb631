"""Models that pick rows by their values: routed experts, packed sequences, tokens selected by a mask.

Which row is whose is established on a few samples and checked on a whole batch. That holds for every batch of the same
shapes, as long as it follows from the shapes. Where values decide (a boolean mask, a sort, ``nonzero``), it is checked
in every batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

_SEARCHES = {
    *(
        "argmax",
        "argmin",
        "argsort",
        "argwhere",
        "kthvalue",
        "msort",
        "nonzero",
        "searchsorted",
        "sort",
        "topk",
        "unique",
    ),
}
_MOVES = {
    *("gather", "index_add", "index_copy", "index_put", "index_select", "masked_scatter", "masked_select"),
    *("repeat_interleave", "scatter", "scatter_add", "scatter_reduce", "take", "take_along_dim", "unique_consecutive"),
    *("_pack_padded_sequence", "_pad_packed_sequence"),
}
_NUMBERS = {"__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"}  # what Python may slice by
_COUNTS = {"bincount", "cumprod", "cumsum", "histc", "multinomial", "one_hot"}  # what dispatch matrices are made of
_NAMES = frozenset(_SEARCHES | _COUNTS | _MOVES | {f"{name}_" for name in _MOVES} | _NUMBERS)
_INDEXING = frozenset({"__getitem__", "__setitem__"})


def picks_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether values may decide which row of the result of this call is whose."""
    name = getattr(func, "__name__", "")
    if name in _INDEXING:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, (Tensor, list)) for i in index)
    return name in _NAMES or (name == "where" and len(args) == 1) or isinstance(func, (OpOverload, OpOverloadPacket))
