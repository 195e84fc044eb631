"""Check on a whole batch that the rows of each call are their samples' own."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limpet.fisher.layout import rounding
from limpet.fisher.precision import gradients, working_dtype
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved, Split
from limpet.reference import wide

if TYPE_CHECKING:
    from limpet.fisher.recorder import Key, OnBackward, Recorder


class RowCheck:
    """Passes through the activations' gradients in which each sample's losses are multiplied by a factor of its own.

    The gradient of each of its rows must follow, as against the pass without factors. The factors are powers of two,
    which change no rounding. Up to 129 samples have different ones in one pass; more take another pass.

    Args:
        losses: ``[N, K]``.
        recorder: of their forward pass.
        splits: what is to be checked: how each call's rows are brought to their samples.
        scale: the losses are multiplied by it in every pass.
        keep: whether the losses' graph is needed afterwards.
    """

    def __init__(
        self, losses: Tensor, recorder: Recorder, splits: Mapping[Key, Split], scale: float, *, keep: bool
    ) -> None:
        self._losses, self._recorder, self._splits, self._scale = losses, recorder, splits, scale
        self._dtype = working_dtype(losses)
        self._most = 3 if self._dtype == torch.float16 else 64  # the exponents run from -most to most
        self._plain: dict[Key, Tensor] = {}
        self._features: dict[Key, int] = {}
        self._scaled: list[dict[Key, Tensor]] = []
        factors = 2 * self._most + 1
        digits = torch.arange(losses.shape[0], device=losses.device)
        more = True
        while more:
            exponents, digits = digits % factors - self._most, digits // factors
            more = bool(digits.any())
            self._scaled.append(self._row_sizes(exponents, keep=keep or more))

    def run_plain(self) -> None:
        """Make the pass without factors, for which else the batch's own is taken."""
        self._plain = self._row_sizes(torch.zeros_like(self._losses[:, 0], dtype=torch.int64), keep=True)

    def before(self, on_backward: OnBackward) -> OnBackward:
        """Take the pass without factors from the batch's own: what is to be called in it."""

        def note(key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
            if key in self._splits:
                self._plain[key] = self._sizes(key, call, dy)
            on_backward(key, call, dy, saved)

        return note

    @property
    def checked(self) -> Set[Key]:
        """The calls that a gradient reached."""
        return self._plain.keys()

    def wrong(self) -> set[Key]:
        """The calls with a row whose gradient does not come from the sample that its split says, and from it alone."""
        found = set()
        relative, tiny = rounding(self._dtype), torch.finfo(self._dtype).tiny * 2.0**self._most
        for key, plain in self._plain.items():
            for sizes in self._scaled:
                scaled = sizes[key]
                if not ((scaled - plain).abs() <= relative * plain + tiny * self._features[key]).all():
                    found.add(key)
        return found

    def reached(self, key: Key) -> Tensor:  # bool [T]
        """Whether any sample's gradient reached each of a call's places."""
        return (self._plain[key] > 0).any(dim=0)

    def _row_sizes(self, exponents: Tensor, *, keep: bool) -> dict[Key, Tensor]:  # int64 [N] -> [N, T] each
        """The sizes of the rows' gradients, with the factors taken out again."""
        sizes: dict[Key, Tensor] = {}
        factors = torch.ldexp(torch.ones_like(self._losses[:, 0]), exponents).unsqueeze(1)

        def note(key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
            if key in self._splits:
                sizes[key] = self._sizes(key, call, dy) / factors.double()

        receiver = self._recorder.receiver
        on_backward, receiver.on_backward = receiver.on_backward, note
        try:
            weights = (self._scale * factors).expand_as(self._losses)
            gradients(self._losses, self._recorder.anchor, weights, retain_graph=keep)
        finally:
            receiver.on_backward = on_backward
        return sizes

    def _sizes(self, key: Key, call: Call, dy: Tensor) -> Tensor:  # [*lead, *features] -> [N, T]
        """The sum of magnitudes of each row, samples in front."""
        self._features[key] = max(1, dy[(0,) * call.lead].numel()) if dy.numel() else 1
        rows = dy.unsqueeze(-1) if dy.dim() == call.lead else dy.flatten(call.lead)
        sizes = torch.linalg.vector_norm(rows, ord=1, dim=-1, dtype=wide(dy.dtype))
        return self._splits[key](sizes).reshape(self._losses.shape[0], -1).double()
