"""The function mode that sees each use of a parameter in forward, and its output's gradient in backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from limpet.fisher.picks import picks_rows
from limpet.fisher.rules import RULES, Call
from limpet.fisher.rules.base import Saved

# What identifies a call in every forward pass: its function, its parameters (weight, bias), how many leading dimensions
# it has, and how many such calls came before it.
Key = tuple[str, str | None, str | None, int, int]


class Recorder(TorchFunctionMode):
    """Active during one forward pass: computes every intercepted call by its rule, and keeps it in :attr:`calls`.

    Args:
        names: ``id`` of each tracked parameter to its name.
        on_forward: called with key, call, input and output of each call.
        on_backward: called with key, call, the output's gradient and what the rule saved.

    Attributes:
        anchor: a leaf to differentiate with respect to. Every recorded call leads to it, nothing else does, and its
            own gradient is never formed; so the parameters' hooks and ``.grad`` are not touched.
        picked: whether a function was called through which values may decide which row is whose.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        on_forward: Callable[[Key, Call, Tensor, Tensor], None] | None,
        on_backward: Callable[[Key, Call, Tensor, Saved], None],
    ) -> None:
        super().__init__()
        self.names, self.on_forward, self.on_backward = names, on_forward, on_backward
        self.anchor = torch.empty(0, requires_grad=True)
        self.calls: list[tuple[Key, Call, torch.Size]] = []  # with the sizes of the leading dimensions
        self.picked = False
        self._seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute a call by its rule, where there is one."""
        rule = RULES.get(func)
        found = None if rule is None else rule(self.names, *args, **(kwargs or {}))
        if found is None:
            self.picked = self.picked or picks_rows(func, args)
            return func(*args, **(kwargs or {}))
        x, call = found
        key = (
            call.function,
            call.weight,
            call.bias,
            call.lead,
            self._seen[call.function, call.weight, call.bias],
        )
        self._seen[key[:3]] += 1
        self.calls.append((key, call, x.shape[: call.lead]))
        y = _Recorded.apply(x, self.anchor, call, key, self)
        if self.on_forward is not None:
            self.on_forward(key, call, x.detach(), y.detach())
        return y


class _Recorded(torch.autograd.Function):
    """A call's value; in backward its input's gradient, while the output's gradient goes to the recorder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: Call, key: Key, recorder: Recorder) -> Tensor:
        y, saved = call.forward(x)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.key, ctx.recorder = call, key, recorder
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if dy is None:
            return None, None, None, None, None
        saved = ctx.saved_tensors
        ctx.recorder.on_backward(ctx.key, ctx.call, dy, saved)
        dx = ctx.call.input_grad(dy, saved) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def leaves(root: Tensor) -> set[int]:
    """``id`` of every tensor that an ordinary backward from ``root`` would give a gradient."""
    found: set[int] = set()
    seen = {root.grad_fn}
    stack = [root.grad_fn] if root.grad_fn is not None else []
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return found
