"""How a regularizer holds its anchors and importances: as floats, or packed in fewer bytes (docs/narrow.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, reference
from limpet.methods.shards import is_sharded
from limpet.ops.narrow import (
    PACKED_ANCHORS,
    PACKED_DTYPES,
    PACKED_IMPORTANCES,
    moved_at_random,
    pack_piece_,
    packed_size,
    steps,
    unpack_piece,
)
from limpet.reference import wide

IMPORTANCE_FORMATS = ("float32", "bfloat16", *PACKED_IMPORTANCES.values())
ANCHOR_FORMATS = ("float32", *PACKED_ANCHORS.values())  # a bfloat16 pulls to the wrong place

NARROW_KEYS = frozenset({"importance_format", "anchor_format", "shapes"})  # of a state whose formats are narrow
_PIECE = 128 * reference.NARROW_BLOCK  # elements that are unpacked at a time: some ten megabytes of work

# Anchor and importance so far, a parameter and its new importance -> anchor, importance, and what is added to the
# constant. [*] each. An anchor that is the parameter itself must be given as it came.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, float]]


def latest(decay: float) -> Rule:
    """Importances fade by ``decay`` and add up; the anchor is where the latest task ended."""
    return lambda anchor, old, here, new: (here, torch.add(new, old, alpha=decay), 0.0)


@dataclass(frozen=True)
class Storage:
    """The formats of importances and anchors.

    Args:
        importance_format: ``"float32"``, ``"bfloat16"`` or ``"log8"``.
        anchor_format: ``"float32"``, ``"split24"`` or ``"fixed16"``.

    Raises:
        ValueError: there is no such format.
    """

    importance_format: str = "float32"
    anchor_format: str = "float32"

    def __post_init__(self) -> None:
        _checks.one_of("importance_format", self.importance_format, IMPORTANCE_FORMATS)
        _checks.one_of("anchor_format", self.anchor_format, ANCHOR_FORMATS)

    @property
    def narrow(self) -> bool:
        """Whether anything is held in less than a parameter's wide dtype."""
        return (self.importance_format, self.anchor_format) != ("float32", "float32")

    @property
    def packed(self) -> bool:
        """Whether anything is held in tensors that have one dimension."""
        return self.importance_format in PACKED_DTYPES or self.anchor_format in PACKED_DTYPES

    def __str__(self) -> str:
        return f"importance_format={self.importance_format!r}, anchor_format={self.anchor_format!r}"

    @property
    def text(self) -> str:
        """What a regularizer's own description says about it."""
        return f", {self}" if self.narrow else ""

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Refuse parameters whose anchors and importances would lose more than the formats account for."""
        if not self.narrow:
            return
        for name, param in params.items():
            if is_sharded(param):
                raise TypeError(f"parameter {name!r} must not be sharded over processes with {self}")
            if param.dtype == torch.float64:
                raise TypeError(
                    f"parameter {name!r} must not be float64 with {self}: they hold less, "
                    "while 'float32' stands for a float64 parameter's own dtype"
                )

    def importance_dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of an importance that is not packed."""
        return torch.bfloat16 if self.importance_format == "bfloat16" else wide(param.dtype)

    def merged(
        self,
        param: Tensor,  # [*]
        new: Tensor,  # [*]
        old: tuple[Tensor, Tensor] | None = None,  # [*] or packed each
        rule: Rule | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, float]:  # [*] or packed each
        """Anchor and importance as they are held, and a constant, of a parameter where it is and its new importance.

        Merged by ``rule`` with those held so far, if there are any. What accumulates is rounded at random then, since
        rounding to the nearest would sooner or later leave it where it is.

        Raises:
            ValueError: a value is not finite, or an importance is negative, and the format cannot hold it.
        """
        if old is None:
            generator = None
        if not self.packed:
            here = param.detach().to(wide(param.dtype), copy=True)
            new = torch.empty_like(here).copy_(new)  # laid out as the parameter is: read in one flat pass
            if old is None or rule is None:
                return here, new.to(self.importance_dtype(param)), 0.0
            anchor, importance, constant = rule(old[0], old[1].to(here.dtype), here, new)
            return anchor, _rounded(importance, self.importance_dtype(param), generator), constant
        formats = (self.anchor_format, self.importance_format)
        numel, constant = param.numel(), 0.0
        flat_param, flat_new = param.detach().reshape(-1), new.reshape(-1)
        held = [_empty(format, param) for format in formats]
        for begin in range(0, numel, _PIECE):
            piece = slice(begin, min(begin + _PIECE, numel))
            anchor = here = flat_param[piece].float()
            importance = flat_new[piece].float()
            if old is not None and rule is not None:
                a, f = (_read(t, format, numel, piece) for t, format in zip(old, formats, strict=True))
                anchor, importance, added = rule(a, f, here, importance)
                constant += added
            _write(held[0], self.anchor_format, numel, piece, anchor, None if anchor is here else generator)
            _write(held[1], self.importance_format, numel, piece, importance, generator)
        return held[0], held[1], constant

    def dense(
        self, anchor: Tensor, importance: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:  # [*] or packed each -> [shape] each
        """Anchor and importance in float32."""
        like = torch.empty(shape, device="meta")
        return reference.dense_anchor(anchor, like), reference.dense_importance(importance, like)


WIDE = Storage()


def rounding(num_tasks: int, name: str, device: torch.device) -> torch.Generator:
    """Draws that follow from the task and the parameter: alike in a run that was resumed, and in every process."""
    digest = hashlib.blake2b(f"{num_tasks} {name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def read_storage(state: Mapping[str, Any]) -> tuple[Storage, dict[str, torch.Size]]:
    """The formats of a state, and the shapes of what is packed in it; float32 where it does not say."""
    given = state.keys() & NARROW_KEYS
    if not given:
        return WIDE, {}
    if given != NARROW_KEYS:
        raise ValueError(f"state must have the keys {sorted(NARROW_KEYS)} together, got only {sorted(given)}")
    shapes = _mapping("state['shapes']", state["shapes"])
    for key, sizes in shapes.items():
        name = f"state['shapes'][{key!r}]"
        if _checks.tensor(name, sizes).dtype != torch.int64 or sizes.dim() != 1 or bool((sizes < 0).any()):
            raise ValueError(f"{name} must hold the sizes of a shape, got {_checks.describe(sizes)}")
    storage = Storage(state["importance_format"], state["anchor_format"])
    return storage, {key: torch.Size(sizes.tolist()) for key, sizes in shapes.items()}


def read_packed(
    state: Mapping[str, Any], storage: Storage, shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """Copies of a state's anchors and importances, checked against their parameters' shapes."""
    read: dict[str, dict[str, Tensor]] = {}
    for kind, format in (("anchors", storage.anchor_format), ("importances", storage.importance_format)):
        tensors = _mapping(f"state[{kind!r}]", state[kind])
        if tensors.keys() != shapes.keys():
            names = sorted(tensors.keys() ^ shapes.keys())
            raise ValueError(f"state must hold {kind} and shapes of the same names, not so: {names}")
        for key, tensor in tensors.items():
            name, dtype, shape = f"state[{kind!r}][{key!r}]", getattr(torch, format, None), list(shapes[key])
            if format in PACKED_DTYPES:
                dtype, shape = PACKED_DTYPES[format], [packed_size(format, shapes[key].numel())]
            if _checks.tensor(name, tensor).dtype != dtype:
                raise TypeError(f"{name} must be {dtype} as {format}, got {_checks.describe(tensor)}")
            if list(tensor.shape) != shape:
                got = _checks.describe(tensor)
                raise ValueError(f"{name} must be of shape {shape} to hold {list(shapes[key])} as {format}, got {got}")
        read[kind] = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return read


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from names to tensors, got {_checks.describe(value)}")
    return value


def _empty(format: str, param: Tensor) -> Tensor:  # [*] -> [*] or packed
    if format in PACKED_DTYPES:  # its padding is read by nobody, and saved
        return torch.zeros(packed_size(format, param.numel()), dtype=PACKED_DTYPES[format], device=param.device)
    return torch.empty(param.shape, dtype=getattr(torch, format), device=param.device)


def _read(held: Tensor, format: str, numel: int, piece: slice) -> Tensor:  # [*] or packed -> [n] float32
    if format in PACKED_DTYPES:
        return unpack_piece(held, format, numel, piece.start, piece.stop)
    return held.reshape(-1)[piece].float()


def _write(
    held: Tensor, format: str, numel: int, piece: slice, values: Tensor, generator: torch.Generator | None
) -> None:
    if format in PACKED_DTYPES:
        pack_piece_(held, format, numel, piece.start, values, generator)
    else:
        held.view(-1)[piece] = _rounded(values, held.dtype, generator)


def _rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:  # [*] -> [*]
    if dtype == torch.bfloat16 and generator is not None:
        values = moved_at_random(values, steps(values, 7), generator)
    return values.to(dtype)
