"""Find out which rows of each call belong to which sample, on a few samples of a batch.

The samples are run together; then some of them are replaced by others among them, and every row that changes was
touched by a replaced sample. A layout must explain all of it. Where that leaves several layouts, or shows nothing, the
gradient of one sample's loss shows the rows through which that loss is reached.

Samples that interact give themselves away: a loss changes that belongs to a sample which stayed, or which came to
another place among other samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.layout import Layout, any_feature, established, remaining, rounding, rows_changed
from limpet.fisher.mixing import Spans
from limpet.fisher.precision import gradients, working_dtype
from limpet.fisher.recorder import Key, Recorder
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved

Found = list[tuple[list[int], Tensor]]  # (samples, bool [*lead]: the rows they touch)

_SAMPLES = 3
_TRACED = 1  # the sample whose gradient is followed


class Probe:
    """The layouts of a batch's calls: None in :attr:`layouts` where none or several explain what was seen.

    :attr:`changing` says for each layout which places of a sample were seen to change with it. :attr:`shared` holds the
    calls without a layout whose values do not depend on samples at all; calls that cannot have one are added to
    ``declined`` at once. :attr:`spans` are those of another number of samples than the batch's.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, objective: Objective, names: dict[int, str], declined: set[Key]
    ) -> None:
        self._names, self._model, self._objective, self._batch = names, model, objective, batch
        self._declined = declined
        self._lead: dict[Key, torch.Size] = {}
        self._before: dict[Key, Tensor] = {}
        self._changed: dict[Key, Found] = defaultdict(list)
        self._reached: dict[Key, Found] = defaultdict(list)

        # Not as many as the batch holds, so that what grows with the number of samples is seen to.
        self.samples = batch.distinct(min(_SAMPLES, batch.size - 1)) if batch.size > 2 else torch.tensor([0, 1, 1])
        few = batch.take(self.samples)
        plain = Recorder(names, declined, _nothing, self._remember, few.size)
        with plain:
            self.losses = losses_of(model, few, objective).detach()  # [n, K]
        constant = plain.constant
        self.spans: Spans = plain.spans
        del plain
        if batch.size > 3:  # in order, as the samples are
            mixed = self._interact([[1, 1, 2], [0, 2, 2]], together=[1, 2, 2])
        else:
            mixed = self._interact([[1] * few.size, [0] * few.size], together=None)
        self.layouts: dict[Key, Layout | None] = {key: self._established(key, self._changed[key]) for key in self._lead}
        if not mixed and any(layout is None and self._is_open(key) for key, layout in self.layouts.items()):
            self._trace(few)
            for key in self._lead:
                self.layouts[key] = self._established(key, self._changed[key] + self._reached[key])
        self.shared: set[Key] = {
            key
            for key, layout in self.layouts.items()
            if layout is None and key in constant and not any(bool(rows.any()) for _, rows in self._changed[key])
        }
        self._before.clear()
        self.changing: dict[Key, Tensor] = {
            key: self._changing(key, layout) for key, layout in self.layouts.items() if layout is not None
        }
        if mixed:
            self._refuse()

    def _remember(self, key: Key, call: Call, x: Tensor | None, y: Tensor) -> None:
        # The input: a row of the output comes from its row alone. A later function may change it in place.
        self._lead[key] = y.shape[: call.lead]
        self._before[key] = (y if x is None else x).clone()

    def _trace(self, few: Batch) -> None:
        """Follow the gradient of one sample's loss."""

        def note(key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
            self._reached[key].append(([_TRACED], any_feature(dy != 0, call.lead)))

        traced = Recorder(self._names, self._declined, note, None, few.size)
        with traced:
            losses = losses_of(self._model, few, self._objective)
        if losses.requires_grad:
            one = torch.zeros_like(losses)
            one[_TRACED] = 1
            gradients(losses, traced.anchor, one)

    def _interact(self, by: Sequence[Sequence[int]], *, together: Sequence[int] | None) -> bool:
        """Put samples in others' places, and say whether samples were seen to interact.

        The losses of those that stay must stay: ``by`` says who is in each place. ``together`` is cheaper: in it, every
        sample must have its loss in another place, too, but for rounding; if that is quite so, nothing else is run.
        """
        far = False
        if together is not None:
            index = torch.tensor(together)
            losses, expected = self._run(index), self.losses[index.to(self.losses.device)]
            difference = (losses - expected).abs()
            if not (difference > self._rounding()).any():
                return False
            bound = float(torch.finfo(working_dtype(losses)).eps) ** 0.5
            far = bool((difference > bound * expected.abs().clamp(min=1.0)).any())
        for places in by:
            index = torch.tensor(places)
            stayed = (index == torch.arange(index.numel())).to(self.losses.device)
            far |= bool(((self._run(index) - self.losses)[stayed].abs() > self._rounding()).any())
        return far

    def _rounding(self) -> float:
        return rounding(self.losses.dtype) * float(self.losses.abs().max())

    def _run(self, index: Tensor) -> Tensor:  # int64 [n] -> [n, K]
        """The losses of samples in other places; note what changed."""
        few = self._batch.take(self.samples[index])
        replaced = (index != torch.arange(index.numel())).nonzero().flatten().tolist()

        def compare(key: Key, call: Call, x: Tensor | None, y: Tensor) -> None:
            if key not in self._before:
                return
            before, after = self._before[key], y if x is None else x
            if before.shape == after.shape:  # else it depends on the samples how many rows there are: nothing is learnt
                self._changed[key].append((replaced, rows_changed(before, after, call.lead)))

        with Recorder(self._names, self._declined, _nothing, compare, few.size):
            return losses_of(self._model, few, self._objective).detach()

    def _changing(self, key: Key, layout: Layout) -> Tensor:  # bool [T]
        """Which places of a call were seen to change with their sample."""
        own = [layout.split(rows, self.samples.numel())[replaced] for replaced, rows in self._changed[key]]
        return (
            torch.cat([rows.reshape(len(rows), -1) for rows in own]).any(dim=0)
            if own
            else torch.zeros(0, dtype=torch.bool)
        )

    def _is_open(self, key: Key) -> bool:
        """Whether more evidence may tell a call's layout."""
        return bool(remaining(self._lead[key], self.samples.numel(), self._changed[key]))

    def _established(self, key: Key, evidence: Found) -> Layout | None:
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


def _nothing(*_: object) -> None:
    """No gradient is followed."""
