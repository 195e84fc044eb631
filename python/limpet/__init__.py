"""limpet: fused kernels for continual learning, with thin PyTorch wrappers.

>>> import limpet
>>> sorted(limpet.__all__)  # doctest: +NORMALIZE_WHITESPACE
['AccuracyMatrix', 'ClassBalancedReservoir', 'Composite', 'DarkReplay', 'DiagonalFisher', 'EWC',
 'FisherAccumulator', 'Hybrid', 'MemoryAwareSynapses', 'ProgressiveNetwork', 'RWalk', 'Replay', 'ReservoirBuffer',
 'RingBuffer', 'SynapticIntelligence', 'WeightedReservoir', 'diagonal_fisher', 'ops', 'optim', 'suggest_strength']
"""

from limpet import ops, optim
from limpet.buffers import ClassBalancedReservoir, ReservoirBuffer, RingBuffer, WeightedReservoir
from limpet.fisher import DiagonalFisher, FisherAccumulator, diagonal_fisher
from limpet.methods import (
    EWC,
    Composite,
    DarkReplay,
    Hybrid,
    MemoryAwareSynapses,
    ProgressiveNetwork,
    Replay,
    RWalk,
    SynapticIntelligence,
)
from limpet.metrics import AccuracyMatrix
from limpet.strength import suggest_strength

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "AccuracyMatrix",
    "ClassBalancedReservoir",
    "Composite",
    "DarkReplay",
    "DiagonalFisher",
    "FisherAccumulator",
    "Hybrid",
    "MemoryAwareSynapses",
    "ProgressiveNetwork",
    "RWalk",
    "Replay",
    "ReservoirBuffer",
    "RingBuffer",
    "SynapticIntelligence",
    "WeightedReservoir",
    "diagonal_fisher",
    "ops",
    "optim",
    "suggest_strength",
]
