"""Batches as flat lists of fields, and what their structure is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # what torch.func, torch.export and DataLoader users know as pytrees

from limpet import _checks
from limpet.ops.reservoir import Row


class Structure:
    """How a batch is nested: a tensor, or tuples, lists and dicts of them, and whatever pytree is registered."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self._spec = spec
        children = spec.children()
        self._leaf = spec.is_leaf()
        self._flat = spec.type if spec.type in (tuple, list) and all(child.is_leaf() for child in children) else None
        self._count = len(children)
        #: Whether the core takes and gives batches themselves; otherwise lists of their fields.
        self.direct = self._leaf or self._flat is not None
        #: What it takes and gives.
        self.container: type = Tensor if self._leaf else self._flat or list

    def __deepcopy__(self, memo: Any) -> Structure:  # nothing of it changes
        return self

    def __reduce__(self) -> Any:
        try:  # torch's own specs warn when they are unpickled
            return Structure.from_text, (self.to_text(), self._spec.num_leaves)
        except TypeError:  # a named tuple
            return Structure, (self._spec,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._spec == other._spec

    def __repr__(self) -> str:
        return repr(self._spec)

    @staticmethod
    def of(batch: Any) -> tuple[Structure, list[Tensor]]:
        """A first batch's structure and its fields."""
        fields, spec = pytree.tree_flatten(batch)
        if not fields:
            raise ValueError(f"batch must hold at least one tensor, got {_checks.describe(batch)}")
        _require_tensors(fields)
        return Structure(spec), fields

    @staticmethod
    def from_text(text: str, count: int) -> Structure:
        """From :meth:`to_text`, for so many fields.

        Raises:
            ValueError: it is no such text, or has not as many fields.
        """
        try:
            spec = pytree.treespec_loads(text)
        except (NotImplementedError, LookupError, TypeError) as error:
            raise ValueError(f"structure must be one that was saved, got {_checks.describe(text)}") from error
        if spec.num_leaves != count:
            raise ValueError(f"structure must have {count} fields, got {spec}")
        return Structure(spec)

    def to_text(self) -> str:
        """As JSON.

        Raises:
            TypeError: a named tuple or a class of one's own is part of it, whose name torch does not know.
        """
        try:
            return str(pytree.treespec_dumps(self._spec))
        except NotImplementedError as error:
            raise TypeError(f"batch must consist of tuples, lists and dicts to be saved: {error}") from error

    def fields(self, batch: Any) -> list[Tensor]:
        """The fields of a batch that must have this structure."""
        if self._leaf and isinstance(batch, Tensor):
            return [batch]
        if type(batch) is self._flat and len(batch) == self._count:  # the usual case, ten times as fast
            fields = list(batch)
        else:
            fields, spec = pytree.tree_flatten(batch)
            if spec != self._spec:
                raise ValueError(f"batch must have the structure of the first one, {self._spec}, got {spec}")
        _require_tensors(fields)
        return fields

    def batch(self, fields: list[Tensor]) -> Any:
        """The fields as a batch."""
        return self._flat(fields) if self._flat is not None else pytree.tree_unflatten(fields, self._spec)


def _require_tensors(fields: list[Any]) -> None:
    for k, field in enumerate(fields):
        if not isinstance(field, Tensor):
            raise TypeError(f"batch must hold tensors alone, got {_checks.describe(field)} as its field {k}")


def row_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Row:
    """What the rows of a field are."""
    return dtype, tuple(shape), torch.Size(shape).numel() * dtype.itemsize


def require_alike(fields: list[Tensor], rows: list[Row]) -> None:
    """Require as many rows of each field, like the first batch's."""
    count = fields[0].shape[:1]
    for k, (field, (dtype, shape, _)) in enumerate(zip(fields, rows, strict=True)):
        if field.dtype != dtype:
            raise TypeError(f"batch must have {dtype} in field {k} as the first one, got {_checks.describe(field)}")
        if field.dim() == 0 or field.shape[1:] != shape or field.shape[:1] != count:
            raise ValueError(
                f"batch must have {list(count)} rows of shape {list(shape)} in field {k}, got {_checks.describe(field)}"
            )
