"""Choosing a regulariser's strength (lambda)."""

from limpet.strength.result import StrengthSuggestion, Trial
from limpet.strength.search import Regularizer, suggest_strength

__all__ = ["Regularizer", "StrengthSuggestion", "Trial", "suggest_strength"]
