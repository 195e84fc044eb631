"""Squared per-sample gradients of the batches so far, each parameter by the fastest way that is exact for it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from limpet import _core
from limpet.fisher.batches import Batch, Objective, losses_of
from limpet.fisher.contributions import Contribution
from limpet.fisher.layout import Layout
from limpet.fisher.mixing import Mixing
from limpet.fisher.operands import Operand
from limpet.fisher.per_sample import add_squares, same_loss
from limpet.fisher.plans import Plans, add_together, identity
from limpet.fisher.precision import LossScale, gradients, without_tf32
from limpet.fisher.probe import Probe
from limpet.fisher.reading import Look
from limpet.fisher.recorder import Key, Recorder
from limpet.fisher.row_check import RowCheck
from limpet.fisher.rules.base import Split, prepare
from limpet.fisher.shared_inputs import told_apart
from limpet.fisher.sums import Sums
from limpet.fisher.uses import Uses

_ROUNDS = 4  # of probing: each may find calls that compute parameters from parameters, whose uses the next one sees

Kinds = dict[str, dict[Operand, list[type[Contribution]]]]  # by parameter and operand, each use's kind
Behind = dict[int, frozenset[str]]  # by the place of a computed tensor, the parameters it was computed from


class Computation:
    """The sums over the batches so far, and what is known of the model's calls."""

    def __init__(self, model: nn.Module, objective: Objective, params: Mapping[str, Tensor]) -> None:
        self._model, self._objective, self._params = model, objective, params
        self._names = {id(p): name for name, p in params.items()}
        self._device = next(iter(params.values())).device
        if self._device.type == "cpu":
            # glibc is to keep what one batch frees for the next, up to 1 GB: returned to the system, the pages of the
            # activations would be cleared again in every batch, which took 5 % of an encoder's pass.
            _core.keep_freed_memory()
        self._layouts: dict[Key, Layout | None] = {}
        self._declined: set[Key] = set()
        self._changing: dict[Key, Tensor] = {}  # bool [T]: places whose rows were seen to change with their sample
        self._checked: set[int] = set()  # the identities of the passes that were checked
        self._plans = Plans()
        self._doubtful: set[Key] = set()  # calls whose rows are checked in every batch
        self._mixing = Mixing()
        self.loss_scale = LossScale()
        self.sums = Sums(params)
        self.slow: dict[str, Tensor] = {}  # the parameters that go the per-sample way, from some batch on
        self.materialised: set[str] = set()  # those whose per-sample gradients are formed in some batch

    def add(self, batch: Batch, looks: Sequence[Look] = ()) -> None:
        """Add one batch's squared gradients; ``looks`` are heeded before, if it may be one of known calls."""
        with _surroundings(self._device), _uncompiled():
            batch = told_apart(self._model, batch, self._objective)
            self.loss_scale.add(self.sums.running, self._params, partial(self._add, batch, looks))
        self.sums.end_batch()

    def _add(self, batch: Batch, looks: Sequence[Look], sums: Mapping[str, Tensor], scale: float) -> None:
        if len(self.slow) < len(self._params):
            self._add_fused(batch, looks, sums, scale)
        else:
            self._add_slow(batch, None, sums, scale)

    def _add_slow(
        self,
        batch: Batch,
        losses: Tensor | None,  # [N, K]
        sums: Mapping[str, Tensor],
        scale: float,
    ) -> None:
        self._refuse_hooks(self.slow.keys())
        if self.slow:
            add_squares(self._model, batch, self._objective, self.slow, sums, losses, scale)

    def _add_fused(self, batch: Batch, looks: Sequence[Look], sums: Mapping[str, Tensor], scale: float) -> None:
        probe = self._probe(batch) if batch.size > 1 and not self._layouts else None
        recorder, losses = self._forward(batch, (self.sums, *looks) if self._plans else (self.sums,))
        if probe is None and (uses := self._planned(recorder, losses, batch.size, sums)) is not None:
            self._differentiate(losses, recorder, uses, scale)
            return
        if recorder.taker.outputs:  # an earlier batch's calls were taken for this one's
            self._plans.begin_anew()
            recorder, losses = self._forward(batch)
        if batch.size > 1 and probe is None and self._unknown(recorder, batch.size):
            declined = set(self._declined)
            probe = self._probe(batch)
            if declined != self._declined:
                recorder, losses = self._forward(batch)
        if probe is not None:
            same_loss(probe.losses, losses.detach()[probe.samples.to(losses.device)], batch, probe.samples)
            self._mixing.learn(probe.spans, recorder.spans)
        uses = self._uses(recorder, losses, sums)
        kinds, behind = self._settle(recorder, losses, uses, batch.size)
        checked = self._is_checked(recorder, batch.size)
        check = None
        if checked and self.sums.batches == 0 and losses.shape[1] == 1:
            # Its own pass serves the check, as nothing is lost if that fails. Another forward pass costs less than
            # the memory of a graph that is kept: then the largest gradients would be held beside the activations.
            check = RowCheck(losses, recorder, uses.splits, scale, keep=False)
            recorder, losses = self._forward(batch)
            uses = self._uses(recorder, losses, sums)
            kinds, behind = self._settle(recorder, losses, uses, batch.size)
            recorder.receiver.on_backward = check.before(uses.arrived)
        elif checked:
            before = RowCheck(losses, recorder, uses.splits, scale, keep=True)
            before.run_plain()
            self._heed(before, recorder, behind)
        self._plan(recorder, uses, kinds, behind)
        self._add_slow(batch, losses.detach(), sums, scale)  # first, as it may find that samples interact
        if len(self.slow) == len(self._params):
            return
        self._differentiate(losses, recorder, uses, scale)
        if check is not None and self._heed(check, recorder, behind):
            for total in sums.values():
                total.zero_()
            self._add_fused(batch, (), sums, scale)
        else:
            self._keep_plan(recorder, losses, uses, batch.size)

    def _differentiate(self, losses: Tensor, recorder: Recorder, uses: Uses, scale: float) -> None:  # losses [N, K]
        prepare(call for _, call, _ in recorder.calls)
        columns = losses.unbind(dim=1) if losses.shape[1] > 1 else (losses,)
        for column in columns:
            last = column is columns[-1]
            at = [recorder.anchor, *recorder.taker.outputs]
            _, *output_grads = gradients(column, at, torch.full_like(column, scale), retain_graph=not last)
            if output_grads:
                recorder.taker.add(output_grads)
            uses.finish(last)

    def _forward(self, batch: Batch, looks: Sequence[Look] = ()) -> tuple[Recorder, Tensor]:  # losses [N, K]
        recorder = Recorder(self._names, self._declined, _nothing, earlier=self._plans.given)
        with recorder:
            losses = losses_of(self._model, batch, self._objective, looks)
        if not losses.requires_grad:
            raise RuntimeError(
                f"the losses of batch {batch.number} do not depend on any parameter that requires a gradient: "
                "is something detached or under no_grad?"
            )
        return recorder, losses

    def _uses(self, recorder: Recorder, losses: Tensor, sums: Mapping[str, Tensor]) -> Uses:  # losses [N, K]
        uses = Uses(sums, self._params, recorder.operands.computed, losses.shape[1])
        recorder.receiver.on_backward = uses.arrived
        return uses

    def _planned(
        self,
        recorder: Recorder,
        losses: Tensor,  # [N, K]
        samples: int,
        sums: Mapping[str, Tensor],
    ) -> Uses | None:
        """What was settled for an earlier batch of the same calls, where nothing is left to find out about this one."""
        uses = self._plans.find(recorder, (samples, losses.shape[1]), sums)
        if uses is None or self._mixing.possible(recorder.spans, samples) or self._leaves(losses):
            return None
        self._refuse_hooks(uses.materialised)
        recorder.receiver.on_backward = uses.arrived
        return uses

    def _keep_plan(self, recorder: Recorder, losses: Tensor, uses: Uses, samples: int) -> None:
        """Keep what was settled, where it does not depend on the batch's values: it costs as much as a small layer."""
        self._plans.begin_anew()
        if self.slow or recorder.operands.computed or uses.sums is not self.sums.running:
            return
        if self._doubtful.isdisjoint(key for key, _, _ in recorder.calls):
            if samples > 1 and losses.shape[1] == 1:
                add_together(recorder, uses, self._layouts, self._params)
            self._plans.keep(recorder, (samples, losses.shape[1]), uses)

    def _probe(self, batch: Batch) -> Probe:
        self._plans.clear()
        for _ in range(_ROUNDS):
            probe = Probe(self._model, batch, self._objective, self._names, self._declined)
            self._layouts.update(probe.layouts)
            self._changing.update(probe.changing)
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

    def _settle(self, recorder: Recorder, losses: Tensor, uses: Uses, samples: int) -> tuple[Kinds, Behind]:
        """Find each call's samples, and each parameter's uses.

        A parameter that an ordinary backward would still reach has a use that no rule saw: what the rules saw of it
        is incomplete, and it goes the per-sample way with all its uses.
        """
        operands = recorder.operands
        behind = {
            operand.computed: self._leaves(operands.computed[operand.computed])
            for _, call, _ in recorder.calls
            for operand, _ in call.uses()
            if operand.computed is not None
        }
        slow = set(self._leaves(losses))
        slow.update(name for place in behind if operands.changed(place) for name in behind[place])
        kinds: Kinds = defaultdict(lambda: defaultdict(list))
        for key, call, lead in recorder.calls:
            split = self._split(key, lead, samples)
            if split is not None:
                uses.splits[key] = split
            for operand, kind in call.uses():
                for name in _parameters(operand, behind):
                    kinds[name][operand].append(kind)
                    if split is None:
                        slow.add(name)
        self.slow.update({name: self._params[name] for name in slow})
        return kinds, behind

    def _leaves(self, tensor: Tensor) -> frozenset[str]:
        return frozenset(self._names[leaf] for leaf in _core.leaves(tensor.grad_fn) if leaf in self._names)

    def _is_checked(self, recorder: Recorder, samples: int) -> bool:
        """Whether the rows are to be checked in this batch.

        They are where shapes are new, or the values by which rows are picked, where a function combined or moved the
        rows of several samples, and where a call was not seen to depend on its samples.
        """
        seen = identity(recorder)
        known = seen in self._checked
        self._checked.add(seen)
        doubtful = any(key in self._doubtful for key, _, _ in recorder.calls)
        return samples > 1 and (not known or doubtful or self._mixing.possible(recorder.spans, samples))

    def _heed(self, check: RowCheck, recorder: Recorder, behind: Behind) -> bool:
        """Let parameters whose rows lie elsewhere go the per-sample way; whether there were any."""
        self._plans.clear()
        wrong = check.wrong()
        names = {
            name
            for key, call, _ in recorder.calls
            if key in wrong
            for operand, _ in call.uses()
            for name in _parameters(operand, behind)
        } - self.slow.keys()
        self.slow.update({name: self._params[name] for name in names})
        for key, layout in self._layouts.items():
            if layout is None or layout.places == 1 or key not in check.checked:
                continue
            seen, changing = check.reached(key), self._changing[key].to(check.reached(key).device)
            if not (seen | changing if seen.shape == changing.shape else seen).all():
                self._doubtful.add(key)
        return bool(names)

    def _plan(self, recorder: Recorder, uses: Uses, kinds: Kinds, behind: Behind) -> None:
        for _, call, _ in recorder.calls:
            call.drop(lambda operand: _parameters(operand, behind) <= self.slow.keys())
        for name, found in kinds.items():
            if name not in self.slow:
                uses.plan(name, found)
        self.materialised |= uses.materialised
        self._refuse_hooks(self.slow.keys() | uses.materialised)

    def _refuse_hooks(self, names: Set[str]) -> None:
        """Gradient hooks do not run on the fused way, and would on the others."""
        for name in names:
            if self._params[name]._backward_hooks:
                raise RuntimeError(
                    f"parameter {name!r} has a gradient hook, which would act on each sample's gradient: remove it"
                )

    def _split(self, key: Key, lead: torch.Size, samples: int) -> Split | None:
        """How to bring the samples of a call to the front, where that is certain."""
        if samples == 1:
            return _only_sample
        layout = self._layouts.get(key)
        if layout is None or not layout.fits(lead, samples):
            return None
        return partial(layout.split, samples=samples)


class _KeptMemory(AbstractContextManager[None]):
    """Take blocks of over 32 MB from the memory that is kept, too: a third of a GPT-2's pass was clearing them."""

    def __enter__(self) -> None:
        _core.hold_large_blocks(True)

    def __exit__(self, *_: object) -> None:
        _core.hold_large_blocks(False)


def _surroundings(device: torch.device) -> AbstractContextManager[None]:
    return _KeptMemory() if device.type == "cpu" else without_tf32(device)


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled models as they were written: a compiler would trace the recorder, too."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _parameters(operand: Operand, behind: Behind) -> frozenset[str]:
    return frozenset((operand.name,)) if operand.computed is None else behind[operand.computed]


def _only_sample(rows: Tensor) -> Tensor:  # [*] -> [1, *]
    return rows.unsqueeze(0)


def _nothing(*_: object) -> None:
    """No gradient is followed yet."""
