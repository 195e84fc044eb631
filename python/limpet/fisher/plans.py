"""What was settled for batches, kept for later batches of the same calls: that depends on the calls alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limpet import _core
from limpet.fisher.layout import Layout
from limpet.fisher.recorder import Key, Record, Recorder
from limpet.fisher.rules.linear import Linear
from limpet.fisher.uses import Uses

_KEPT = 64  # plans at a time: a batch of another length or size has another
_HELD = 0.5  # of the parameters' size: what linear layers may hold until the end of backward

Size = tuple[int, int]  # N, K
_Calls = tuple[tuple[Key, torch.Size], ...]  # of a forward pass


class _Plan(NamedTuple):
    """What is done in batches of these calls."""

    calls: _Calls
    records: list[Record]
    given: list[_core.EarlierCall | None]
    decided: list[object]
    size: Size
    uses: Uses


class Plans:
    """The plans by calls, sizes and deciding values, and the one that served last.

    Attributes:
        given: of that one, for the next batch's recorder.
    """

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}
        self.clear()

    def __bool__(self) -> bool:
        return bool(self._plans)

    def clear(self) -> None:
        """Forget all."""
        self._plans.clear()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Let the next forward pass be recorded without an earlier one's calls."""
        self._latest: _Plan | None = None
        self.given: Sequence[_core.EarlierCall | None] = ()

    def find(self, recorder: Recorder, size: Size, sums: Mapping[str, Tensor]) -> Uses | None:
        """What is done in a batch of these calls that is added to these sums."""
        plan = self._latest
        if plan is None or plan.records != recorder.calls or plan.decided != recorder.decided:
            plan = self._plans.get(identity(recorder))
            if plan is None or plan.calls != _calls(recorder):
                return None
        if plan.uses.sums is not sums or plan.size != size:
            return None
        self._latest, self.given = plan, plan.given
        return plan.uses

    def keep(self, recorder: Recorder, size: Size, uses: Uses) -> None:
        """Keep what is done in such a batch."""
        if len(self._plans) >= _KEPT:
            self.clear()
        plan = _Plan(_calls(recorder), recorder.calls, recorder.given, recorder.decided, size, uses)
        self._plans[identity(recorder)] = self._latest = plan
        self.given = plan.given


def identity(recorder: Recorder) -> int:
    """A hash of what a pass's plan depends on: the calls, their sizes, and the values that may have decided."""
    return hash((_calls(recorder), tuple(recorder.decided)))


def _calls(recorder: Recorder) -> _Calls:
    return tuple((key, lead) for key, _, lead in recorder.calls)


def add_together(
    recorder: Recorder, uses: Uses, layouts: Mapping[Key, Layout | None], params: Mapping[str, Tensor]
) -> None:
    """Let the core add the squares of linear layers once backward has given all their output gradients.

    No Python runs between two layers then. Inputs and output gradients are held until the end of backward, so they
    must be small beside the parameters.
    """
    layers, size = [], 0
    for (key, call, lead), given in zip(recorder.calls, recorder.given, strict=True):
        if given is not None and isinstance(call, Linear) and layouts[key] == Layout(0):
            names = uses.alone(call)
            if names is not None:
                layers.append((given, names))
                size += lead.numel() * sum(call.w.shape)
    if size <= _HELD * sum(p.numel() for p in params.values()):
        for given, names in layers:
            given.add_to(uses.sums, *names)
