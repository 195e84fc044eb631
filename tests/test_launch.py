"""Memory for what an optimizer keeps."""

import pytest
import torch

from limpet import _launch


@pytest.mark.parametrize("elements", [0, 1, 1 << 20, (1 << 20) + 3])  # 4 MB and more ask for huge pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_like_are_zeros_in_memory_of_their_own(elements, dtype):
    like = torch.ones(elements, dtype=dtype, requires_grad=True)
    zeros = _launch.zeros_like(like)
    assert zeros.shape == like.shape
    assert zeros.dtype == dtype
    assert not zeros.requires_grad
    assert not zeros.any()
    zeros.fill_(2.0)
    assert bool((like == 1).all())


def test_zeros_like_lie_as_the_tensor_does():
    like = torch.ones(64, 32, 32, 32).to(memory_format=torch.channels_last)
    assert _launch.zeros_like(like).stride() == like.stride()
