"""What ``diagonal_fisher`` and ``FisherAccumulator`` give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

ROUTES = ("fused", "materialised", "per_sample")  # from cheap to costly


class DiagonalFisher(Mapping[str, Tensor]):
    """The diagonal of the Fisher information, by parameter name.

    Attributes:
        num_samples: samples that the mean was taken over.
        routes: for each name ``"fused"`` (one backward pass per batch; also for parameters that the model never uses,
            whose value is zero), ``"materialised"`` (the same, but per-sample gradients were formed, a few samples at
            a time) or ``"per_sample"`` (one backward pass per sample); the costliest of all batches. All are exact.
    """

    def __init__(self, values: Mapping[str, Tensor], num_samples: int, routes: Mapping[str, str]) -> None:
        self._values, self.num_samples, self.routes = dict(values), num_samples, dict(routes)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        slow = sum(route == "per_sample" for route in self.routes.values())
        return f"DiagonalFisher({len(self)} parameters, {slow} of them per sample; {self.num_samples} samples)"
