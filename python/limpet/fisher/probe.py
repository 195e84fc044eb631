"""Find out which rows of each call belong to which sample, on a few samples of a batch.

The samples are run together (of a batch of two, one of them twice); then two of them in turn are replaced by another
one, and every row that changes was touched by the replaced sample; and the gradient of one sample's loss shows the rows
through which that loss is reached. A layout must explain all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.layout import Layout, any_feature, established, rounding, rows_changed
from limpet.fisher.mixing import Spans
from limpet.fisher.precision import gradients
from limpet.fisher.recorder import Key, Recorder
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved

Evidence = list[tuple[int, Tensor]]  # (sample, bool [*lead]: the rows it touches)

_SAMPLES = 3
_TRACED = 1  # the sample whose gradient is followed


class Probe:
    """The layouts of a batch's calls: None in :attr:`layouts` where none or several explain what was seen.

    :attr:`changing` says for each layout which places of a sample were seen to change with it. :attr:`shared` holds the
    calls without a layout whose values do not depend on samples at all; calls that cannot have one are added to
    ``declined`` at once. :attr:`spans` are those of another number of samples than the batch's.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, objective: Objective, names: Mapping[int, str], declined: set[Key]
    ) -> None:
        self._names, self._model, self._objective, self._batch = names, model, objective, batch
        self._declined = declined
        self._lead: dict[Key, torch.Size] = {}
        self._before: dict[Key, Tensor] = {}
        self._changed: dict[Key, Evidence] = defaultdict(list)
        self._reached: dict[Key, Evidence] = defaultdict(list)

        # Not as many as the batch holds, so that what grows with the number of samples is seen to.
        self.samples = batch.distinct(min(_SAMPLES, batch.size - 1)) if batch.size > 2 else torch.tensor([0, 1, 1])
        few = batch.take(self.samples)
        traced = Recorder(names, declined, self._note_gradient, self._remember, few.size)
        with traced:
            losses = losses_of(model, few, objective)
        self.losses = losses.detach()  # [n, K]
        if losses.requires_grad:
            one = torch.zeros_like(losses)
            one[_TRACED] = 1
            gradients(losses, traced.anchor, one)
        constant = traced.constant
        self.spans: Spans = traced.spans
        del losses, traced
        mixed = [self._replace(sample, by) for sample, by in ((0, 1), (1, few.size - 1 if batch.size > 3 else 0))]

        self.layouts: dict[Key, Layout | None] = {
            key: self._established(key, self._changed[key] + self._reached[key]) for key in self._lead
        }
        self.shared: set[Key] = {
            key
            for key, layout in self.layouts.items()
            if layout is None and key in constant and not any(bool(rows.any()) for _, rows in self._changed[key])
        }
        self._before.clear()
        self.changing: dict[Key, Tensor] = {
            key: self._changing(key, layout) for key, layout in self.layouts.items() if layout is not None
        }
        if any(mixed):
            self._refuse()

    def _remember(self, key: Key, call: Call, x: Tensor | None, y: Tensor) -> None:
        # The input: a row of the output comes from its row alone. A later function may change it in place.
        self._lead[key] = y.shape[: call.lead]
        self._before[key] = (y if x is None else x).clone()

    def _note_gradient(self, key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
        self._reached[key].append((_TRACED, any_feature(dy != 0, call.lead)))

    def _replace(self, sample: int, by: int) -> bool:
        """Run with one sample replaced; note what changed, and say whether another sample's loss did."""
        index = self.samples.clone()
        index[sample] = self.samples[by]
        few = self._batch.take(index)

        def compare(key: Key, call: Call, x: Tensor | None, y: Tensor) -> None:
            if key not in self._before:
                return
            before, after = self._before[key], y if x is None else x
            if before.shape == after.shape:  # else it depends on the samples how many rows there are: nothing is learnt
                self._changed[key].append((sample, rows_changed(before, after, call.lead)))

        with Recorder(self._names, self._declined, self._note_gradient, compare, few.size):
            losses = losses_of(self._model, few, self._objective).detach()
        others = torch.arange(losses.shape[0], device=losses.device) != sample
        bound = rounding(losses.dtype) * float(self.losses.abs().max())
        return bool(((losses - self.losses)[others].abs() > bound).any())

    def _changing(self, key: Key, layout: Layout) -> Tensor:  # bool [T]
        """Which places of a call were seen to change with their sample."""
        places = torch.zeros(0, dtype=torch.bool)
        for sample, rows in self._changed[key]:
            own = layout.split(rows, self.samples.numel())[sample].flatten()
            places = own if places.numel() == 0 else places | own
        return places

    def _established(self, key: Key, evidence: Evidence) -> Layout | None:
        return established(self._lead[key], self.samples.numel(), evidence)

    def _refuse(self) -> None:
        """Name the first call whose values a sample changes beyond its own rows."""
        for key in self._lead:
            changed = self._changed[key]
            if any(bool(rows.any()) for _, rows in changed) and self._established(key, changed) is None:
                operand = key[1] or key[2]
                module = "" if operand is None else operand.name.rpartition(".")[0]
                raise RuntimeError(
                    f"the loss or the model mixes samples: they interact at or before {module or 'the model itself'!r}"
                )
        raise RuntimeError("the loss or the model mixes samples: a sample's loss changes with the others in its batch")
