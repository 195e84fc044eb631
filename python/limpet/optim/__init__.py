"""Optimizers that take a step, a quadratic penalty's gradient and path integrals in one pass over the parameters.

Drop-in for those of :mod:`torch.optim`: the same arguments, states that load into each other, and the same numbers to
rounding.
"""

from limpet.optim.adamw import AdamW
from limpet.optim.regularization import Regularizer
from limpet.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Regularizer"]
