"""Which rows belong to which sample: the layouts tried, and the evidence that decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limpet.fisher.layout import Layout, candidates, established, remaining, rows_changed


def test_candidates() -> None:
    assert candidates([3, 7], 3) == [Layout(0)]
    assert candidates([3, 3], 3) == [Layout(0), Layout(1)]
    assert candidates([6], 3) == [Layout(0, 2, False), Layout(0, 2, True)]
    assert candidates([7, 0], 3) == []
    assert candidates([], 3) == []


@pytest.mark.parametrize("layout", [Layout(0), Layout(1), Layout(0, 2, False), Layout(0, 2, True), Layout(1, 4, True)])
def test_split_puts_the_samples_in_front(layout: Layout) -> None:
    samples, owner = 3, torch.arange(3)
    size = samples * layout.places
    rows = owner.repeat(layout.places) if layout.time_major else owner.repeat_interleave(layout.places)
    shape = [5] * layout.dim + [size, 2]
    tensor = rows.view(*[1] * layout.dim, size, 1).expand(shape)
    split = layout.split(tensor, samples)
    assert split.shape[0] == samples
    assert split.numel() == tensor.numel()
    for n in range(samples):
        assert bool((split[n] == n).all())


def touched(*shape: int, at: list[tuple[int, ...]]) -> Tensor:
    rows = torch.zeros(shape, dtype=torch.bool)
    for place in at:
        rows[place] = True
    return rows


def test_one_layout_explains() -> None:
    evidence = [([0], touched(3, 3, at=[(0, 0), (0, 2)])), ([1], touched(3, 3, at=[(1, 1)]))]
    assert established([3, 3], 3, evidence) == Layout(0)
    evidence = [([0], touched(6, at=[(0,), (3,)])), ([1], touched(6, at=[(4,)]))]
    assert established([6], 3, evidence) == Layout(0, 2, time_major=True)


def test_several_samples_at_a_time() -> None:
    both = [([0, 1], touched(6, at=[(0,), (3,), (4,)]))]
    assert established([6], 3, both) == Layout(0, 2, time_major=True)
    assert remaining([6], 3, [([0, 1], touched(6, at=[(0,), (1,)]))]) == candidates([6], 3)
    assert remaining([3], 3, [([0, 1], touched(3, at=[(1,), (2,)]))]) == []


def test_nothing_is_guessed() -> None:
    diagonal = [([0], touched(3, 3, at=[(0, 0)])), ([1], touched(3, 3, at=[(1, 1)]))]
    assert established([3, 3], 3, diagonal) is None  # both dimensions explain it
    assert established([3, 3], 3, [([0], touched(3, 3, at=[]))]) is None  # nothing was seen
    assert established([3], 3, [([0], touched(3, at=[(0,), (2,)]))]) is None  # no layout explains it
    assert established([4], 3, [([0], touched(4, at=[(0,)]))]) is None  # no layout has this size


def test_rows_changed_ignores_rounding() -> None:
    before = torch.tensor([[1.0, 100.0], [2.0, 3.0], [4.0, 5.0]])
    after = before.clone()
    after[1, 0] *= 1 + 1e-6
    after[2, 1] = 5.1
    assert rows_changed(before, after, 1).tolist() == [False, False, True]
    assert rows_changed(torch.tensor([1, 2]), torch.tensor([1, 3]), 1).tolist() == [False, True]
