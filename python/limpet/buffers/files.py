"""A buffer's state in a file: safetensors, which holds tensors and text and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limpet import _checks

_NUMBERS = ("capacity", "seed", "seen", "draws")


class State(NamedTuple):
    """A buffer's state, checked."""

    capacity: int
    seed: int
    seen: int
    draws: int
    structure: str | None
    notes: list[Tensor]  # [held] each
    fields: list[Tensor]  # [held, *] each


def checked(state: Any, notes: Mapping[str, torch.dtype], *, full: bool) -> State:
    """A state whose parts fit each other, of a buffer that notes these things of each slot.

    One that is always ``full`` holds as many of the items seen as it has slots for.
    """
    keys = {*_NUMBERS, "structure", "fields", *notes}
    if not isinstance(state, Mapping) or state.keys() != keys:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else _checks.describe(state)
        raise ValueError(f"state must have the keys {sorted(keys)}, got {got}")
    capacity, seed, seen, draws = (
        _checks.integer(f"state[{name!r}]", state[name], minimum=1 if name == "capacity" else 0) for name in _NUMBERS
    )
    structure, fields = state["structure"], state["fields"]
    if structure is not None and not isinstance(structure, str):
        raise TypeError(f"state['structure'] must be text or None, got {_checks.describe(structure)}")
    if not isinstance(fields, (list, tuple)):
        raise TypeError(f"state['fields'] must be a list of tensors, got {_checks.describe(fields)}")
    held = min(capacity, seen)
    if not full and fields and isinstance(fields[0], Tensor) and fields[0].dim():
        held = min(held, fields[0].shape[0])
    of_slots = [(name, state[name]) for name in notes]
    for name, tensor in (*of_slots, *((f"fields'][{k}", field) for k, field in enumerate(fields))):
        if _checks.tensor(f"state['{name}']", tensor).dim() == 0 or tensor.shape[0] != held:
            raise ValueError(f"state['{name}'] must have {held} rows, got {_checks.describe(tensor)}")
    for name, note in of_slots:
        if note.dtype != notes[name]:
            raise TypeError(f"state['{name}'] must be {notes[name]}, got {_checks.describe(note)}")
        if note.dim() != 1 or (name == "items" and held and not _are_numbers(note, seen)):
            raise ValueError(f"state['{name}'] must have one number for each item, got {_checks.describe(note)}")
    if (structure is None) != (not fields) or (held and structure is None):
        raise ValueError(f"state must hold fields and their structure, got {len(fields)} and {structure!r}")
    return State(capacity, seed, seen, draws, structure, [note for _, note in of_slots], list(fields))


def _are_numbers(items: Tensor, seen: int) -> bool:
    """Whether these are numbers of different items of a stream."""
    return items.min().item() >= 0 and items.max().item() < seen and items.unique().numel() == items.numel()


def save(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write the state of a kind of buffer beside ``path``, and rename it once it is on the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    notes = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = notes | {f"field.{k}": field for k, field in enumerate(state["fields"])}
    text = {name: str(state[name]) for name in _NUMBERS}
    text |= {"format": _format(kind), "structure": state["structure"] or ""}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, beside, text)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"path must be a file that can be written, got {str(path)!r}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path, kind: str) -> dict[str, Any]:
    """Read the state of a kind of buffer."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if text.get("format") != _format(kind):
            raise ValueError(f"its format is {text.get('format')!r}")
        fields = [tensors.pop(f"field.{k}") for k in range(sum(name.startswith("field.") for name in tensors))]
        numbers = {name: int(text[name]) for name in _NUMBERS}
        return {**numbers, "structure": text["structure"] or None, **tensors, "fields": fields}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"path must be a whole file of a saved buffer, got {str(path)!r}: {error}") from error


def _format(kind: str) -> str:
    return f"limpet {kind} 1"
