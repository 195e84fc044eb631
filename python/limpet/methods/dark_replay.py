"""Dark experience replay: what the network said about old items is kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from limpet import _checks
from limpet.buffers import Buffer, ReservoirBuffer
from limpet.fisher.batches import call


class DarkReplay:
    r"""Hold the network to what it said about old items when it saw them (dark experience replay: DER and DER++).

    .. math:: \frac{\alpha}{B C} \sum_{b,c} (f_c(x_b; \theta) - z_{b,c})^2
        + \frac{\beta}{B} \sum_b \ell(f(x'_b; \theta), y'_b)

    (Buzzega et al. 2020, arXiv:2004.07211, eq. 5 and 6), with :math:`z` the logits that were kept with an item, the
    :math:`B` items :math:`x` and :math:`x'` drawn independently, and :math:`\ell` the cross-entropy. The mean is over
    rows and outputs, as in the authors' code. DER has :math:`\beta = 0`. In a training loop::

        for x, y in batches:
            outputs = model(x)
            loss = cross_entropy(outputs, y) + dark.penalty()
            ...
            dark.observe(x, y, outputs)

    The outputs are those that the step was made with; ``x`` may be the images before they were augmented for them.
    There are as many outputs in every batch: give a class-incremental network all of them from the start. (Those that
    come later would not be held to anything for old items, and all old items be taken for new classes.)

    Args:
        model: the network; :meth:`penalty` runs it in the mode in which it is. For inputs that are a tuple or a mapping
            it is ``model(*x)`` or ``model(**x)``.
        buffer: where items are kept, or how many are to be kept.
        alpha: of the distance to the logits that were kept, at least 0.
        beta: of the cross-entropy with the labels that were kept, at least 0.
        batch_size: how many items each of the two terms replays; fewer while the buffer holds fewer.
        seed: of the buffer's draws, where ``buffer`` is a number.
        transform: called with the replayed ``(x, y)``, to augment them.

    Attributes:
        model: as given.
        buffer: of ``(x, y, logits)``.
        alpha: as given; it may be changed at any time.
        beta: likewise.
        batch_size: likewise.

    Raises:
        TypeError: ``model`` is no module, ``buffer`` neither a buffer nor an integer, or another argument is of the
            wrong type.
        ValueError: a number is out of range.

    >>> model = nn.Linear(8, 10)
    >>> dark = DarkReplay(model, 100, alpha=0.5, beta=0.5)
    >>> x, y = torch.randn(32, 8), torch.randint(10, (32,))
    >>> dark.penalty().item()
    0.0
    >>> dark.observe(x, y, model(x))
    >>> dark.penalty().item() > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        buffer: Buffer | int,
        *,
        alpha: float = 0.5,
        beta: float = 0.0,
        batch_size: int = 32,
        seed: int = 0,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_checks.describe(model)}")
        self.model = model
        self.alpha = _checks.finite_number("alpha", alpha, minimum=0.0)
        self.beta = _checks.finite_number("beta", beta, minimum=0.0)
        self.batch_size = _checks.integer("batch_size", batch_size, minimum=1)
        self._transform = _checks.optional_callable("transform", transform)
        self.buffer = buffer if isinstance(buffer, Buffer) else ReservoirBuffer(buffer, seed=seed)

    def penalty(self) -> Tensor:  # []
        """Both terms, to be added to the loss; zero before anything was observed.

        Raises:
            RuntimeError: the model has not as many outputs as when the items were observed.
        """
        if not len(self.buffer):
            return next(self.model.parameters()).new_zeros(())
        terms = []
        if self.alpha or not self.beta:  # one term at least, so that there is a graph
            outputs, _, logits = self._replayed()
            if outputs.shape != logits.shape:
                raise RuntimeError(
                    f"the model must give {list(logits.shape[1:])} outputs a row, as when the items were observed, "
                    f"got {_checks.describe(outputs)}"
                )
            terms.append(self.alpha * F.mse_loss(outputs, logits.to(outputs.dtype)))  # autocast may have been on
        if self.beta:
            outputs, y, _ = self._replayed()
            terms.append(self.beta * F.cross_entropy(outputs, y))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def observe(self, x: Any, y: Any, outputs: Tensor) -> None:  # [count, *] each
        """Let the buffer see new items, once they have been trained on, with what the model said about them then.

        Raises:
            TypeError: ``outputs`` is no floating tensor, or as the buffer's ``add``.
            ValueError: ``outputs`` has not as many rows or columns as before, or as the buffer's ``add``.
        """
        self.buffer.add((x, y, _checks.float_tensor("outputs", outputs).detach()))

    def state_dict(self) -> dict[str, Any]:
        """The buffer's state, and the numbers; the model has its own."""
        numbers = {"alpha": self.alpha, "beta": self.beta, "batch_size": self.batch_size}
        return {**numbers, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`.

        Raises:
            TypeError: a number is none, or as the buffer's ``load_state_dict``.
            ValueError: keys are missing or unknown, a number is out of range, or as the buffer's ``load_state_dict``.
                Nothing has been taken over then.
        """
        _checks.keys("state", state, {"alpha", "beta", "batch_size", "buffer"})
        alpha, beta = (
            _checks.finite_number(f"state[{name!r}]", state[name], minimum=0.0) for name in ("alpha", "beta")
        )
        batch_size = _checks.integer("state['batch_size']", state["batch_size"], minimum=1)
        self.buffer.load_state_dict(state["buffer"])
        self.alpha, self.beta, self.batch_size = alpha, beta, batch_size

    def __repr__(self) -> str:
        return f"DarkReplay({self.buffer!r}, alpha={self.alpha:g}, beta={self.beta:g}, batch_size={self.batch_size})"

    def _replayed(self) -> tuple[Tensor, Any, Tensor]:  # [B, C], [B], [B, C]
        """The model's outputs for sampled items, with their labels and the logits that were kept."""
        x, y, logits = self.buffer.sample(min(self.batch_size, len(self.buffer)))
        if self._transform is not None:
            x, y = self._transform(x, y)
        return call(self.model, x), y, logits
