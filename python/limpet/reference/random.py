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
    factors, weyl, keys = (counter.new_tensor(pair) for pair in (_FACTORS, _WEYL, key))
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for _ in range(10):
        high, low = even * (factors >> 16), even * (factors & 0xFFFF)  # 48 bits; a whole product would overflow
        product = (high + (low >> 16)) >> 16, ((high << 16) + low) & WORD  # its upper and its lower 32 bits
        even, odd = product[0].flip(-1) ^ odd ^ keys, product[1].flip(-1)
        keys = (keys + weyl) & WORD
    return torch.stack([even, odd], dim=-1).flatten(-2)
