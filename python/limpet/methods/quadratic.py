"""What EWC, SI, MAS and RWalk share: one quadratic around anchors, over the parameters of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods import shards
from limpet.methods.storage import WIDE, Rule, Storage, read_packed, read_storage, rounding
from limpet.reference import wide

_log = logging.getLogger("limpet")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:  # parents first; train() may do more than set the flag, and undoes it here
            if module.training != training:
                module.train(training)
        for module, training in modes:
            module.training = training


class QuadraticRegularizer:
    """A penalty ``strength * factor / 2 * (sum_i F_i (theta_i - anchor_i)^2 + constant)`` on a model's parameters.

    Subclasses say how importances are measured, and set ``_factor``: 1 where their paper halves the penalty, else 2.

    Attributes:
        model: the network that is protected.
        strength: lambda, at least 0. It may be changed at any time.
        num_tasks: consolidations so far.
        anchors: where the parameters are pulled to, by name: float32, float64 for float64 parameters, or packed.
        importances: F or Omega, by name, in the same dtypes, or narrower.
        constant: what merging several quadratics into one left over.
    """

    _factor = 1.0
    _keeps_starts = False  # whether parameters without an importance have an anchor too: where their first task began
    _optional_keys: frozenset[str] = frozenset()  # of a state

    def __init__(self, model: nn.Module, strength: float, storage: Storage = WIDE) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_checks.describe(model)}")
        self.model = model
        self.strength = _checks.finite_number("strength", strength, minimum=0.0)
        self.num_tasks = 0
        self.anchors: dict[str, Tensor] = {}
        self.importances: dict[str, Tensor] = {}
        self.constant = 0.0
        self._storage = storage
        self._packed_shapes: dict[str, torch.Size] = {}  # a packed tensor has one dimension
        self._free: frozenset[str] = frozenset()
        self._check_model()

    @property
    def packed(self) -> bool:
        """Whether anchors or importances are held as :func:`limpet.ops.pack_anchor` and its relative make them."""
        return self._storage.packed

    def penalty(self) -> Tensor:  # []
        """The penalty as a differentiable 0-d tensor, to be added to the loss; zero before the first consolidation.

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        return self._with_constant(
            shards.quadratic_penalty(*lists(self._protected(), self.anchors, self.importances), self._lambda)
        )

    def add_penalty_grad_(self) -> Tensor:  # []
        """Add the penalty's gradient straight into each ``.grad``, in one pass; return the penalty without a graph.

        Call it between ``loss.backward()`` and ``optimizer.step()`` in place of adding :meth:`penalty` to the loss.
        It moves half the bytes. (Under a gradient scaler, unscale first.)

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        return self._add_penalty_grad(self._protected(), 1.0)

    def quadratic(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Anchors and importances by name, placed as the parameters are, and lambda as :mod:`limpet.ops` takes it.

        Raises:
            RuntimeError: a protected parameter has left the model or shrunk.
        """
        names = self._protected()
        anchors, importances = ({name: tensors[name] for name in names} for tensors in (self.anchors, self.importances))
        return anchors, importances, self._lambda

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; the tensors are the live ones, as in torch.

        Numbers, and mappings from parameter names to tensors: ``torch.load(..., weights_only=True)`` reads it.
        """
        state = {
            "strength": self.strength,
            "num_tasks": self.num_tasks,
            "constant": self.constant,
            "anchors": dict(self.anchors),
            "importances": dict(self.importances),
        }
        if self._storage.narrow:
            state |= vars(self._storage)
            state["shapes"] = {
                name: torch.tensor(shape, dtype=torch.int64) for name, shape in self._packed_shapes.items()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; tensors follow the model's parameters to device and dtype when first used.

        Raises:
            TypeError: a number or a tensor of the state is none.
            ValueError: keys are missing or unknown, a number is out of range, or its tensors do not match each other.
                Nothing has been taken over then.
        """
        expected = self.state_dict().keys() - self._optional_keys
        if not isinstance(state, Mapping) or state.keys() - self._optional_keys != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else _checks.describe(state)
            raise ValueError(f"state must have the keys {sorted(expected)}, got {got}")
        for name, value in self._read(state).items():
            setattr(self, name, value)
        self._free = frozenset()

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes from a state of the right keys, checked; subclasses add their own."""
        storage, shapes = read_storage(state)
        values: dict[str, Any] = {
            "strength": _checks.finite_number("state['strength']", state["strength"], minimum=0.0),
            "num_tasks": _checks.integer("state['num_tasks']", state["num_tasks"], minimum=0),
            "constant": _checks.finite_number("state['constant']", state["constant"], minimum=0.0),
            "_storage": storage,
            "_packed_shapes": shapes,
        }
        if storage.packed:
            return {**values, **read_packed(state, storage, shapes)}
        for kind in ("anchors", "importances"):
            values[kind] = named_tensors(f"state[{kind!r}]", state[kind])
        anchors = values["anchors"]
        if self._keeps_starts:
            anchors = {name: t for name, t in anchors.items() if name in values["importances"]}
        same_shapes("anchors", anchors, "importances", values["importances"])
        return values

    @property
    def offset(self) -> float:
        """What :meth:`penalty` adds to the value of :meth:`quadratic`: merging left it over."""
        return 0.5 * self._lambda * self.constant

    @property
    def _lambda(self) -> float:
        """The strength as the ops take it: they halve."""
        return self._factor * self.strength

    def _add_penalty_grad(self, params: Mapping[str, nn.Parameter], scale: float) -> Tensor:  # []
        """Add ``scale`` times the gradient for what is protected; gives the penalty itself."""
        value = add_grad_(params, self.anchors, self.importances, scale * self._lambda)
        return self._with_constant(value if scale == 1.0 else value / scale)

    def _with_constant(self, value: Tensor) -> Tensor:  # [] -> []
        return value + self.offset if self.constant else value

    def _check_model(self) -> dict[str, nn.Parameter]:
        """The model's parameters, once it is clear that it still holds what is protected."""
        params = dict(self.model.named_parameters())
        shards.check(params, self.anchors)
        self._storage.check(params)
        missing = self.importances.keys() - params.keys()
        if missing:
            raise RuntimeError(f"the model has lost parameters that are protected: {sorted(missing)}")
        for name, importance in self.importances.items():
            old, new = self._packed_shapes.get(name, importance.shape), params[name].shape
            if old != new and (len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True))):
                raise RuntimeError(
                    f"parameter {name!r} was consolidated with shape {list(old)}; "
                    f"it may grow, but has shape {list(new)}"
                )
        return params

    def _protected(self) -> dict[str, nn.Parameter]:
        """The protected parameters, once anchors and importances are where and as large as those are now."""
        params = self._check_model()
        free = frozenset(name for name, p in params.items() if name not in self.importances and p.requires_grad)
        if self.num_tasks and free and self._free != free:
            who = type(self).__name__
            _log.info("%s: %d parameters are new since the last consolidation and left free", who, len(free))
            self._free = free
        protected = {name: params[name] for name in self.importances}
        for name, param in protected.items():
            self._follow(name, param)
        return protected

    def _merge(self, new: dict[str, Tensor], rule: Rule) -> None:
        """Merge a task's importances by name, which are used up, with what is held, parameter by parameter.

        Raises:
            RuntimeError: a value is out of a format's range. Nothing has been merged then.
        """
        protected = self._protected()
        anchors, importances, shapes = dict(self.anchors), dict(self.importances), dict(self._packed_shapes)
        constant = self.constant
        for name, param in self.model.named_parameters():
            if name not in new:
                continue
            old = (anchors[name], importances[name]) if name in protected else None
            generator = rounding(self.num_tasks, name, param.device) if self._storage.narrow else None
            try:
                merged = self._storage.merged(param, new.pop(name), old, rule, generator)
            except ValueError as error:
                raise RuntimeError(f"parameter {name!r} cannot be protected in {self._storage}: {error}") from error
            anchors[name], importances[name] = merged[:2]
            constant += merged[2]
            if self.packed:
                shapes[name] = param.shape
        self.anchors, self.importances, self._packed_shapes, self.constant = anchors, importances, shapes, constant
        self.num_tasks += 1
        self._free = frozenset()

    def _anchor_here(self, importances: Mapping[str, Tensor]) -> None:
        """Take over importances by name, and anchor those parameters where they are."""
        params = dict(self.model.named_parameters())
        anchors = {name: params[name].detach().to(t.dtype, copy=True) for name, t in importances.items()}
        self.importances, self.anchors = {**self.importances, **importances}, {**self.anchors, **anchors}
        self.num_tasks += 1
        self._free = frozenset()

    def _follow(self, name: str, param: Tensor) -> None:
        """Bring a parameter's anchor and importance to its device and dtype, and to its size if it grew."""
        old = self._packed_shapes.get(name, self.anchors[name].shape)
        if old != param.shape:
            who = type(self).__name__
            _log.info(
                "%s: %s grew from %s to %s; its old slice stays protected", who, name, list(old), list(param.shape)
            )
        if name in self._packed_shapes:
            if old != param.shape or self.anchors[name].device != param.device:
                self._follow_packed(name, param)
            return
        self.anchors[name] = placed(self.anchors[name], param, rest=param)
        if name in self.importances:
            self.importances[name] = placed(self.importances[name], param, dtype=self._storage.importance_dtype(param))

    def _follow_packed(self, name: str, param: Tensor) -> None:
        held = self.anchors[name], self.importances[name]
        with torch.inference_mode(False), torch.no_grad():  # they outlive this call
            if self._packed_shapes[name] != param.shape:
                anchor, importance = self._storage.dense(*held, self._packed_shapes[name])
                held = self._storage.merged(placed(anchor, param, rest=param), placed(importance, param))[:2]
            self.anchors[name], self.importances[name] = (tensor.to(param.device) for tensor in held)
        self._packed_shapes[name] = param.shape


def lists(
    params: Mapping[str, Tensor], anchors: Mapping[str, Tensor], importances: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters with their anchors and importances, as the ops take them."""
    return list(params.values()), [anchors[name] for name in params], [importances[name] for name in params]


def add_grad_(
    params: Mapping[str, nn.Parameter],
    anchors: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    strength: float,
) -> Tensor:  # []
    """Add the gradient of ``strength / 2 * sum F (theta - anchor)^2`` to those that learn; gives the value for all."""
    learning = {name: p for name, p in params.items() if p.requires_grad}
    frozen = {name: p for name, p in params.items() if not p.requires_grad}
    for name, param in learning.items():
        shards.check_grad(name, param)
    value = shards.add_quadratic_penalty_grad_(*lists(learning, anchors, importances), strength)
    if frozen:
        with torch.no_grad():
            value = value + shards.quadratic_penalty(*lists(frozen, anchors, importances), strength)
    return value


def placed(
    tensor: Tensor, param: Tensor, rest: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:  # [*], [*], [*] -> [*]
    """A tensor on its parameter's device, in its wide dtype, and grown to its size with ``rest`` (zeros if None)."""
    dtype = dtype or wide(param.dtype)
    if shards.is_sharded(param):
        return shards.placed(tensor, param, dtype)
    if tensor.shape == param.shape and tensor.dtype == dtype and tensor.device == param.device:
        return tensor
    with torch.inference_mode(False), torch.no_grad():  # it outlives this call
        result = torch.zeros_like(param, dtype=dtype) if rest is None else rest.detach().to(dtype, copy=True)
        result[tuple(slice(size) for size in tensor.shape)] = tensor.to(param.device, dtype)
    return result


def named_tensors(name: str, value: Any) -> dict[str, Tensor]:
    """Copies of a mapping's floating tensors."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from names to tensors, got {_checks.describe(value)}")
    return {key: _checks.float_tensor(f"{name}[{key!r}]", t).detach().clone() for key, t in value.items()}


def same_shapes(one: str, tensors: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> None:
    """Require the same names and shapes of two mappings of a state."""
    shapes = [{(name, tuple(t.shape)) for name, t in mapping.items()} for mapping in (tensors, others)]
    if shapes[0] != shapes[1]:
        names = sorted({name for name, _ in shapes[0] ^ shapes[1]})
        raise ValueError(f"state must hold {one} and {other} of the same names and shapes, not so: {names}")
