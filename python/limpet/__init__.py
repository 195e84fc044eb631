"""limpet: fused kernels for continual learning, with thin PyTorch wrappers."""

from limpet import ops
from limpet.fisher import DiagonalFisher, diagonal_fisher

__version__ = "0.1.0"

__all__ = ["DiagonalFisher", "diagonal_fisher", "ops"]
