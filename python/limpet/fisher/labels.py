"""The label modes: which losses the Fisher information squares the gradients of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet import _checks
from limpet.fisher.batches import Batch, Objective
from limpet.reference import philox

Loss = Callable[[Any, Any], Tensor]

LABELS = ("data", "sampled", "expected", "batched", "sampled_batched")

_IGNORED = -100  # cross_entropy's ignore_index: places without a label
_AT_ONCE = 1 << 22  # probabilities held at once while labels are drawn, in float64


def objective_of(labels: str, loss: Loss | None, seed: int) -> Objective:
    """The losses of a label mode."""
    if labels in ("sampled", "sampled_batched"):
        return sampled(loss, seed)
    if labels == "expected":
        return expected_scores if loss is None else expected(loss)
    return from_data(loss or cross_entropy)


def from_data(loss: Loss) -> Objective:
    """The loss of the targets that the batches give."""

    def objective(outputs: Any, batch: Batch) -> Tensor:  # [N, 1]
        losses = loss(outputs, batch.targets)
        with torch._C.DisableTorchFunction():
            return one_per_sample(losses, batch.size).unsqueeze(1)

    return objective


def sampled(loss: Loss | None, seed: int) -> Objective:
    """The loss of one label per sample and place, drawn from the model's own output.

    The random number of a label depends on ``(seed, sample, place)`` alone, and so neither on how samples are cut into
    batches nor on what was drawn before. A batch is evaluated several times; the batch keeps its labels, for a last
    bit that differs could turn a draw.
    """
    key = seed & 0xFFFFFFFF, seed >> 32

    def objective(outputs: Any, batch: Batch) -> Tensor:  # [N, 1]
        with torch._C.DisableTorchFunction():  # draws of ours, not the model's: the recorder is not to see them
            logits = logits_of(outputs, batch).detach()
            numbers = batch.samples
            missing = [row for row, number in enumerate(numbers) if number not in batch.drawn]
            if missing:
                rows = torch.tensor(missing, device=logits.device)
                labels = draw(logits[rows], torch.tensor([numbers[row] for row in missing]), key)
                for row, label in zip(missing, labels.unbind(), strict=True):
                    batch.drawn.setdefault(numbers[row], label)
            labels = torch.stack([batch.drawn[number] for number in numbers])
            labels = labels.masked_fill(_ignored(batch, labels), _IGNORED)
        losses = cross_entropy(logits_of(outputs, batch), labels) if loss is None else loss(outputs, labels)
        return one_per_sample(losses, batch.size).unsqueeze(1)

    return objective


def draw(
    logits: Tensor,  # [N, C, *]
    samples: Tensor,  # int64 [N]
    key: tuple[int, int],
) -> Tensor:  # int64 [N, *]
    """One label per sample and place from softmax over dimension 1, by the inverse of the distribution function."""
    flat = logits.flatten(2) if logits.dim() > 2 else logits.unsqueeze(2)  # [N, C, T]
    step = max(1, _AT_ONCE // max(1, flat[0].numel()))
    labels = []
    for some, numbers in zip(flat.split(step), samples.to(flat.device).split(step), strict=True):
        below = torch.softmax(some.double(), dim=1).cumsum(dim=1)  # P(label <= c)
        counter = torch.zeros(some.shape[0], some.shape[2], 4, dtype=torch.int64, device=flat.device)
        counter[..., 0] = (numbers & 0xFFFFFFFF).unsqueeze(1)
        counter[..., 1] = (numbers >> 32).unsqueeze(1)
        counter[..., 2] = torch.arange(some.shape[2], device=flat.device)
        words = philox(counter, key)
        uniform = ((words[..., 0] << 21) | (words[..., 1] >> 11)).double() * 2.0**-53  # [n, T], in [0, 1)
        last = (below < below[:, -1:]).sum(dim=1)  # the last class that has any probability, should the sum be < 1
        labels.append(torch.minimum((below <= uniform.unsqueeze(1)).sum(dim=1), last))
    return torch.cat(labels).reshape(logits.shape[:1] + logits.shape[2:])


def expected_scores(outputs: Any, batch: Batch) -> Tensor:  # [N, (C - 1) T]
    r"""Losses whose squared gradients sum to the expectation over the model's own distribution, for cross-entropy.

    The gradient of :math:`-\log p_y` in the logits has the covariance :math:`\mathrm{diag}(p) - p p^T = S S^T` with

    .. math:: S_{kk} = \sqrt{p_k r_{k+1} / r_k}, \quad S_{jk} = -p_j / r_{k+1} \, S_{kk} \; (j > k), \quad
        r_k = \sum_{j \ge k} p_j

    (its LDL factors; Tanabe and Sagae 1992), and the loss of column ``k`` is :math:`\sum_j S_{jk} z_j` with S held
    constant: C - 1 columns at each place.
    """
    logits = logits_of(outputs, batch)
    with torch._C.DisableTorchFunction():
        p = torch.softmax(logits.detach().double(), dim=1)
        tail = p.flip(1).cumsum(1).flip(1)  # r
        here, after = tail[:, :-1], tail[:, 1:]
        some = after > torch.finfo(after.dtype).tiny  # otherwise its inverse is infinite and the column below 1e-153
        diagonal = torch.where(some, (p[:, :-1] / torch.where(some, here, 1.0) * after).sqrt(), 0.0)
        diagonal = diagonal.masked_fill(_ignored(batch, p[:, 0]).unsqueeze(1), 0.0)
        inverse = torch.where(some, after, 1.0).reciprocal()
    z = logits.double()
    means = (p * z).flip(1).cumsum(1).flip(1)[:, 1:] * inverse  # of the logits of the classes after k
    return (diagonal * (z[:, :-1] - means)).to(logits.dtype).flatten(1)


def expected(loss: Loss) -> Objective:
    """Losses whose squared gradients sum to the expectation over the model's own distribution, for any loss.

    Column ``(place, c)`` is ``sqrt(p_c) loss(outputs, c)`` with every other place ignored.
    """

    def objective(outputs: Any, batch: Batch) -> Tensor:  # [N, C T]
        with torch._C.DisableTorchFunction():
            logits = logits_of(outputs, batch).detach()
            p = torch.softmax(logits.double(), dim=1)
            nothing = torch.full_like(p[:, 0], _IGNORED, dtype=torch.int64)  # [N, *]
            weights = p.sqrt().masked_fill(_ignored(batch, nothing).unsqueeze(1), 0.0).to(logits.dtype)
            weights, nothing = weights.reshape(*p.shape[:2], -1), nothing.reshape(batch.size, -1)  # [N, C, T], [N, T]
        columns = []
        for place in range(nothing.shape[1]):
            for label in range(p.shape[1]):
                with torch._C.DisableTorchFunction():
                    labels = nothing.clone()
                    labels[:, place] = label
                    labels = labels.reshape(batch.size, *p.shape[2:])
                columns.append(one_per_sample(loss(outputs, labels), batch.size))
        losses = torch.stack(columns, dim=1)
        if nothing.shape[1] > 1:
            _require_sum_over_places(losses.detach(), loss, outputs, torch.zeros_like(labels))
        return losses * weights.transpose(1, 2).flatten(1)

    return objective


def _require_sum_over_places(
    losses: Tensor,  # [N, T C]
    loss: Loss,
    outputs: Any,
    zeros: Tensor,  # int64 [N, *]
) -> None:
    """Require that a loss is the sum of its places' losses, where -100 marks places to ignore."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        together = loss(outputs, zeros)
        apart = losses.unflatten(1, (zeros[0].numel(), -1))[..., 0].sum(dim=1)
        bound = float(torch.finfo(losses.dtype).eps) ** 0.5 * together.abs().clamp(min=1.0)
        if not ((together - apart).abs() <= bound).all():
            raise ValueError(
                "labels='expected' takes places one by one: loss must sum over them and ignore labels of -100, "
                f"but gives {together[0].item():.6g} for class 0 everywhere and {apart[0].item():.6g} place by place"
            )


def logits_of(outputs: Any, batch: Batch) -> Tensor:  # [N, C, *]
    """The scores that softmax over dimension 1 turns into the model's distribution over labels."""
    logits = outputs
    if not isinstance(outputs, Tensor):
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() >= 2:
            logits = logits.movedim(-1, 1)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        raise TypeError(
            "labels from the model's own distribution need outputs of shape [N, C, *], or outputs with logits of "
            f"shape [N, *, C]; got {_checks.describe(outputs)}"
        )
    if logits.shape[0] != batch.size or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have a row for each of the {batch.size} samples and at least two classes, got "
            f"{_checks.describe(logits)} (as [N, C, *])"
        )
    return logits


def _ignored(batch: Batch, labels: Tensor) -> Tensor:  # [N, *] -> bool [N, *]
    """The places that the batch's targets leave without a label."""
    targets = batch.targets
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(
            "labels from the model's own distribution replace the targets, which must be a tensor or None, "
            f"got {_checks.describe(targets)}"
        )
    if targets is None or targets.is_floating_point() or targets.shape != labels.shape:
        return torch.zeros_like(labels, dtype=torch.bool)
    return (targets == _IGNORED).to(labels.device)


def cross_entropy(outputs: Any, targets: Any) -> Tensor:  # [N, C, *], [N, *] -> [N]
    """The default loss: minus the log-likelihood of the targets, summed over a sample's places."""
    with torch._C.DisableTorchFunction():  # nothing that the recorder would have to see
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            raise TypeError(
                "the default loss needs outputs of shape [N, C, *]; give loss= for this model, whose output is "
                f"{_checks.describe(outputs)}"
            )
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses.flatten(1).sum(dim=1) if losses.dim() > 1 else losses


def one_per_sample(losses: Any, samples: int) -> Tensor:  # [N]
    """The losses, checked for their shape."""
    if not isinstance(losses, Tensor) or losses.shape != (samples,) or not losses.is_floating_point():
        raise ValueError(
            f"loss must return one value per sample, a floating tensor of shape [{samples}] "
            f"(reduction='none'), got {_checks.describe(losses)}"
        )
    return losses
