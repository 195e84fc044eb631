"""Squared per-sample gradients of the batches so far, each parameter by the fastest way that is exact for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.contributions import Contribution
from limpet.fisher.layout import Layout
from limpet.fisher.operands import Operand
from limpet.fisher.per_sample import add_squares, same_loss
from limpet.fisher.picks import misplaced
from limpet.fisher.precision import LossScale, gradients, is_half, without_tf32
from limpet.fisher.probe import Probe
from limpet.fisher.recorder import Key, Recorder, leaves
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Split
from limpet.fisher.sums import Sums
from limpet.fisher.uses import Uses

_ROUNDS = 4  # of probing: each may find calls that compute parameters from parameters, whose uses the next one sees


class Computation:
    """The sums over the batches so far, and what is known of the model's calls."""

    def __init__(self, model: nn.Module, objective: Objective, params: Mapping[str, Tensor]) -> None:
        self._model, self._objective, self._params = model, objective, params
        self._names = {id(p): name for name, p in params.items()}
        self._layouts: dict[Key, Layout | None] = {}
        self._declined: set[Key] = set()
        self._loss_scale = LossScale()
        self.sums = Sums(params)
        self.slow: dict[str, Tensor] = {}  # the parameters that go the per-sample way, from some batch on
        self.materialised: set[str] = set()  # those whose per-sample gradients are formed in some batch

    def add(self, batch: Batch) -> None:
        """Add one batch's squared gradients."""
        with without_tf32():
            if is_half(self._params):
                self._loss_scale.add(self.sums.running, partial(self._add, batch))
            else:
                self._add(batch, self.sums.running, 1.0)
        self.sums.end_batch()

    def _add(self, batch: Batch, sums: Mapping[str, Tensor], scale: float) -> None:
        losses = None
        if len(self.slow) < len(self._params):
            losses = self._add_fused(batch, sums, scale)
        if self.slow:
            add_squares(self._model, batch, self._objective, self.slow, sums, losses, scale)

    def _add_fused(self, batch: Batch, sums: Mapping[str, Tensor], scale: float) -> Tensor:  # [N, K]
        probe = self._probe(batch) if batch.size > 1 and not self._layouts else None
        recorder, uses, losses = self._forward(batch, sums)
        if batch.size > 1 and probe is None and self._unknown(recorder, batch.size):
            declined = set(self._declined)
            probe = self._probe(batch)
            if declined != self._declined:
                recorder, uses, losses = self._forward(batch, sums)
        if probe is not None:
            same_loss(probe.losses, losses.detach()[probe.samples.to(losses.device)], batch, probe.samples)
        self._settle(recorder, losses, uses, batch.size)
        if len(self.slow) < len(self._params):
            columns = losses.unbind(dim=1)
            for column in columns:
                last = column is columns[-1]
                gradients(column, recorder.anchor, torch.full_like(column, scale), retain_graph=not last)
                uses.finish(last)
        return losses.detach()

    def _forward(self, batch: Batch, sums: Mapping[str, Tensor]) -> tuple[Recorder, Uses, Tensor]:  # losses [N, K]
        recorder = Recorder(self._names, self._declined, lambda *_: None)
        with recorder:
            losses = losses_of(self._model, batch, self._objective)
        if not losses.requires_grad:
            raise RuntimeError(
                f"the losses of batch {batch.number} do not depend on any parameter that requires a gradient: "
                "is something detached or under no_grad?"
            )
        uses = Uses(sums, self._params, recorder.operands.computed, losses.shape[1])
        recorder.on_backward = uses.arrived
        return recorder, uses, losses

    def _probe(self, batch: Batch) -> Probe:
        for _ in range(_ROUNDS):
            probe = Probe(self._model, batch, self._objective, self._names, self._declined)
            self._layouts.update(probe.layouts)
            if not probe.shared:
                break
            self._declined |= probe.shared
        return probe

    def _unknown(self, recorder: Recorder, samples: int) -> bool:
        """Whether a call was not seen by a probe, or has other leading dimensions than its layout allows."""
        for key, call, lead in recorder.calls:
            if all(operand.name in self.slow for operand, _ in call.uses()):
                continue
            layout = self._layouts.get(key)
            if key not in self._layouts or (layout is not None and not layout.fits(lead, samples)):
                return True
        return False

    def _settle(self, recorder: Recorder, losses: Tensor, uses: Uses, samples: int) -> None:
        """Choose each parameter's way before anything is summed.

        A parameter that an ordinary backward would still reach has a use that no rule saw: what the rules saw of it
        is incomplete, and it goes the per-sample way with all its uses. So does one whose rows lie elsewhere than its
        layout says, in a model that picks rows by their values.
        """
        names, operands = self._names, recorder.operands
        behind = {
            place: frozenset(names[leaf] for leaf in leaves(operands.computed[place]) & names.keys())
            for _, call, _ in recorder.calls
            for operand, _ in call.uses()
            if (place := operand.computed) is not None
        }

        def parameters(operand: Operand) -> frozenset[str]:
            return frozenset((operand.name,)) if operand.computed is None else behind[operand.computed]

        slow = {names[leaf] for leaf in leaves(losses) & names.keys()}
        slow.update(name for place in behind if operands.changed(place) for name in behind[place])
        kinds: dict[str, dict[Operand, list[type[Contribution]]]] = defaultdict(lambda: defaultdict(list))
        for key, call, lead in recorder.calls:
            split = self._split(key, call, lead, samples)
            if split is not None:
                uses.splits[key] = split
            for operand, kind in call.uses():
                for name in parameters(operand):
                    kinds[name][operand].append(kind)
                    if split is None:
                        slow.add(name)
        if samples > 1 and recorder.picked:
            wrong = misplaced(losses, recorder, uses.splits)
            for key, call, _ in recorder.calls:
                if key in wrong:
                    slow.update(name for operand, _ in call.uses() for name in parameters(operand))
        self.slow.update({name: self._params[name] for name in slow})
        for _, call, _ in recorder.calls:
            call.drop(lambda operand: parameters(operand) <= self.slow.keys())
        for name, found in kinds.items():
            if name not in self.slow:
                uses.plan(name, found)
        self.materialised |= uses.materialised

    def _split(self, key: Key, call: Call, lead: torch.Size, samples: int) -> Split | None:
        """How to bring the samples of a call to the front, where that is certain."""
        if samples == 1:
            return _only_sample if call.accepts(lead.numel()) else None
        layout = self._layouts.get(key)
        if layout is None or not layout.fits(lead, samples) or not call.accepts(layout.places):
            return None
        return partial(layout.split, samples=samples)


def _only_sample(rows: Tensor) -> Tensor:  # [*] -> [1, *]
    return rows.unsqueeze(0)
