"""What Synaptic Intelligence and RWalk share: path integrals of the task's own gradient, kept around steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limpet import _checks, _launch, ops
from limpet.methods import shards
from limpet.methods.quadratic import QuadraticRegularizer, named_tensors, placed
from limpet.reference import wide


@dataclass
class _Step:
    """What ``before_step`` leaves for ``after_step``."""

    params: dict[str, nn.Parameter]  # those with a gradient
    strength: float  # of the penalty whose gradient is in theirs, as the ops take it
    scale: Tensor | None  # of a gradient scaler, if the optimizer is to unscale within its step
    copies: dict[str, Tensor]  # gradients as they were, where ``.grad`` may be another one after the step
    versions: dict[str, int]  # of every ``.grad``
    by_hand: bool


class PathIntegralRegularizer(QuadraticRegularizer):
    """A quadratic penalty whose importances come from the path that the optimizer takes.

    Before an optimizer step the penalty's gradient is added to each ``.grad``; after it the path integrals
    ``omega -= g (theta - theta_before)`` (Zenke et al. 2017, eq. 3) are brought up to date in one pass, with ``g`` the
    gradient of the task's own loss: the penalty's share is taken out again on the way.

    Attributes:
        integrals: omega by parameter name, since the last consolidation: float32, float64 for float64 parameters.
        num_steps: optimizer steps since the last consolidation.
    """

    _factor = 2.0  # the papers write strength * sum Omega (theta - anchor)^2
    _keeps_starts = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, strength: float) -> None:
        super().__init__(model, strength)
        self.integrals: dict[str, Tensor] = {}
        self.num_steps = 0
        self._shapes: dict[str, torch.Size] = {}  # of all parameters, when the task began
        self._previous: dict[str, Tensor] = {}  # the parameters after the last step
        self._seen: dict[str, tuple[int, int]] = {}  # their versions and addresses then
        self._writes: dict[str, int | None] = {}  # what steps do to .grad, once known; see _gradient
        self._step: _Step | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._tracked()
        if optimizer is not None:
            self.attach(optimizer)

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Run :meth:`before_step` and :meth:`after_step` in the optimizer's step hooks, until :meth:`detach`.

        A new optimizer (one for each task, say) takes the place of the one before.

        Raises:
            TypeError: ``optimizer`` is no :class:`torch.optim.Optimizer`.
            ValueError: it does not own a parameter of the model that requires a gradient, it maximizes, or it is
                ``LBFGS``, whose gradients are computed within the step.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {_checks.describe(optimizer)}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer must not be LBFGS: it moves many times within one step")
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("optimizer must not have maximize=True: it would push parameters away from their anchors")
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in owned]
        if missing:
            raise ValueError(
                f"optimizer must own every parameter of the model that requires a gradient, but {missing[0]!r} is not "
                f"in its groups ({len(missing)} in all); freeze what is not trained, or, with several optimizers, "
                "give none and call before_step() and after_step()"
            )
        self.detach()
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def detach(self) -> None:
        """Take the hooks off the optimizer; nothing happens if there are none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer, self._step, self._writes = [], None, None, {}

    def _pre_hook(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(a) for a in args[1:]):
            raise RuntimeError(
                "step(closure) computes gradients within the step, where the penalty cannot be added to them: "
                "call backward() before step()"
            )
        if self._step is None:  # else it was called by hand, or step() of a subclass calls that of its parent
            self._before(by_hand=False)

    def _post_hook(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is not None:
            self.after_step()

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no optimizer."""
        return {**self.__dict__, "_optimizer": None, "_hooks": [], "_step": None, "_writes": {}}

    # --- around a step -----------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:  # []
        """The penalty as a 0-d tensor without a graph: its gradient comes by :meth:`before_step` alone.

        Added to the loss it would be part of the gradient, and the path integral must know the task's own.

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        with torch.no_grad():
            return super().penalty()

    def before_step(self) -> Tensor:  # []
        """Add the penalty's gradient to each ``.grad``, which holds the task's own; return the penalty.

        Call it once for each step, after the last ``backward()``, and with a gradient scaler after
        ``scaler.unscale_(optimizer)``. An attached optimizer does it in its step; called by hand before that, it is not
        done twice. What happens to ``.grad`` later (clipping, another penalty) leaves the path integral alone: called
        by hand, this keeps a copy of the gradients.

        Returns:
            The penalty, without a graph.

        Raises:
            TypeError: a gradient is sparse or not of its parameter's dtype.
            RuntimeError: a parameter was added, removed or resized in the middle of a task. Nothing has changed then.
        """
        return self._before(by_hand=True)

    add_penalty_grad_ = before_step

    def after_step(self) -> None:
        """Add the step that the parameters just made to the path integrals. An attached optimizer does it itself.

        Raises:
            RuntimeError: there was no :meth:`before_step`, or the gradients were changed since (by ``zero_grad()``, or
                by the optimizer for the first time). The path integrals have not changed then.
        """
        step, self._step = self._step, None
        if step is None:
            raise RuntimeError("after_step() must follow before_step()")
        grads = {name: self._gradient(step, name, param) for name, param in step.params.items()}
        self._update(step.params, grads, step.strength)
        for name, param in step.params.items():
            self._seen[name] = _seen(param)
        self.num_steps += 1

    def begin_fused_step(self) -> None:
        """Be ready for a step of :mod:`limpet.optim`, which adds the penalty and keeps :attr:`integrals` itself.

        Raises:
            RuntimeError: an optimizer is attached, whose hooks would do both a second time; more than path integrals
                is kept along the path; or as :meth:`before_step`.
        """
        who = type(self).__name__
        if self._optimizer is not None:
            raise RuntimeError(f"{who} is attached to an optimizer: detach() it, or take it out of regularizers=")
        if len(self._along_the_path()) > 1:
            raise RuntimeError(
                f"{who} keeps more than path integrals: give it the optimizer, and take it out of regularizers="
            )
        self._previous = {}  # the optimizer knows where it came from
        self._tracked(previous=False)

    def end_fused_step(self) -> None:
        """Count the step that :meth:`begin_fused_step` began."""
        for name, param in self.model.named_parameters():
            if name in self._seen:
                self._seen[name] = _seen(param)
        self.num_steps += 1

    def watch_step(self, pulled: Collection[str]) -> None:
        """Keep the gradients of the step to come, to which another adds penalties; :meth:`after_step` follows.

        Args:
            pulled: names of the parameters that those penalties move, even without a gradient of the task.

        Raises:
            RuntimeError: an optimizer is attached, whose hooks would add the penalty a second time; or as
                :meth:`before_step`.
            TypeError: as :meth:`before_step`.
        """
        if self._optimizer is not None:
            raise RuntimeError(f"{type(self).__name__} is attached to an optimizer: detach() it")
        learning = self._learning(self._tracked())
        for name, param in learning.items():
            if param.grad is None and name in pulled:
                param.grad = torch.zeros_like(param)
        self._watch(learning, 0.0, None, by_hand=True)

    def _learning(self, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that require a gradient, once it is clear that theirs can be read."""
        learning = {name: p for name, p in params.items() if p.requires_grad}
        for name, param in learning.items():
            shards.check_grad(name, param)
            grad = param.grad
            if grad is not None and _checks.float_tensor(f"the gradient of {name!r}", grad).dtype != param.dtype:
                raise TypeError(f"the gradient of {name!r} must be {param.dtype} as it is, got {grad.dtype}")
        return learning

    def _before(self, *, by_hand: bool) -> Tensor:  # []
        every = self._tracked()
        learning = self._learning(every)
        scale = None if by_hand else getattr(self._optimizer, "grad_scale", None)  # torch.amp.GradScaler sets it
        protected = {name: every[name] for name in self.importances}
        value = self._add_penalty_grad(protected, 1.0 if scale is None else float(scale))
        self._watch(learning, self._lambda, scale, by_hand=by_hand)
        return value

    def _watch(
        self, learning: Mapping[str, nn.Parameter], strength: float, scale: Tensor | None, *, by_hand: bool
    ) -> None:
        """Leave for :meth:`after_step` the gradients, in which there is a penalty of ``strength``."""
        params = {name: p for name, p in learning.items() if p.grad is not None}
        grads = {name: p.grad for name, p in params.items() if p.grad is not None}
        copies = {
            name: grad.detach().clone() for name, grad in grads.items() if by_hand or self._writes.get(name) is None
        }
        versions = {name: shards.version(grad) for name, grad in grads.items()}
        self._step = _Step(params, strength, scale, copies, versions, by_hand)

    def _gradient(self, step: _Step, name: str, param: Tensor) -> Tensor:  # [*]
        """The gradient that the step was made with: ``.grad`` itself, or the copy where the step may have changed it.

        Optimizers may use ``.grad`` as scratch space (torch's ``SGD(nesterov=True, foreach=True)`` does). So what they
        do is found out: the first step's gradient is compared with its copy. An optimizer that left it alone is
        believed from then on, as long as the gradient's version counter moves as it did; torch's fused ones advance the
        counter without a change.
        """
        grad, copy = param.grad, step.copies.get(name)
        written = -1 if grad is None else shards.version(grad) - step.versions[name]
        if copy is None:
            if grad is not None and written == self._writes[name]:
                return grad
            self._writes.clear()  # the next step is made with copies, and looked at anew
            raise RuntimeError(f"the gradient of {name!r} was changed between before_step() and after_step()")
        if step.scale is not None:
            copy.div_(step.scale)
        if not step.by_hand and name not in self._writes and not _equal(param.detach(), self._previous[name]):
            kept = grad is not None and (written == 0 or self._fused) and _equal(grad, copy)
            self._writes[name] = written if kept else None
        return copy

    @property
    def _fused(self) -> bool:
        """Whether the optimizer is one of torch's own fused ones."""
        optimizer = self._optimizer
        if optimizer is None or type(optimizer).__module__.partition(".")[0] != "torch":
            return False
        return all(group.get("fused") for group in optimizer.param_groups)

    def _update(self, params: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], strength: float) -> None:
        """Bring path integrals and previous parameters up to date."""
        protected = [name for name in params if name in self.importances and strength]
        free = [name for name in params if name not in self.importances or not strength]
        for names, anchored in ((protected, True), (free, False)):  # nearly always, one of them is empty
            ops.path_integral_update_(
                [shards.local(self.integrals[name]) for name in names],
                [shards.local(self._previous[name]) for name in names],
                [shards.local(params[name]) for name in names],
                [shards.local(grads[name]) for name in names],
                anchors=[shards.local(self.anchors[name]) for name in names] if anchored else (),
                importances=[shards.local(self.importances[name]) for name in names] if anchored else (),
                strength=strength if anchored else 0.0,
            )

    # --- which parameters --------------------------------------------------------------------------------------------

    def _tracked(self, *, previous: bool = True) -> dict[str, nn.Parameter]:
        """The model's parameters, once each that learns has its start, path integral and ``previous`` value."""
        params = self._check_model()
        shapes = {name: p.shape for name, p in params.items()}
        if self.num_steps:
            self._check_shapes(shapes)
        elif shapes != self._shapes:
            self._shapes = shapes
            kept: tuple[dict[str, Any], ...] = (self.anchors, *self._along_the_path(), self._previous, self._seen)
            for values in kept:
                for name in values.keys() - params.keys():
                    del values[name]
        for name, param in params.items():
            known = self._seen.get(name) == _seen(param)
            if known and (not previous or name in self._previous):
                continue
            if param.requires_grad:
                if not known:
                    self._track(name, param)
                if previous:  # moved by something else than a step that was seen: no path to integrate
                    self._previous[name] = _launch.zeros_like(param).copy_(param.detach())
            elif name in self.importances:
                self._follow(name, param)
        return params

    def _check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse a model that is not the one the task began with."""
        if shapes == self._shapes:
            return
        for name in sorted(shapes.keys() ^ self._shapes.keys()):
            done = "added to" if name in shapes else "removed from"
            raise RuntimeError(
                f"parameter {name!r} was {done} the model in the middle of a task ({self.num_steps} steps after the "
                "last consolidation); change models between consolidate() and the next step"
            )
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise RuntimeError(
                    f"parameter {name!r} was resized from {list(self._shapes[name])} to {list(shape)} in the middle of "
                    f"a task ({self.num_steps} steps after the last consolidation); "
                    "change models between consolidate() and the next step"
                )

    def _along_the_path(self) -> tuple[dict[str, Tensor], ...]:
        """What a task's steps add to, by name: zeros when a parameter is first seen."""
        return (self.integrals,)

    def _track(self, name: str, param: Tensor) -> None:
        """Give a parameter that is new, or was written to between steps, what it lacks, where it is now."""
        if name in self.anchors:
            self._follow(name, param)
        else:
            self.anchors[name] = param.detach().to(wide(param.dtype), copy=True)
        for tensors in self._along_the_path():
            if name in tensors:
                tensors[name] = placed(tensors[name], param)
            else:
                tensors[name] = _launch.zeros_like(param, wide(param.dtype))
        self._seen[name] = _seen(param)

    # --- consolidation and state -------------------------------------------------------------------------------------

    def _begin_task(self, importances: Mapping[str, Tensor]) -> None:
        """Take over importances by name, anchor the parameters here, and start new path integrals."""
        self._anchor_here(importances)
        self.integrals = {name: _launch.zeros_like(t) for name, t in self.integrals.items()}
        self.num_steps, self._step = 0, None

    def _check_path(self) -> dict[str, nn.Parameter]:
        """The parameters that have a path integral, once it is clear that there is a path to consolidate."""
        if self.num_steps == 0:
            raise RuntimeError(
                "consolidate() needs at least one optimizer step since the last consolidation, and has seen none: "
                "is the optimizer attached, or are before_step() and after_step() called?"
            )
        self._tracked(previous=bool(self._previous))
        params = {name: p for name, p in self.model.named_parameters() if name in self.integrals}
        for name, integral in self.integrals.items():
            if not bool(shards.reduced(integral.isfinite().all())):
                raise RuntimeError(f"the path integral of {name!r} is not finite")
        return params

    def _check_seen(self, params: Mapping[str, nn.Parameter], found: Mapping[str, Tensor]) -> None:
        """Refuse importances of zero that come from a bookkeeping that never saw the parameters move."""
        moved = any(not torch.equal(p.detach().to(self.anchors[n].dtype), self.anchors[n]) for n, p in params.items())
        if moved and not any(bool(shards.reduced(t.any())) for t in found.values()):
            raise RuntimeError(
                "every path integral is zero, but the parameters moved: they are not trained by the steps that were "
                "seen, or every gradient was zero"
            )

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with the path integrals of the present task, so that training resumes bit for bit."""
        return {**super().state_dict(), "num_steps": self.num_steps, "integrals": dict(self.integrals)}

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._read(state)
        num_steps = _checks.integer("state['num_steps']", state["num_steps"], minimum=0)
        integrals = named_tensors("state['integrals']", state["integrals"])
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        for name, integral in integrals.items():
            if name not in values["anchors"] or values["anchors"][name].shape != integral.shape:
                raise ValueError(f"state must hold an anchor of the path integral's shape for {name!r}")
            if num_steps and shapes.get(name) != integral.shape:
                raise ValueError(
                    f"state['integrals'][{name!r}] must be of the model's shape in the middle of a task, "
                    f"got {_checks.describe(integral)}"
                )
        path = {"num_steps": num_steps, "integrals": integrals, "_shapes": shapes}
        return {**values, **path, "_previous": {}, "_seen": {}, "_step": None}


def _seen(param: Tensor) -> tuple[int, int]:
    """What tells whether a parameter was written to, or given other memory, without a look at its values."""
    return shards.version(param), shards.local(param).data_ptr()


def _equal(one: Tensor, other: Tensor) -> bool:  # [*], [*]
    """Whether they are equal as far as this process holds them."""
    return torch.equal(shards.local(one), shards.local(other))


def positive(name: str, value: Any) -> float:
    """Require a finite number above 0."""
    number = _checks.finite_number(name, value, minimum=0.0)
    if number == 0.0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return number
