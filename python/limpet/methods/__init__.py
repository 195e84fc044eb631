"""Methods against forgetting, built from public ops only."""

from limpet.methods.ewc import EWC

__all__ = ["EWC"]
