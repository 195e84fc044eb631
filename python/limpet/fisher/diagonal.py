"""``diagonal_fisher``: the exact diagonal of the empirical Fisher information of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from limpet import _checks
from limpet.fisher import batches as batch_reading
from limpet.fisher.batches import Batch, Loss, cross_entropy, losses_of
from limpet.fisher.checks import LABELS, buffers_kept, tracked_parameters
from limpet.fisher.contributions import Contribution, join, joinable
from limpet.fisher.layout import Layout
from limpet.fisher.per_sample import add_squares, same_loss
from limpet.fisher.picks import misplaced
from limpet.fisher.probe import Probe
from limpet.fisher.recorder import Key, Recorder, leaves
from limpet.fisher.rules import Call
from limpet.fisher.rules.base import Saved
from limpet.fisher.sums import Sums


class DiagonalFisher(Mapping[str, Tensor]):
    """The diagonal of the Fisher information, by parameter name.

    Attributes:
        num_samples: samples that the mean was taken over.
        routes: for each name ``"fused"`` (one backward pass per batch; also for parameters that the model never uses,
            whose value is zero) or ``"per_sample"`` (one backward pass per sample, in at least one batch). Both are
            exact.
    """

    def __init__(self, values: Mapping[str, Tensor], num_samples: int, routes: Mapping[str, str]) -> None:
        self._values, self.num_samples, self.routes = dict(values), num_samples, dict(routes)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        slow = sum(route == "per_sample" for route in self.routes.values())
        return f"DiagonalFisher({len(self)} parameters, {slow} of them per sample; {self.num_samples} samples)"


class _Computation:
    """The sums over the batches so far, and what is known of the model's calls."""

    def __init__(self, model: nn.Module, loss: Loss, params: Mapping[str, Tensor]) -> None:
        self._model, self._loss, self._params = model, loss, params
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
            add_squares(self._model, batch, self._loss, self.slow, self.sums.running, losses)
        self.sums.end_batch()

    def _add_fused(self, batch: Batch) -> Tensor:  # [N]
        probe = self._probe(batch) if batch.size > 1 and not self._layouts else None
        uses = _Uses(self.sums.running)
        recorder = Recorder(self._names, None, uses.arrived)
        with recorder:
            losses = losses_of(self._model, batch, self._loss)
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
            torch.autograd.grad(losses, recorder.anchor, torch.ones_like(losses), allow_unused=True)
            uses.finish()
        return losses.detach()

    def _probe(self, batch: Batch) -> Probe:
        probe = Probe(self._model, batch, self._loss, self._names)
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


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: str = "data",
    loss: Loss | None = None,
    max_samples: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> DiagonalFisher:
    r"""The exact diagonal of the empirical Fisher information, at about the price of one backward pass.

    .. math:: F_i = \frac1N \sum_n \Big(\frac{\partial}{\partial\theta_i} \log p(y_n \mid x_n, \theta)\Big)^2

    (Kirkpatrick et al. 2017; Kunstner et al. 2019, eq. 3.) Each sample's *own* gradient is squared, never a batch's
    mean. It is computed for the model as it is: call ``model.eval()`` first if there is dropout or batch
    normalisation in it. Parameters that require a gradient are computed; tied ones appear once, under their first
    name.

    Functions that use parameters are seen as they are called, and the per-sample gradients are squared and summed
    while they are formed. Which rows of an activation belong to which sample is found out on up to three samples of
    the first batch; a model that picks rows by their values (routed experts, packed sequences) is checked in every
    batch, by two more passes through the activations' gradients. Parameters for which that is not certain, or which
    are used in a way that no rule covers, are computed exactly by one backward pass per sample.

    Args:
        model: on one device, in float32, float64, bfloat16 or float16. It comes back as it was found.
        batches: pairs ``(inputs, targets)``. ``inputs`` is a tensor, a tuple (``model(*inputs)``) or a mapping
            (``model(**inputs)``); the first dimension of its tensors counts samples.
        labels: ``"data"``: the targets that the batches give (the empirical Fisher).
        loss: ``loss(outputs, targets)`` gives one value per sample, ``[N]``: minus its log-likelihood. When not
            given, cross-entropy, summed over the places of outputs ``[N, C, *]``.
        max_samples: stop after exactly so many samples.
        progress: called after each batch with the samples done, and how many there will be where that is known.

    Returns:
        A mapping from names to tensors of the parameters' shapes, float32 (float64 for float64 parameters), with
        ``num_samples`` and ``routes``.

    Raises:
        TypeError: an argument or a batch is not what it must be.
        ValueError: an argument's value cannot be used, there are no batches, or the loss does not give one value per
            sample.
        RuntimeError: the result would not be exact: samples interact, the model is random or changes its buffers, a
            loss or gradient is not finite, activations are checkpointed, inference mode or autocast is on.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> fisher = diagonal_fisher(model, [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1]))])
    >>> fisher["weight"]
    tensor([[1.2500, 0.5000],
            [1.2500, 0.5000]])
    >>> fisher.num_samples, fisher.routes
    (2, {'weight': 'fused'})
    """
    _checks.one_of("labels", labels, LABELS)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be callable, got {_checks.describe(loss)}")
    if max_samples is not None:
        _checks.integer("max_samples", max_samples, minimum=1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {_checks.describe(progress)}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of pairs (inputs, targets), got {_checks.describe(batches)}")
    params = tracked_parameters(model)

    total = batch_reading.count(batches, max_samples)
    done = 0
    with buffers_kept(model) as buffers:
        computation = _Computation(model, loss or cross_entropy, params)
        for batch in batch_reading.up_to(batches, max_samples):
            try:
                with torch.enable_grad():
                    computation.add(batch)
            except CheckpointError as error:
                raise RuntimeError(
                    "the model runs its functions again in backward, out of sight (torch.utils.checkpoint): "
                    "switch checkpointing off for diagonal_fisher"
                ) from error
            if done == 0:
                buffers.check()
            done += batch.size
            if progress is not None:
                progress(done, total)
        buffers.check()
        if done == 0:
            raise ValueError("batches must hold at least one batch, got none")
    routes = {name: "per_sample" if name in computation.slow else "fused" for name in params}
    return DiagonalFisher(computation.sums.mean(done), done, routes)
