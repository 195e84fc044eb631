"""Buffers of items from streams: what is kept of them, and what is replayed."""

from limpet.buffers.base import Buffer
from limpet.buffers.keyed import ClassBalancedReservoir, WeightedReservoir
from limpet.buffers.reservoir import ReservoirBuffer
from limpet.buffers.ring import RingBuffer

__all__ = ["Buffer", "ClassBalancedReservoir", "ReservoirBuffer", "RingBuffer", "WeightedReservoir"]
