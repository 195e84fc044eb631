"""Random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: Tensor,  # [*, 4], int64, each word below 2^32
    key: tuple[int, int],  # each word below 2^32
) -> Tensor:  # [*, 4], int64, each word below 2^32
    """Philox 4x32-10, the counter-based generator of Salmon et al. (2011): four random words for each counter."""
    a, b, c, d = counter.unbind(-1)
    first, second = key
    for _ in range(10):
        (a_high, a_low), (c_high, c_low) = _product(a, _FACTORS[0]), _product(c, _FACTORS[1])
        a, b, c, d = c_high ^ b ^ first, c_low, a_high ^ d ^ second, a_low
        first, second = (first + _WEYL[0]) & WORD, (second + _WEYL[1]) & WORD
    return torch.stack([a, b, c, d], dim=-1)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product."""
    high, low = word * (factor >> 16), word * (factor & 0xFFFF)  # 48 bits; the whole product would overflow
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & WORD
