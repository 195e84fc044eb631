"""limpet: fused kernels for continual learning, with thin PyTorch wrappers."""

from limpet import ops

__version__ = "0.1.0"

__all__ = ["ops"]
