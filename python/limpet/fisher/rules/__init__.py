"""Rules: for each function that uses parameters, how it is computed and what it adds to their sums.

A rule computes the function as torch does, returns the *input's* gradient in backward, and describes each
parameter's use as a contribution; the parameter's own gradient is never formed.
"""

from limpet.fisher.rules import arithmetic, conv, linear, norm, products
from limpet.fisher.rules.base import Call, Match, Rule
from limpet.fisher.rules.recurrent import OPENED

RULES: dict[object, Rule] = {
    **linear.RULES,
    **products.RULES,
    **arithmetic.RULES,
    **conv.RULES,
    **norm.RULES,
}

__all__ = ["OPENED", "RULES", "Call", "Match", "Rule"]
