"""Progressive networks: columns, laterals between them, and what the laterals carry."""

from limpet.methods.progressive.cache import FeatureCache
from limpet.methods.progressive.network import ProgressiveNetwork
from limpet.methods.progressive.sensitivity import LateralSensitivity

__all__ = ["FeatureCache", "LateralSensitivity", "ProgressiveNetwork"]
