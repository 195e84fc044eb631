"""Several methods as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from limpet import _checks
from limpet.methods.composite import Composite
from limpet.methods.quadratic import QuadraticRegularizer


class Hybrid:
    """Several methods of one model as one: each moment of a training loop calls those that have it, in order.

    It has the moments that a method of it has, and no others (``hasattr`` tells). ``mix`` hands what one method gave to
    the next. ``penalty`` is the sum, where all penalties come as a value. ``add_penalty_grad_`` goes backward through
    those that come as a value alone (:class:`limpet.DarkReplay`) before it calls the others, so that a path integral
    takes what is replayed as part of the task.

    Several regularizers are one quadratic, and no path integral may see another's gradient: :class:`limpet.Composite`
    joins them, and is one method of a hybrid then.

    Args:
        methods: replay, a regularizer, or any objects with moments.

    Attributes:
        methods: as given.

    Raises:
        TypeError: ``methods`` is no list or tuple, or one of them has no moment.
        ValueError: there are none, one is given twice, or two are regularizers.

    >>> import limpet
    >>> model = torch.nn.Linear(2, 2)
    >>> hybrid = Hybrid([limpet.Replay(100), limpet.EWC(model, strength=10.0)])
    >>> x, y = torch.randn(8, 2), torch.randint(2, (8,))
    >>> hybrid.observe(x, y)
    >>> hybrid.end_task([(x, y)])
    >>> hybrid.mix(x, y)[0].shape, hybrid.penalty().item()
    (torch.Size([16, 2]), 0.0)
    """

    def __init__(self, methods: Sequence[Any]) -> None:
        if not isinstance(methods, (list, tuple)):
            raise TypeError(f"methods must be a list or tuple, got {_checks.describe(methods)}")
        if not methods:
            raise ValueError("methods must hold at least one, got none")
        regularizers = 0
        for k, method in enumerate(methods):
            if not any(hasattr(method, moment) for moment in _MOMENTS):
                raise TypeError(f"methods[{k}] must have a moment of a training loop, got {_checks.describe(method)}")
            if any(method is other for other in methods[:k]):
                raise ValueError(f"methods[{k}] must be given once, got it twice")
            regularizers += isinstance(method, (QuadraticRegularizer, Composite))
            if regularizers > 1:
                raise ValueError(f"methods[{k}] must be no second regularizer: join them by Composite([...]), as one")
        self.methods = tuple(methods)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        moments = self._moments(name) if name in _MOMENTS else []
        if not moments:
            raise AttributeError(f"no method of this hybrid has {name!r}")
        return partial(_MOMENTS[name], moments)

    def _moments(self, name: str) -> list[Callable[..., Any]]:
        """One moment of the methods that have it."""
        moments = [getattr(method, name) for method in self.methods if hasattr(method, name)]
        others = [method for method in self.methods if not hasattr(method, name)]
        if name == "add_penalty_grad_" and moments:
            return [partial(_backward, method.penalty) for method in others if hasattr(method, "penalty")] + moments
        if name == "penalty" and any(hasattr(method, "add_penalty_grad_") for method in others):
            return []  # a sum without theirs would be no penalty
        return moments

    def state_dict(self) -> dict[str, Any]:
        """The methods' own states, in ``"methods"``; ``None`` for those that have no ``state_dict()``."""
        return {"methods": [method.state_dict() if hasattr(method, "state_dict") else None for method in self.methods]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict` of as many methods, in the same order.

        Raises:
            TypeError: as the methods.
            ValueError: there are more or fewer states, or as the methods. Each method has the state that it had then.
        """
        states = state.get("methods") if isinstance(state, Mapping) and len(state) == 1 else None
        if not isinstance(states, (list, tuple)) or len(states) != len(self.methods):
            raise ValueError(
                f"state must hold 'methods', a list of {len(self.methods)} states, "
                f"got {_checks.describe(state if states is None else states)}"
            )
        before = self.state_dict()["methods"]
        for k, (method, own) in enumerate(zip(self.methods, states, strict=True)):
            try:
                if (own is None) == hasattr(method, "state_dict"):
                    raise ValueError(
                        f"state['methods'][{k}] must be a state of {method!r}, got {_checks.describe(own)}"
                    )
                if own is not None:
                    method.load_state_dict(own)
            except BaseException:
                for loaded, old in zip(self.methods[:k], before, strict=False):
                    if old is not None:
                        loaded.load_state_dict(old)
                raise

    def __repr__(self) -> str:
        return f"Hybrid({list(self.methods)})"


def _each(moments: Sequence[Callable[..., Any]], *arguments: Any) -> None:
    for moment in moments:
        moment(*arguments)


def _mix(moments: Sequence[Callable[..., Any]], x: Any, y: Any) -> tuple[Any, Any]:
    for moment in moments:
        x, y = moment(x, y)
    return x, y


def _sum(moments: Sequence[Callable[[], Tensor]]) -> Tensor:  # []
    first, *others = [moment() for moment in moments]
    return sum(others, first)


def _backward(penalty: Callable[[], Tensor]) -> Tensor:  # []
    """What ``add_penalty_grad_`` is for a method that gives a value alone."""
    value = penalty()
    if value.requires_grad:  # nothing to replay yet
        value.backward()
    return value.detach()


def _end_task(moments: Sequence[Callable[..., Any]], batches: Any) -> None:
    if isinstance(batches, Iterator) and len(moments) > 1:
        raise TypeError(f"batches must be readable several times, got the iterator {_checks.describe(batches)}")
    _each(moments, batches)


_MOMENTS: dict[str, Callable[..., Any]] = {
    "begin_task": _each,
    "mix": _mix,
    "penalty": _sum,
    "add_penalty_grad_": _sum,
    "project_grads_": _each,
    "after_step": _each,
    "observe": _each,
    "end_task": _end_task,
}
