"""Squared per-sample gradients of the batches so far, each parameter by the fastest way that is exact for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.contributions import Contribution, join, joinable
from limpet.fisher.layout import Layout
from limpet.fisher.per_sample import add_squares, same_loss
from limpet.fisher.picks import misplaced
from limpet.fisher.probe import Probe
from limpet.fisher.recorder import Key, Recorder, leaves
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved
from limpet.fisher.sums import Sums


class Computation:
    """The sums over the batches so far, and what is known of the model's calls."""

    def __init__(self, model: nn.Module, objective: Objective, params: Mapping[str, Tensor]) -> None:
        self._model, self._objective, self._params = model, objective, params
        self._names = {id(p): name for name, p in params.items()}
        self._layouts: dict[Key, Layout | None] = {}
        self.sums = Sums(params)
        self.slow: dict[str, Tensor] = {}  # the parameters that go the per-sample way, from some batch on

    def add(self, batch: Batch) -> None:
        """Add one batch's squared gradients."""
        losses = None
        if len(self.slow) < len(self._params):
            losses = self._add_fused(batch)
        if self.slow:
            add_squares(self._model, batch, self._objective, self.slow, self.sums.running, losses)
        self.sums.end_batch()

    def _add_fused(self, batch: Batch) -> Tensor:  # [N, K]
        probe = self._probe(batch) if batch.size > 1 and not self._layouts else None
        uses = _Uses(self.sums.running)
        recorder = Recorder(self._names, None, uses.arrived)
        with recorder:
            losses = losses_of(self._model, batch, self._objective)
        if not losses.requires_grad:
            raise RuntimeError(
                f"the losses of batch {batch.number} do not depend on any parameter that requires a gradient: "
                "is something detached or under no_grad?"
            )
        if batch.size > 1 and probe is None and self._unknown(recorder, batch.size):
            probe = self._probe(batch)
        if probe is not None:
            same_loss(probe.losses, losses.detach()[probe.samples.to(losses.device)], batch, probe.samples)
        self._settle(recorder, losses, uses, batch.size)
        if len(self.slow) < len(self._params):
            columns = losses.unbind(dim=1)
            for column in columns:
                torch.autograd.grad(
                    column,
                    recorder.anchor,
                    torch.ones_like(column),
                    retain_graph=column is not columns[-1],
                    allow_unused=True,
                )
                uses.finish()
        return losses.detach()

    def _probe(self, batch: Batch) -> Probe:
        probe = Probe(self._model, batch, self._objective, self._names)
        self._layouts.update(probe.layouts)
        return probe

    def _unknown(self, recorder: Recorder, samples: int) -> bool:
        """Whether a call was not seen by a probe, or has other leading dimensions than its layout allows."""
        for key, call, lead in recorder.calls:
            if all(name in self.slow for name, _ in call.uses()):
                continue
            layout = self._layouts.get(key)
            if key not in self._layouts or (layout is not None and not layout.fits(lead, samples)):
                return True
        return False

    def _settle(self, recorder: Recorder, losses: Tensor, uses: _Uses, samples: int) -> None:
        """Choose each parameter's way before anything is summed.

        A parameter that an ordinary backward would still reach has a use that no rule saw: what the rules saw of it
        is incomplete, and it goes the per-sample way with all its uses. So does one whose rows lie elsewhere than its
        layout says, in a model that picks rows by their values.
        """
        slow = {self._names[leaf] for leaf in leaves(losses) & self._names.keys()}
        kinds: dict[str, list[type[Contribution]]] = defaultdict(list)
        for key, call, lead in recorder.calls:
            for name, kind in call.uses():
                kinds[name].append(kind)
            layout = self._layouts.get(key)
            if samples == 1 and call.accepts(lead.numel()):
                uses.splits[key] = _only_sample
            elif samples > 1 and layout is not None and layout.fits(lead, samples) and call.accepts(layout.places):
                uses.splits[key] = partial(layout.split, samples=samples)
            else:
                slow.update(name for name, _ in call.uses())
        slow.update(name for name, found in kinds.items() if len(found) > 1 and not joinable(found))
        if samples > 1 and recorder.picked:
            wrong = misplaced(losses, recorder, uses.splits)
            slow.update(name for key, call, _ in recorder.calls if key in wrong for name, _ in call.uses())
        self.slow.update({name: self._params[name] for name in slow})
        for _, call, _ in recorder.calls:
            call.drop(self.slow)
        uses.counts = {name: len(found) for name, found in kinds.items()}


def _only_sample(rows: Tensor) -> Tensor:  # [*] -> [1, *]
    return rows.unsqueeze(0)


class _Uses:
    """The uses of each parameter in one batch: summed when the last one's gradient has arrived."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self._sums = sums
        self.splits: dict[Key, Callable[[Tensor], Tensor]] = {}
        self.counts: dict[str, int] = {}
        self._pending: dict[str, list[Contribution]] = defaultdict(list)

    def arrived(self, key: Key, call: Call, dy: Tensor, saved: Saved) -> None:
        """Take one call's output gradient, in backward."""
        if call.weight is None and call.bias is None:
            return
        for name, contribution in call.contributions(dy, saved, self.splits[key]):
            if self.counts[name] == 1:
                contribution.add_to(self._sums[name])
                continue
            self._pending[name].append(contribution)
            if len(self._pending[name]) == self.counts[name]:
                join(self._pending.pop(name)).add_to(self._sums[name])

    def finish(self) -> None:
        """Sum what waited for uses that no loss depends on."""
        with torch.no_grad():
            for name, found in self._pending.items():
                join(found).add_to(self._sums[name])
        self._pending.clear()
