"""``reference.philox`` against the known answers that Random123 publishes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limpet import reference

KNOWN = [  # counter, key, result: the philox4x32 10 lines of Random123's kat_vectors
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    assert reference.philox(torch.tensor(words(counter)), (k0, k1)).tolist() == words(result)


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The definition, in integers of any size."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


WORDS = st.integers(0, 2**32 - 1)


@given(
    st.lists(st.lists(WORDS, min_size=4, max_size=4), min_size=1, max_size=3), st.lists(WORDS, min_size=2, max_size=2)
)
def test_every_counter_by_itself(counters: list[list[int]], key: list[int]) -> None:
    got = reference.philox(torch.tensor(counters), (key[0], key[1]))
    assert got.tolist() == [philox_in_python(counter, key) for counter in counters]
