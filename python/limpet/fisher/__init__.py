"""A model's diagonal Fisher information: which function used which parameter, and what it adds to the sums."""

from limpet.fisher.accumulator import FisherAccumulator
from limpet.fisher.diagonal import diagonal_fisher
from limpet.fisher.result import DiagonalFisher

__all__ = ["DiagonalFisher", "FisherAccumulator", "diagonal_fisher"]
