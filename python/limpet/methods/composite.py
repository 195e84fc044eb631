"""Several regularizers of one model as one penalty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods import shards
from limpet.methods.collapse import Collapse, Quadratic
from limpet.methods.path_integral import PathIntegralRegularizer
from limpet.methods.quadratic import QuadraticRegularizer, add_grad_, lists


class Composite:
    r"""The sum of several regularizers' penalties, at the price of one.

    .. math:: \sum_k \frac{s_k}{2} F_k (\theta - a_k)^2 = \frac{S}{2} (\theta - A)^2
        + \frac12 \sum_k s_k F_k (a_k - A)^2, \qquad S = \sum_k s_k F_k, \quad A = \frac1S \sum_k s_k F_k a_k

    Whatever the number of regularizers, a step makes one pass over parameters, one anchor and one importance. These are
    computed when first asked for after a consolidation or a change of a strength, in float64, and held as the
    regularizers hold theirs: two more tensors of the model's size, once two of them protect something.

    Path integrals (of :class:`limpet.SynapticIntelligence` and :class:`limpet.RWalk`) see the task's own gradient:
    :meth:`before_step` lets them copy it before it adds the penalties'. Optimizers of :mod:`limpet.optim` collapse
    regularizers themselves: give them ``regularizers=composite.regularizers``.

    Args:
        regularizers: of one model, attached to no optimizer, with anchors and importances held as floats.

    Attributes:
        regularizers: as given. Their strengths may be changed at any time.
        model: the network that they protect.

    Raises:
        TypeError: ``regularizers`` is no sequence of regularizers of limpet, or one of them holds packed tensors.
        ValueError: there are none, one is given twice, or they protect different models.

    >>> import limpet
    >>> model = nn.Linear(2, 2)
    >>> ewc, mas = limpet.EWC(model, strength=10.0), limpet.MemoryAwareSynapses(model, strength=1.0)
    >>> both = Composite([ewc, mas])
    >>> both.end_task([(torch.randn(8, 2), torch.randint(2, (8,)))])
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> torch.allclose(both.penalty(), ewc.penalty() + mas.penalty())
    True
    """

    def __init__(self, regularizers: Sequence[QuadraticRegularizer]) -> None:
        if not isinstance(regularizers, (list, tuple)):
            raise TypeError(f"regularizers must be a list or tuple, got {_checks.describe(regularizers)}")
        if not regularizers:
            raise ValueError("regularizers must hold at least one, got none")
        for k, regularizer in enumerate(regularizers):
            if not isinstance(regularizer, QuadraticRegularizer):
                raise TypeError(f"regularizers[{k}] must be EWC or its like, got {_checks.describe(regularizer)}")
            if any(regularizer is other for other in regularizers[:k]):
                raise ValueError(f"regularizers[{k}] must be given once, got it twice")
            if regularizer.model is not regularizers[0].model:
                raise ValueError(f"regularizers[{k}] must protect the model that regularizers[0] protects")
        self.regularizers = tuple(regularizers)
        self.model: nn.Module = regularizers[0].model
        self._collapse = Collapse()
        self._check_floats()

    def penalty(self) -> Tensor:  # []
        """The sum of the penalties, to be added to the loss; without a graph if a path integral is among them.

        (Its gradient would be part of the loss's then, and path integrals must know the task's own:
        :meth:`before_step` adds it.)

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._integrating):
            params, anchors, importances, strength = self._collapsed()
            return shards.quadratic_penalty(*lists(params, anchors, importances), strength) + self._offset()

    def before_step(self) -> Tensor:  # []
        """Add the penalties' gradient to each ``.grad``, which holds the task's own; return the penalty.

        Call it once for each step, after the last ``backward()``, and with a gradient scaler after
        ``scaler.unscale_(optimizer)``.

        Returns:
            The sum of the penalties, without a graph.

        Raises:
            TypeError: a gradient is sparse or not of its parameter's dtype.
            RuntimeError: a regularizer is attached to an optimizer, a protected parameter has left the model or shrunk,
                or one was added, removed or resized in the middle of a task with a path integral. No gradient has
                changed then.
        """
        params, anchors, importances, strength = self._collapsed()
        for regularizer in self._integrating:
            regularizer.watch_step(params.keys())
        return add_grad_(params, anchors, importances, strength) + self._offset()

    add_penalty_grad_ = before_step

    def after_step(self) -> None:
        """Add the step that the parameters just made to the path integrals, if there are any.

        Raises:
            RuntimeError: there was no :meth:`before_step`. The path integrals have not changed then.
        """
        for regularizer in self._integrating:
            regularizer.after_step()

    def begin_fused_step(self) -> None:
        """Refuse to be one of ``regularizers=`` of :mod:`limpet.optim`: path integrals would not be seen.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a fused step collapses regularizers itself: give it regularizers=composite.regularizers")

    def quadratic(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """The one anchor and importance of each protected parameter by name, and the strength as the ops take it.

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        _, anchors, importances, strength = self._collapsed()
        return anchors, importances, strength

    def end_task(self, batches: Iterable[Any]) -> None:
        """Consolidate every regularizer with the task's data.

        Args:
            batches: ``(inputs, targets)``, as :meth:`limpet.EWC.consolidate` takes them. Each regularizer reads them
                anew, so they must be no iterator.

        Raises:
            TypeError: ``batches`` is an iterator, or as the regularizers.
            ValueError: as the regularizers.
            RuntimeError: as the regularizers. Whatever is raised, nothing has been consolidated then.
        """
        if isinstance(batches, Iterator):
            raise TypeError(f"batches must be readable several times, got the iterator {_checks.describe(batches)}")
        with self._all_or_none():
            for regularizer in self.regularizers:
                regularizer.end_task(batches)

    def state_dict(self) -> dict[str, Any]:
        """The regularizers' own states, in ``"regularizers"``; ``torch.load(..., weights_only=True)`` reads it."""
        return {"regularizers": [regularizer.state_dict() for regularizer in self.regularizers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict` of as many regularizers, in the same order.

        Raises:
            TypeError: a number or a tensor of a state is none, or a state holds packed tensors.
            ValueError: there are more or fewer states, or one does not fit its regularizer. Nothing has been taken over
                then.
        """
        states = state.get("regularizers") if isinstance(state, Mapping) and len(state) == 1 else None
        if not isinstance(states, (list, tuple)) or len(states) != len(self.regularizers):
            raise ValueError(
                f"state must hold 'regularizers', a list of {len(self.regularizers)} states, "
                f"got {_checks.describe(state if states is None else states)}"
            )
        with self._all_or_none():
            for regularizer, own in zip(self.regularizers, states, strict=True):
                regularizer.load_state_dict(own)
            self._check_floats()

    def __repr__(self) -> str:
        return f"Composite({list(self.regularizers)})"

    @property
    def _integrating(self) -> list[PathIntegralRegularizer]:
        return [regularizer for regularizer in self.regularizers if isinstance(regularizer, PathIntegralRegularizer)]

    def _check_floats(self) -> None:
        for k, regularizer in enumerate(self.regularizers):
            if regularizer.packed:
                raise TypeError(
                    f"regularizers[{k}] must hold its anchors and importances as floats: a sum of packed ones is not "
                    "packed. Leave it out and call its add_penalty_grad_() beside this"
                )

    def _collapsed(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor], float]:
        """The protected parameters by name, with their anchors and importances, and the one strength."""
        quadratics = [regularizer.quadratic() for regularizer in self.regularizers]
        every = dict(self.model.named_parameters())
        found: dict[Tensor, list[Quadratic]] = {}
        params = {name: param for name, param in every.items() if any(name in anchors for anchors, _, _ in quadratics)}
        for name, param in params.items():
            found[param] = [Quadratic(a[name], f[name], strength) for a, f, strength in quadratics if name in a]
        active = [strength for anchors, _, strength in quadratics if anchors]
        sums = self._collapse.sums(found, alike=len(active) > 1)  # one regularizer's tensors serve as they are
        return (
            params,
            {name: sums[param].anchor for name, param in params.items()},
            {name: sums[param].importance for name, param in params.items()},
            active[0] if len(active) == 1 else 1.0,
        )

    def _offset(self) -> float:
        """What the collapsed quadratic lacks, whatever the parameters are."""
        return 0.5 * self._collapse.constant() + sum(regularizer.offset for regularizer in self.regularizers)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Bring every regularizer back to where it was if one raises: they replace tensors, and write to none."""
        kept = [
            {name: dict(value) if isinstance(value, dict) else value for name, value in vars(regularizer).items()}
            for regularizer in self.regularizers
        ]
        try:
            yield
        except BaseException:
            for regularizer, attributes in zip(self.regularizers, kept, strict=True):
                vars(regularizer).update(attributes)
            raise
