"""The random generators that a training loop may draw from, set aside and brought back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch


class RandomState:
    """The state of torch's generators (the CPU's and some GPUs'), of NumPy's global one and of Python's, as it is now.

    >>> state = RandomState()
    >>> first = torch.rand(()), np.random.rand(), random.random()
    >>> state.restore()
    >>> first == (torch.rand(()), np.random.rand(), random.random())
    True
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._devices = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global one is the one that others draw from
        self._python = random.getstate()

    def restore(self) -> None:
        """Make it the state again."""
        torch.set_rng_state(self._torch)
        for device, state in self._devices:
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


def seed_all(seed: int) -> None:
    """Seed all of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
