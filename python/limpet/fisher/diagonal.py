"""``diagonal_fisher``: the exact diagonal of the Fisher information of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from limpet import _checks
from limpet.fisher import batches as batch_reading
from limpet.fisher.accumulator import FisherAccumulator
from limpet.fisher.checks import buffers_kept
from limpet.fisher.labels import Loss
from limpet.fisher.result import DiagonalFisher


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: str = "data",
    loss: Loss | None = None,
    seed: int = 0,
    max_samples: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> DiagonalFisher:
    r"""The exact diagonal of the Fisher information, at about the price of one backward pass.

    .. math:: F_i = \frac1N \sum_n \Big(\frac{\partial}{\partial\theta_i} \log p(y_n \mid x_n, \theta)\Big)^2

    (Kirkpatrick et al. 2017; Kunstner et al. 2019, eq. 3.) Each sample's *own* gradient is squared, never a batch's
    mean. It is computed for the model as it is: call ``model.eval()`` first if there is dropout or batch
    normalisation in it. Parameters that require a gradient are computed; tied ones appear once, under their first
    name.

    Whose labels :math:`y_n` are is the difference between the forms of it in use (van de Ven 2025), by ``labels``:

    - ``"data"``: the targets that the batches give; the *empirical* Fisher information.
    - ``"sampled"``: one label per sample, and per place of outputs ``[N, C, *]``, drawn from the model's own softmax
      by a random number that depends on ``seed``, sample and place alone: the same labels however the data are cut
      into batches. An unbiased estimate of ``"expected"``. Targets of -100 stay without a label.
    - ``"expected"``: the exact expectation over the model's own distribution, in one forward pass, and one backward
      pass for each column of a factor of the scores' covariance: C - 1 of them at each place (C with a ``loss`` of
      your own). A binary classification costs what ``"data"`` costs, one over ten classes nine backward passes, and a
      language model would cost thousands.
    - ``"sampled_batched"``: labels are drawn, and the square of each batch's summed gradient stands for the sum of the
      squares, divided by all samples: unbiased too, with more variance, for one ordinary backward pass (the
      Gauss-Newton-Bartlett estimator of Liu et al. 2023, arXiv 2305.14342).
    - ``"batched"``: the mean gradient of each batch squared, averaged with the batches' sizes as weights. It is *not*
      the Fisher information, warns that it is not, and is here to reproduce old results.

    Labels are drawn, and expected, from softmax over dimension 1 of outputs ``[N, C, *]``, or over the last dimension
    of outputs with ``logits`` ``[N, *, C]`` (Hugging Face), and then stand in for the targets, which may be None. A
    ``loss`` of your own must be minus the logarithm of that same distribution: of the label at a place by the scores at
    that place, without a shift.

    Functions that use parameters are seen as they are called, and the per-sample gradients are squared and summed
    while they are formed. Which rows of an activation belong to which sample is found out on up to three samples of
    the first batch; a model that picks rows by their values (routed experts, packed sequences) is checked in every
    batch, by two more passes through the activations' gradients. Parameters for which that is not certain, or which
    are used in a way that no rule covers, are computed exactly by one backward pass per sample.

    Args:
        model: on one device, in float32, float64, bfloat16 or float16. It comes back as it was found.
        batches: pairs ``(inputs, targets)``. ``inputs`` is a tensor, a tuple (``model(*inputs)``) or a mapping
            (``model(**inputs)``); the first dimension of its tensors counts samples.
        labels: ``"data"``, ``"sampled"``, ``"expected"``, ``"sampled_batched"`` or ``"batched"``, see above.
        loss: ``loss(outputs, targets)`` gives one value per sample, ``[N]``: minus its log-likelihood. When not
            given, cross-entropy, summed over the places of outputs ``[N, C, *]``.
        seed: from 0 to 2^64 - 1; what labels are drawn from. No other mode uses it.
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
            loss or gradient is not finite, activations are checkpointed, inference mode is on.

    Warns:
        UserWarning: ``labels="batched"`` was asked for.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> fisher = diagonal_fisher(model, [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1]))])
    >>> fisher["weight"]
    tensor([[1.2500, 0.5000],
            [1.2500, 0.5000]])
    >>> fisher.num_samples, fisher.routes
    (2, {'weight': 'fused'})
    >>> diagonal_fisher(model, [(torch.tensor([[1.0, 2.0]]), None)], labels="expected")["weight"]
    tensor([[0.2500, 1.0000],
            [0.2500, 1.0000]])
    """
    if max_samples is not None:
        _checks.integer("max_samples", max_samples, minimum=1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {_checks.describe(progress)}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of pairs (inputs, targets), got {_checks.describe(batches)}")
    accumulator = FisherAccumulator(model, labels=labels, loss=loss, seed=seed)
    total = batch_reading.count(batches, max_samples)
    with buffers_kept(model) as buffers:
        for batch in batch_reading.up_to(batches, max_samples):
            accumulator._add(batch, buffers if accumulator.num_samples == 0 else None)
            if progress is not None:
                progress(accumulator.num_samples, total)
        buffers.check()
    if accumulator.num_samples == 0:
        raise ValueError("batches must hold at least one batch, got none")
    return accumulator._finish()
