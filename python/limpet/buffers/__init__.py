"""Buffers of items from streams: what is kept of them, and what is replayed."""

from limpet.buffers.reservoir import ReservoirBuffer

__all__ = ["ReservoirBuffer"]
