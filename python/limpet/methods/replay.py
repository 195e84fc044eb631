"""Experience replay: old items in every batch of new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limpet import _checks
from limpet.buffers import Buffer, ReservoirBuffer


class Replay:
    """Train on a uniform sample of everything seen, beside what is new (experience replay with a reservoir).

    Two lines more in a training loop, and no word about tasks::

        for x, y in batches:
            mixed_x, mixed_y = replay.mix(x, y)
            loss = cross_entropy(model(mixed_x), mixed_y)
            ...
            replay.observe(x, y)

    Args:
        buffer: where items are kept, or how many are to be kept in a :class:`limpet.ReservoirBuffer`.
        fraction: the replayed items' share of a mixed batch, in [0, 1): a half replays as many as are new.
        seed: of the buffer's draws, where ``buffer`` is a number.
        transform: called with the replayed ``(x, y)`` alone, to augment them; it must keep shapes and dtypes.

    Attributes:
        buffer: of ``(x, y)``.
        fraction: as given; it may be changed at any time.

    Raises:
        TypeError: ``buffer`` is neither a buffer nor an integer, or another argument is of the wrong type.
        ValueError: a number is out of range.

    >>> import torch
    >>> replay = Replay(100, fraction=0.2)
    >>> x, y = torch.randn(102, 8), torch.randint(10, (102,))
    >>> replay.observe(x, y)
    >>> mixed_x, mixed_y = replay.mix(x, y)
    >>> mixed_x.shape, mixed_y.shape
    (torch.Size([128, 8]), torch.Size([128]))
    """

    def __init__(
        self,
        buffer: Buffer | int,
        *,
        fraction: float = 0.5,
        seed: int = 0,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> None:
        self.buffer = buffer if isinstance(buffer, Buffer) else ReservoirBuffer(buffer, seed=seed)
        self.fraction = _fraction("fraction", fraction)
        self._transform = _checks.optional_callable("transform", transform)

    def mix(self, x: Any, y: Any) -> tuple[Any, Any]:  # tensors [count, *] -> [count + replayed, *]
        """New items, and sampled ones behind them; before anything was observed the new ones alone.

        Raises:
            TypeError: as :meth:`limpet.ReservoirBuffer.sample_into`.
            ValueError: as :meth:`limpet.ReservoirBuffer.sample_into`.
        """
        transform = self._transform
        pairwise = None if transform is None else lambda pair: transform(*pair)
        mixed: tuple[Any, Any] = self.buffer.sample_into((x, y), self.fraction, transform=pairwise)
        return mixed

    def observe(self, x: Any, y: Any, outputs: object = None) -> None:  # tensors [count, *]
        """Let the buffer see new items, once they have been trained on; what the model said about them is not kept.

        Raises:
            TypeError: as :meth:`limpet.ReservoirBuffer.add`.
            ValueError: as :meth:`limpet.ReservoirBuffer.add`.
        """
        self.buffer.add((x, y))

    def state_dict(self) -> dict[str, Any]:
        """The buffer's state and the fraction."""
        return {"fraction": self.fraction, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`.

        Raises:
            TypeError: as :meth:`limpet.ReservoirBuffer.load_state_dict`.
            ValueError: keys are missing or unknown, the fraction is out of range, or as
                :meth:`limpet.ReservoirBuffer.load_state_dict`. Nothing has been taken over then.
        """
        _checks.keys("state", state, {"fraction", "buffer"})
        fraction = _fraction("state['fraction']", state["fraction"])
        self.buffer.load_state_dict(state["buffer"])
        self.fraction = fraction

    def __repr__(self) -> str:
        return f"Replay({self.buffer!r}, fraction={self.fraction:g})"


def _fraction(name: str, value: Any) -> float:
    number = _checks.finite_number(name, value, minimum=0.0)
    if number >= 1.0:
        raise ValueError(f"{name} must be below 1, got {value}")
    return number
