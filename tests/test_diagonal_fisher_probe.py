"""How ``diagonal_fisher`` finds out whose rows are whose: what it runs for that, and which interaction it sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from zoo import WIDTH, Net, assert_exact, classes, definition, head

# --- interaction that no gradient shows ------------------------------------------------------------------------------

INTERACTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(dim=0, keepdim=True),
    "first": lambda h: h[:1],
    "second": lambda h: h[1:2],
    "last": lambda h: h[-1:],
    "flipped": lambda h: h.flip(0),
    "the one before": lambda h: F.pad(h[:-1], (0, 0, 1, 0)),
    "the one behind": lambda h: F.pad(h[1:], (0, 0, 0, 1)),
    "those before": lambda h: h.cumsum(0) - h,
    "those behind": lambda h: h.sum(0) - h.cumsum(0),
    "swapped in pairs": lambda h: h[torch.arange(len(h)).view(-1, 2).flip(1).flatten()] if len(h) % 2 == 0 else h,
}


@pytest.mark.parametrize(
    ("name", "size"), [(name, n) for name in INTERACTIONS for n in (2, 3, 4, 5, 8) if "pairs" not in name or n % 2 == 0]
)
def test_samples_that_interact_out_of_the_gradients_sight(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(torch.tanh(h := m.first(x)) + INTERACTIONS[name](h).detach()),
                first=nn.Linear(WIDTH, WIDTH), head=head())  # fmt: skip
    with pytest.raises(RuntimeError, match="the loss or the model mixes samples"):
        limpet.diagonal_fisher(model, [(torch.randn(size, WIDTH), classes(size))])


# --- what is run -----------------------------------------------------------------------------------------------------


def runs(model: nn.Module, x: Tensor) -> list[int]:
    """The batch sizes of the forward passes for one batch; the result must be exact."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    batch = x, classes(len(x))
    fisher = limpet.diagonal_fisher(model, [batch])
    handle.remove()
    assert_exact(fisher, definition(model, [batch]), torch.float64)
    return sizes


def mlp(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.first(x)))


def with_positions(m: Net, x: Tensor) -> Tensor:
    """Constant rows of every sample: only a gradient says whose they are."""
    return m.head(torch.tanh(m.first(x)) + m.positions(torch.zeros(len(x), dtype=torch.int64)))


@pytest.mark.parametrize(
    ("forward", "size", "expected"),
    [
        (mlp, 8, [3, 3, 8, 8]),  # the probe, some samples replaced; the check of rows, and the batch itself
        (mlp, 4, [3, 3, 4, 4]),
        (mlp, 3, [2, 2, 2, 3, 3]),  # of two samples each is replaced in turn
        (mlp, 1, [1]),
        (with_positions, 8, [3, 3, 3, 8, 8]),  # once more, to follow a gradient
    ],
)
def test_what_the_first_batch_runs(forward: Callable[..., Tensor], size: int, expected: list[int]) -> None:
    torch.manual_seed(0)
    model = Net(forward, first=nn.Linear(WIDTH, WIDTH), head=head(), positions=nn.Embedding(2, WIDTH)).double()
    assert runs(model, torch.randn(size, WIDTH, dtype=torch.float64)) == expected
