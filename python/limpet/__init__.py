"""limpet: fused kernels for continual learning, with thin PyTorch wrappers.

>>> import limpet
>>> sorted(limpet.__all__)
['AccuracyMatrix', 'DiagonalFisher', 'EWC', 'FisherAccumulator', 'diagonal_fisher', 'ops', 'optim']
"""

from limpet import ops, optim
from limpet.fisher import DiagonalFisher, FisherAccumulator, diagonal_fisher
from limpet.methods import EWC
from limpet.metrics import AccuracyMatrix

__version__ = "0.1.0"

__all__ = ["EWC", "AccuracyMatrix", "DiagonalFisher", "FisherAccumulator", "diagonal_fisher", "ops", "optim"]
