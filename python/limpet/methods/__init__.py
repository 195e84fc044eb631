"""Methods against forgetting, built from public ops only."""

from limpet.methods.composite import Composite
from limpet.methods.dark_replay import DarkReplay
from limpet.methods.ewc import EWC
from limpet.methods.hybrid import Hybrid
from limpet.methods.memory_aware_synapses import MemoryAwareSynapses
from limpet.methods.progressive import ProgressiveNetwork
from limpet.methods.replay import Replay
from limpet.methods.rwalk import RWalk
from limpet.methods.synaptic_intelligence import SynapticIntelligence

__all__ = [
    "EWC",
    "Composite",
    "DarkReplay",
    "Hybrid",
    "MemoryAwareSynapses",
    "ProgressiveNetwork",
    "RWalk",
    "Replay",
    "SynapticIntelligence",
]
