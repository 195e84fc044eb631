"""The law of keyed reservoirs in plain Python: everything is kept, and trimmed at the end."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import inf, log, log1p

import torch

from limpet.reference import philox

KEY = 3
WORD = 2**32 - 1


def bits(items: range, seed: int) -> list[int]:
    """63 random bits of each item."""
    counters = [[item // 2 & WORD, item // 2 >> 32, 0, KEY << 16] for item in items]
    words = philox(torch.tensor(counters, dtype=torch.int64).view(-1, 4), (seed & WORD, seed >> 32)).tolist()
    return [(w[2 * (item % 2)] << 32 | w[2 * (item % 2) + 1]) >> 1 for item, w in zip(items, words, strict=True)]


def exponentials(items: range, seed: int, weights: Sequence[float]) -> list[float]:
    """Keys of weighted items: -log(u) / w."""
    return [exponential(b) / w if w else inf for b, w in zip(bits(items, seed), weights, strict=True)]


def exponential(b: int) -> float:
    """-log(1 - b / 2^63), from the side on which it can be told exactly."""
    return -log1p(-b / 2**63) if b < 2**62 else -log((2**63 - b) / 2**63)


def held(keys: Sequence[float], groups: Sequence[int], capacity: int) -> list[int]:
    """The items that stay: the group with the most gives up its largest key until there is room for all."""
    of_group: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for item, (key, group) in enumerate(zip(keys, groups, strict=True)):
        of_group[group].append((key, item))
    for rows in of_group.values():
        rows.sort()
    counts = Counter({group: len(rows) for group, rows in of_group.items()})
    while counts.total() > capacity:
        counts[max(counts, key=lambda group: (counts[group], group))] -= 1
    return sorted(item for group, rows in of_group.items() for _, item in rows[: counts[group]])
