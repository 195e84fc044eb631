"""``diagonal_fisher``: the exact diagonal of the empirical Fisher information of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from limpet import _checks
from limpet.fisher import batches as batch_reading
from limpet.fisher.checks import buffers_kept, tracked_parameters
from limpet.fisher.computation import Computation
from limpet.fisher.labels import LABELS, Loss, cross_entropy, from_data


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
        computation = Computation(model, from_data(loss or cross_entropy), params)
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
    routes = {
        name: "per_sample"
        if name in computation.slow
        else "materialised"
        if name in computation.materialised
        else "fused"
        for name in params
    }
    return DiagonalFisher(computation.sums.mean(done), done, routes)
