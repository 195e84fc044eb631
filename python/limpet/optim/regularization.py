"""What regularizers ask of an optimizer's step, brought down to one quadratic and one path integral per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.methods.collapse import Collapse, Quadratic
from limpet.ops.narrow import PACKED_DTYPES
from limpet.reference import wide

_DTYPES = frozenset(_checks.FLOAT_DTYPES)


@runtime_checkable
class Regularizer(Protocol):
    """What a fused optimizer asks of a regularizer: EWC, Synaptic Intelligence, or one's own.

    A regularizer that also has ``integrals``, a dict of path integrals by parameter name, has them updated by the step.
    One that has ``begin_fused_step()`` and ``end_fused_step()`` hears of each step before it, and after it.
    """

    model: nn.Module

    def quadratic(self) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Anchors and importances by parameter name, and the strength: ``strength / 2 * sum F (theta - anchor)^2``.

        Empty dicts where nothing is protected yet. Asked for at every step.
        """


class Regularization:
    """The regularizers of one optimizer; parameters are matched by identity, through each regularizer's model."""

    def __init__(self, regularizers: Any) -> None:
        if isinstance(regularizers, (str, bytes, dict, Tensor)) or not isinstance(regularizers, Iterable):
            raise TypeError(f"regularizers must be a list or tuple, got {_checks.describe(regularizers)}")
        self._regularizers = tuple(regularizers)
        for k, regularizer in enumerate(self._regularizers):
            if not isinstance(getattr(regularizer, "model", None), nn.Module):
                raise TypeError(f"regularizers[{k}].model must be a module, got {_checks.describe(regularizer)}")
            if not callable(getattr(regularizer, "quadratic", None)):
                raise TypeError(
                    f"regularizers[{k}] must have a method quadratic(), got {_checks.describe(regularizer)}"
                )
            if getattr(regularizer, "packed", False):  # now, not only once there is something to protect
                raise _packed(k)
        integrating = [k for k, regularizer in enumerate(self._regularizers) if hasattr(regularizer, "integrals")]
        if len(integrating) > 1:
            raise ValueError(f"at most one of regularizers may have path integrals, got them in {integrating}")
        self._named: list[dict[str, nn.Parameter]] = [{} for _ in self._regularizers]
        self._collapse = Collapse()

    def require_shared(self, params: Iterable[Tensor]) -> None:
        """Require that every regularizer's model has a parameter among ``params``."""
        known = set(params)
        for k, regularizer in enumerate(self._regularizers):
            if known.isdisjoint(regularizer.model.parameters()):
                raise ValueError(f"regularizers[{k}].model shares no parameter with the optimizer")

    def begin_step(self) -> None:
        """Tell those regularizers of the step to come that want to know."""
        for regularizer in self._regularizers:
            if hasattr(regularizer, "begin_fused_step"):
                regularizer.begin_fused_step()

    def end_step(self) -> None:
        """Tell them that it was taken."""
        for regularizer in self._regularizers:
            if hasattr(regularizer, "end_fused_step"):
                regularizer.end_fused_step()

    def quadratics(self) -> dict[Tensor, Quadratic]:
        """One quadratic for each protected parameter: a regularizer's own tensors, or the sum of several."""
        found: dict[Tensor, list[Quadratic]] = {}
        for k, regularizer in enumerate(self._regularizers):
            anchors, importances, strength = regularizer.quadratic()
            strength = _checks.finite_number(f"strength of regularizers[{k}]", strength)
            if anchors.keys() != importances.keys():
                names = sorted(anchors.keys() ^ importances.keys())
                raise ValueError(
                    f"regularizers[{k}] must give anchors and importances of the same names, not so: {names}"
                )
            for name, param in self._params(k, anchors):
                quadratic = Quadratic(anchors[name], importances[name], strength)
                _check(k, name, param, "anchor", quadratic.anchor)
                _check(k, name, param, "importance", quadratic.importance)
                found.setdefault(param, []).append(quadratic)
        return self._collapse.sums(found)

    def integrals(self) -> dict[Tensor, Tensor]:
        """The path integral of each parameter that has one."""
        found: dict[Tensor, Tensor] = {}
        for k, regularizer in enumerate(self._regularizers):
            integrals: dict[str, Tensor] = getattr(regularizer, "integrals", {})
            for name, param in self._params(k, integrals):
                _check(k, name, param, "path integral", integrals[name], exactly=wide(param.dtype))
                found[param] = integrals[name]
        return found

    def _params(self, k: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
        """The names of ``tensors`` with the parameters that have them; a model is walked only where one is unknown."""
        if not tensors.keys() <= self._named[k].keys():
            self._named[k] = dict(self._regularizers[k].model.named_parameters())
        for name in tensors:
            param = self._named[k].get(name)
            if param is None:
                raise RuntimeError(f"the model of regularizers[{k}] has no parameter {name!r}")
            yield name, param

    def forget_names(self) -> None:
        """Look names up again at the next step."""
        self._named = [{} for _ in self._regularizers]


def _packed(k: int) -> TypeError:
    return TypeError(
        f"regularizers[{k}] must hold its anchors and importances as floats: a fused step does not read packed ones. "
        "Leave it out and call its add_penalty_grad_() before each step, or hold importances as bfloat16 and anchors "
        "as float32"
    )


def _check(k: int, name: str, param: Tensor, what: str, tensor: Tensor, exactly: torch.dtype | None = None) -> None:
    """Require that a regularizer's tensor lies beside its parameter."""
    if tensor.dtype in PACKED_DTYPES.values():
        raise _packed(k)
    fits = tensor.dtype == exactly if exactly else (tensor.dtype == torch.float64) == (param.dtype == torch.float64)
    if not fits or tensor.dtype not in _DTYPES or tensor.shape != param.shape or tensor.device != param.device:
        raise ValueError(
            f"regularizers[{k}]: the {what} of {name!r} must fit {_checks.describe(param.data)}, "
            f"got {_checks.describe(tensor)}"
        )
