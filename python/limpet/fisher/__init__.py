"""A model's diagonal Fisher information: which function used which parameter, and what it adds to the sums."""

from limpet.fisher.diagonal import DiagonalFisher, diagonal_fisher

__all__ = ["DiagonalFisher", "diagonal_fisher"]
