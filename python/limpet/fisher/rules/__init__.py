"""Rules: for each function that uses parameters, how it is computed and what it adds to their sums.

A rule computes the function as torch does, returns the *input's* gradient in backward, and describes each
parameter's use as a contribution; the parameter's own gradient is never formed.
"""

from collections.abc import Callable
from typing import Any

from limpet.fisher.rules import arithmetic, bags, conv, einsum, elementwise, linear, norm, products, recurrent
from limpet.fisher.rules.base import Call, Match, Rule
from limpet.fisher.rules.packed import FOLLOWED

RULES: dict[object, Rule] = {
    **linear.RULES,
    **products.RULES,
    **einsum.RULES,
    **arithmetic.RULES,
    **conv.RULES,
    **norm.RULES,
}

# Functions that run as others, under the recorder; None where that does not apply.
OPENED: dict[object, Callable[..., Any]] = {
    **recurrent.OPENED,
    **bags.OPENED,
    **products.OPENED,
    **einsum.OPENED,
    **elementwise.OPENED,
}

__all__ = ["FOLLOWED", "OPENED", "RULES", "Call", "Match", "Rule"]
