"""The stream of stream_recommender.py: users, products, and tastes that are known exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

USERS, PRODUCTS, GROUPS = 2000, 1000, 20  # half of the products a season, in so many groups of alike ones
INTERACTION = np.dtype([("user", "<i4"), ("product", "<i4")])


class World:
    """Who likes what, and a stream of it. Half-way the season ends: other products come, and users like others.

    In a season a user likes two groups of products; one interaction in ten is with any product.
    """

    def __init__(self, items: int, seed: int, per_message: int = 4096) -> None:
        self.items, self.seed, self.per_message = items, seed, per_message
        chance = np.random.default_rng(seed).random((2, USERS, GROUPS))
        self.tastes = chance.argsort(axis=2)[:, :, :2]  # [season, user, 2]

    @property
    def messages(self) -> int:
        return -(-self.items // self.per_message)

    def message(self, number: int) -> bytes:
        """The next ``per_message`` interactions, or what is left of the stream."""
        first = number * self.per_message
        count = min(self.per_message, self.items - first)
        draw = np.random.default_rng([self.seed, number])
        season = (np.arange(first, first + count) >= self.items // 2).astype(int)
        rows = np.empty(count, INTERACTION)
        rows["user"] = user = draw.integers(USERS, size=count)
        group = self.tastes[season, user, draw.integers(2, size=count)]
        group = np.where(draw.random(count) < 0.1, draw.integers(GROUPS, size=count), group)
        alike = PRODUCTS // 2 // GROUPS
        rows["product"] = (season * GROUPS + group) * alike + draw.integers(alike, size=count)
        return rows.tobytes()

    def accuracy(self, users: Tensor, products: Tensor) -> tuple[float, float]:  # [USERS, width], [PRODUCTS, width]
        """For old and for new products: of the ten that match a user best, the share that the user likes."""
        shares = []
        for season, tastes in enumerate(torch.from_numpy(self.tastes)):
            best = (users @ products.chunk(2)[season].T).topk(10).indices  # [user, 10]
            group = best // (PRODUCTS // 2 // GROUPS)
            shares.append(float((group[:, :, None] == tastes[:, None, :]).any(2).float().mean()))
        return shares[0], shares[1]
