"""What a progressive network's state says beside its tensors, and whether a network can take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limpet.methods.progressive.column import Column, Columns

_KEYS = {"lateral", "tasks", "arguments", "laterals", "training"}


def of(
    columns: Columns, tasks: Sequence[str | int], arguments: Sequence[Mapping[str, Any]], lateral: str
) -> dict[str, Any]:
    """What makes the columns anew: tasks, the factory's arguments, which laterals there are, and how far it is."""
    return {
        "lateral": lateral,
        "tasks": list(tasks),
        "arguments": [dict(given) for given in arguments],
        "laterals": [sorted(map(list, column.pairs)) for column in columns],
        "training": bool(columns) and not columns[-1].frozen,
    }


def check(
    state: Any,
    columns: Columns,
    tasks: Sequence[str | int],
    arguments: Sequence[Mapping[str, Any]],
    lateral: str,
) -> None:
    """Require a state that a network of these columns can take.

    Raises:
        ValueError: it is none, or of another ``lateral``; it does not begin with these columns; its last column is in
            training where that is frozen.
    """
    if not isinstance(state, Mapping) or state.keys() != _KEYS:
        raise ValueError(f"the state of a ProgressiveNetwork must have the keys {sorted(_KEYS)}, got {state!r}")
    if state["lateral"] != lateral:
        raise ValueError(f"state must be of lateral={lateral!r}, got {state['lateral']!r}")
    here = len(tasks)
    if state["tasks"][:here] != tasks or state["arguments"][:here] != arguments:
        raise ValueError(f"state must begin with the columns of this network ({named(tasks)}), got {state['tasks']}")
    if here and here == len(state["tasks"]) and state["training"] and columns[-1].frozen:
        raise ValueError("state must not be of a column in training where that is frozen: load it into a new network")


def pruned(state: Mapping[str, Any], columns: Sequence[Column]) -> list[set[tuple[int, int]]]:
    """What each column reads, and does not in a state.

    Raises:
        ValueError: a column reads less than in the state.
    """
    gone = []
    for column, pairs in zip(columns, state["laterals"], strict=True):
        wanted = {(point, number) for point, number in pairs}
        if not wanted <= column.pairs:
            raise ValueError(f"state must have no laterals that are not here, got {sorted(wanted - column.pairs)}")
        gone.append(column.pairs - wanted)
    return gone


def named(tasks: Sequence[str | int]) -> str:
    """Tasks, as messages show them."""
    return ", ".join(map(repr, tasks)) or "no task yet"
