"""Memory Aware Synapses (Aljundi et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.fisher import batches as batch_reading
from limpet.fisher.batches import Batch, call
from limpet.methods import shards
from limpet.methods.quadratic import QuadraticRegularizer, evaluating
from limpet.methods.storage import NARROW_KEYS, Storage, latest


class MemoryAwareSynapses(QuadraticRegularizer):
    r"""Keep parameters to which the network's output is sensitive near where earlier tasks left them.

    .. math:: \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2, \qquad
        \Omega_i \mathrel{+}= \frac1N \sum_n
        \left| \frac{\partial \lVert f(x_n; \theta) \rVert_2^2}{\partial \theta_i} \right|

    (Aljundi et al. 2018, eq. 2 to 5; no half in front of lambda.) No labels are used. The absolute value is taken of
    *each sample's own* gradient, as the paper has it; the gradient of a batch's mean, which public code takes, lets
    samples cancel each other. Importances of tasks add up, and the anchor is the latest task's parameters.

    Absolute values do not come out of a matrix product as squares do: there is no fused pass here. :meth:`consolidate`
    makes one forward and backward pass of a single sample for every sample, which costs what training with batch size
    one costs; ``max_samples`` bounds it. The penalty costs what EWC's costs.

    Args:
        model: the network to protect. It may grow, as for :class:`limpet.EWC`.
        strength: lambda, at least 0. It may be changed at any time.
        importance_format: as for :class:`limpet.EWC`.
        anchor_format: as for :class:`limpet.EWC`.

    Raises:
        TypeError: ``model`` is no module, ``strength`` is no number, or a parameter is float64 and a format is
            narrower.
        ValueError: ``strength`` is out of range, or there is no such format.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> mas = MemoryAwareSynapses(model, strength=1.0)
    >>> mas.consolidate([(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), None)])
    >>> mas.importances["weight"]  # the mean of |2 * 1 * 1| and |2 * -2 * -2|, and zero
    tensor([[5., 0.]])
    """

    _factor = 2.0
    _optional_keys = NARROW_KEYS

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        importance_format: str = "float32",
        anchor_format: str = "float32",
    ) -> None:
        super().__init__(model, strength, Storage(importance_format, anchor_format))

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        max_samples: int | None = None,
        progress: Callable[[int, int | None], object] | None = None,
    ) -> None:
        """Protect what has been learnt: measure the output's sensitivity on a task's data, anchor the parameters here.

        The model is evaluated in evaluation mode and comes back as it was. Parameters that are frozen meanwhile keep
        the protection they had.

        Args:
            batches: pairs ``(inputs, targets)``, as :func:`limpet.diagonal_fisher` takes them; targets are not looked
                at and may be None. The model's output for them must be a tensor.
            max_samples: use at most so many samples.
            progress: called after each batch with the samples done so far, and their number where it is known.

        Raises:
            TypeError: an argument, a batch or the model's output is not what it must be.
            ValueError: there are no batches, or no parameter requires a gradient.
            RuntimeError: a gradient is not finite, or a protected parameter has left the model or shrunk. Whatever is
                raised, nothing has been consolidated then.
        """
        if max_samples is not None:
            _checks.integer("max_samples", max_samples, minimum=1)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, got {_checks.describe(progress)}")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of pairs (inputs, targets), got {_checks.describe(batches)}")
        learning = {name: p for name, p in self._check_model().items() if p.requires_grad}
        if not learning:
            raise ValueError("model has no parameters that require a gradient")
        shards.require_whole(learning)
        total = batch_reading.count(batches, max_samples)
        sums = {name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for name, p in learning.items()}
        done = 0
        with evaluating(self.model):
            for batch in batch_reading.up_to(batches, max_samples):
                for n in range(batch.size):
                    self._add_sample(sums, learning, batch, n)
                done += batch.size
                if progress is not None:
                    progress(done, total)
        if not done:
            raise ValueError("batches must hold at least one batch, got none")
        for name, value in sums.items():
            if not bool(value.isfinite().all()):
                raise RuntimeError(f"the gradient of {name!r} is not finite")
        for value in sums.values():
            value.div_(done)
        self._merge(sums, latest(1.0))

    end_task = consolidate

    def _add_sample(self, sums: dict[str, Tensor], params: dict[str, nn.Parameter], batch: Batch, n: int) -> None:
        """Add the absolute gradient of the squared norm of one sample's output."""
        inputs = batch.take(slice(n, n + 1)).inputs
        with torch.enable_grad():
            outputs = call(self.model, inputs)
            if not isinstance(outputs, Tensor):
                raise TypeError(f"the model's output must be a tensor, got {_checks.describe(outputs)}")
            norm = outputs.square().sum()
        grads = torch.autograd.grad(norm, list(params.values()), allow_unused=True)
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += grad.abs()

    def __repr__(self) -> str:
        return f"MemoryAwareSynapses(strength={self.strength:g}, num_tasks={self.num_tasks}{self._storage.text})"
