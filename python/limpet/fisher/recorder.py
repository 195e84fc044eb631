"""The function mode that sees each use of a parameter in forward, and its output's gradient in backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from limpet import _core
from limpet._launch import threads
from limpet.fisher.layout import candidates
from limpet.fisher.mixing import Span, may_mix, span
from limpet.fisher.operands import Operand, Operands
from limpet.fisher.picks import deciding_values, may_pick
from limpet.fisher.rules import FOLLOWED, OPENED, RULES, Call, Match, Rule
from limpet.fisher.rules.base import Saved
from limpet.ops._fisher_launch import add_plain_linear

# What identifies a call in every forward pass: its function, its operands (weight, bias), how many leading dimensions
# it has, and how many such calls came before it.
Key = tuple[str, Operand | None, Operand | None, int, int]
Record = tuple[Key, Call, torch.Size]  # with the sizes of the leading dimensions
OnBackward = Callable[[Key, Call, Tensor, Saved], None]


# What a tensor is asked for before anything is computed: half of the calls in a transformer's forward.
_ATTRIBUTES = ("device", "dtype", "is_cuda", "is_nested", "is_sparse", "layout", "ndim", "requires_grad", "shape")
_METHODS = ("dim", "is_contiguous", "is_floating_point", "numel", "size", "stride")
_QUESTIONS = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES] + [getattr(Tensor, name) for name in _METHODS]
)

_LASTING = (Tensor, bool, int, float, str, tuple)  # the same object is the same argument


class Receiver:
    """Takes the gradients at the outputs of calls; the graph keeps it, and so it knows nothing of the recorder."""

    def __init__(self, on_backward: OnBackward) -> None:
        self.on_backward = on_backward


class Recorder(TorchFunctionMode):
    """Active during one forward pass: computes every intercepted call by its rule, and keeps it in :attr:`calls`.

    Args:
        names: ``id`` of each tracked parameter to its name.
        declined: the calls to leave alone, as no rows of theirs are a sample's own: what they compute from parameters
            stands for a parameter where it is used next.
        probe: how many samples there are, while layouts are looked for; calls that cannot have one are then declined.
        earlier: what the functions of an earlier batch were given, in order; None for those of which that is not kept.
        on_forward: called with key, call, input (or None) and output of each call.
        on_backward: called with key, call, the output's gradient and what the rule saved.

    Attributes:
        anchor: a leaf to differentiate with respect to. Every recorded call leads to it, nothing else does, and its
            own gradient is never formed; so the parameters' hooks and ``.grad`` are not touched.
        operands: what stood in a parameter's place.
        constant: the calls whose input does not depend on anything but parameters and data.
        decided: the values by which the model may have decided which row is whose.
        spans: by function, the sizes along which its calls combined or moved rows.
        given: beside each of the calls, for another batch's ``earlier``.
        receiver: takes the gradients at the outputs of the calls.
        taker: takes the calls first. Its ``outputs`` are places of which it adds the squares itself: backward is to be
            asked for the gradients there, for its ``add``.
    """

    def __init__(
        self,
        names: dict[int, str],
        declined: set[Key],
        on_backward: OnBackward,
        on_forward: Callable[[Key, Call, Tensor | None, Tensor], None] | None = None,
        probe: int = 0,
        earlier: Sequence[_core.EarlierCall | None] = (),
    ) -> None:
        super().__init__()
        self.on_forward, self.receiver = on_forward, Receiver(on_backward)
        self.anchor = _anchor()
        self.operands = Operands(names)
        self.calls: list[Record] = []
        self.constant: set[Key] = set()
        self.decided: list[object] = []
        self.spans: defaultdict[str, list[Span]] = defaultdict(list)
        self.given: list[_core.EarlierCall | None] = []
        self._declined, self._probe = declined, probe
        self._seen: dict[tuple[Any, ...], int] = {}
        self.taker = _core.CallTaker(
            _filter(),
            self,
            self.receiver,
            names,
            self.operands.computed,
            self.calls,
            self.given,
            self._seen,
            earlier,
            self.anchor,
            threads(),
        )

    # Takes what it knows by itself, in the core, and hands the rest to :meth:`take`.
    __torch_function__ = _core.take_call

    def take(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        """Compute a call by its rule, where there is one."""
        kwargs = kwargs or {}
        everything = (*args, *kwargs.values()) if kwargs else args
        known = _known(func)
        match = None if known.rule is None else known.rule(self.operands.find, *args, **kwargs)
        if match is not None:
            y = self._record(match, func, args, kwargs)
            if y is not None:
                return y if match.after is None else match.after(y)
        elif known.opened is not None and self.operands.among(everything):
            with self:
                result = known.opened(*args, **kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if known.follow is not None:
            known.follow(args, result)
        if not self.operands.compute(everything, result):
            if known.may_pick:
                values = deciding_values(func, args, kwargs, result)
                if values is not None:
                    self.decided.append(values)
            if known.may_mix:
                along = span(func, args, kwargs)
                if along is not None:
                    self.spans[along[0]].append(along[1])
        return result

    def _record(self, match: Match, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        x, call, _ = match
        lead = (torch.Size(call.sizes) if x is None else x.shape)[: call.lead]
        same = (call.function, call.weight, call.bias)
        count = self._seen.get(same, 0)
        self._seen[same] = count + 1
        key = (*same, call.lead, count)
        if self._probe and not candidates(lead, self._probe):
            self._declined.add(key)
        if key in self._declined:
            return None
        if x is None or not x.requires_grad or self.operands.find(x) is not None:
            self.constant.add(key)
        record = key, call, lead
        self.calls.append(record)
        self.given.append(_given(match, record, func, args, kwargs))
        y: Tensor = _Recorded.apply(x, self.anchor, (call, key, self.receiver))
        if self.on_forward is not None:
            self.on_forward(key, call, None if x is None else x.detach(), y.detach())
        return y


def _given(
    match: Match, record: Record, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _core.EarlierCall | None:
    """None where the call could become another although the function is given the same objects."""
    x, call, after = match
    if x is None or after is not None or not args or x is not args[0] or type(x) is not Tensor:
        return None
    others = (*args[1:], *kwargs.values())
    if not call.repeatable or not all(value is None or isinstance(value, _LASTING) for value in others):
        return None
    if any(value is not None and not any(value is one for one in others) for value in (call.w, call.b)):
        return None  # a view of a parameter is made anew: the parameter may lie elsewhere
    return _core.EarlierCall(func, args[1:], dict(kwargs), x, record)


class _Recorded(torch.autograd.Function):
    """A call's value; in backward its input's gradient, while the output's gradient goes to the receiver."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, anchor: Tensor, recorded: tuple[Call, Key, Receiver]) -> Tensor:
        ctx.recorded = recorded
        call = recorded[0]
        device = anchor.device if x is None else x.device
        if call.autocast is not None and x is not None and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                x = call.cast(x, torch.get_autocast_dtype(device.type) if call.autocast else torch.float32)
                y, saved = call.forward(x)
        else:
            y, saved = call.forward(x)  # type: ignore[arg-type]
        if y._is_view():  # as of a linear layer with places: models may change it in place, which views forbid here
            y = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if dy is None:
            return None, None, None
        call, key, receiver = ctx.recorded
        saved = ctx.saved_tensors
        receiver.on_backward(key, call, dy, saved)
        dx = call.input_grad(dy, saved) if ctx.needs_input_grad[0] else None
        return dx, None, None


class _Known(NamedTuple):
    """What is done about a function's calls; looked up once, as most calls of a forward pass need none of it."""

    rule: Rule | None
    opened: Callable[..., Any] | None
    follow: Callable[..., None] | None
    may_pick: bool
    may_mix: bool


@lru_cache(4096)
def _known(func: Any) -> _Known:
    rule, opened = RULES.get(func), OPENED.get(func)
    if opened is None and rule is None:
        opened = _opened(func)
    return _Known(rule, opened, FOLLOWED.get(func), may_pick(func), may_mix(func))


def _opened(func: Any) -> Callable[..., Any] | None:
    """A copy of a function written in Python that does its work under the mode instead of handing itself to it."""
    if not isinstance(func, FunctionType) or func.__module__ != F.__name__:
        return None
    answers = {name: _no for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(
        func.__code__, {**func.__globals__, **answers}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


_OTHER, _QUESTION, _PLAIN, _RULE = range(4)  # as csrc/bind_fisher_calls.cpp numbers them


def _kind(func: Any) -> int:
    """What there is to do about a function's calls, for the core."""
    if func in _QUESTIONS:
        return _QUESTION
    known = _known(func)
    if known.rule is not None:
        return _RULE
    return _OTHER if known.follow is not None or known.may_pick or known.may_mix else _PLAIN


@lru_cache(1)
def _anchor() -> Tensor:
    """One for all passes: nothing is ever added to its gradient."""
    with torch.inference_mode(False):
        return torch.empty(0, requires_grad=True)


@lru_cache(1)
def _filter() -> _core.CallFilter:
    return _core.CallFilter(
        Tensor,
        _kind,
        _Recorded.apply,
        torch.is_autocast_enabled,
        torch.ops.aten._unsafe_view.default,
        GradientEdge,
        add_plain_linear,
    )


def _no(*_: Any) -> bool:
    return False
