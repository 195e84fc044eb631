"""Arrays of more than 2**31 bytes and more than 2**31 elements in all: offsets must be 64 bits wide."""

import pytest
import torch

from limpet import ops

pytestmark = pytest.mark.slow


def test_quadratic_over_two_gigabytes():
    count = 2**29 + 12345  # 2 GiB and a little of float32 each
    theta = torch.full((count,), 1.0)
    anchor = torch.zeros(count)
    importance = torch.zeros(count)
    importance[-3:] = 2.0
    theta.grad = torch.zeros(count)
    value = ops.add_quadratic_penalty_grad_([theta], [anchor], [importance], 10.0)
    assert value.item() == 30.0
    assert theta.grad[-4:].tolist() == [0.0, 20.0, 20.0, 20.0]


def test_linear_over_two_gigabytes():
    samples, places, columns = 3, 2**10, 2**18 - 37  # 3 GiB of input
    d = torch.zeros(samples, places, 2)
    d[:, -1, 1] = 2.0
    a = torch.empty(samples, places, columns)
    a[:, -1] = 1.0
    a[:, :-1] = 0.0
    total = ops.sum_grad_squared_linear(d, a)
    assert torch.equal(total[0], torch.zeros(columns))
    assert torch.equal(total[1], torch.full((columns,), 12.0))
