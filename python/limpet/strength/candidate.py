"""One strength on trial: its own copy of model and regulariser, and its training, held where it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from limpet import _checks
from limpet.methods.quadratic import evaluating
from limpet.strength.randomness import RandomState, seed_all
from limpet.strength.result import Trial


class Candidate:
    """A training that can be gone on with.

    Its random numbers are its own: between two calls other candidates may draw as they like.
    """

    def __init__(
        self,
        regularizer: Any,
        strength: float,
        train: Callable[[nn.Module, Any], Iterator[Any]],
        seed: int,
        devices: Sequence[torch.device],
    ) -> None:
        self.strength = strength
        self.steps = 0
        self._devices = devices
        mine = copy.deepcopy(regularizer)  # its model is copied with it, so that it protects the copy
        mine.strength = strength
        self._model: nn.Module = mine.model
        seed_all(seed)
        self._training = train(self._model, mine)
        if not isinstance(self._training, Iterator):
            raise TypeError(
                "train must be a generator function: it must yield after each step, "
                f"but returned {_checks.describe(self._training)}"
            )
        self._random = RandomState(devices)

    def train(self, steps: int, advance: Callable[[], None]) -> None:
        """Go on until ``steps`` have been done in all, or the training has ended."""
        modes = _modes()
        self._random.restore()
        try:
            while self.steps < steps:
                try:
                    next(self._training)
                except StopIteration:
                    if not self.steps:
                        raise ValueError("train must yield after each step, but ended without a yield") from None
                    break
                if _modes() != modes:  # the evaluation, and the other candidates, would be in it too
                    raise RuntimeError(
                        "train must yield outside of blocks that change torch's modes (no_grad, autocast)"
                    )
                self.steps += 1
                advance()
        finally:
            self._random = RandomState(self._devices)

    def evaluate(self, rung: int, evaluate: Callable[[nn.Module], tuple[float, float]]) -> Trial:
        """Measure where it stands."""
        retained = new = float("nan")
        if all(bool(param.isfinite().all()) for param in self._model.parameters()):
            with evaluating(self._model), torch.no_grad():
                retained, new = _accuracies(evaluate(self._model))
        return Trial(rung, self.strength, self.steps, retained, new)

    def close(self) -> None:
        """End the training where it stands, and let go of the copies."""
        if hasattr(self._training, "close"):
            self._training.close()
        del self._training, self._model


def _modes() -> tuple[bool, ...]:
    """What a ``with`` block may have changed."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _accuracies(pair: Any) -> tuple[float, float]:
    """Check what ``evaluate`` gave: two accuracies in [0, 1], or NaN for a model that has diverged."""
    try:
        retained, new = (float(value) for value in pair)
    except (TypeError, ValueError):
        raise TypeError(f"evaluate must return two accuracies, (retained, new), got {_checks.describe(pair)}") from None
    for name, value in (("retained", retained), ("new", new)):
        if value < 0 or value > 1:
            raise ValueError(f"evaluate must return accuracies in [0, 1], got {name} = {value!r}")
    return retained, new
