"""Keyed reservoirs and the ring on a GPU: the CPU's items, keys and samples, without waiting for the device.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

import pytest
import torch

from limpet import ClassBalancedReservoir, RingBuffer, WeightedReservoir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

KINDS = pytest.mark.parametrize("kind", [ClassBalancedReservoir, WeightedReservoir, RingBuffer])


def add(buffer, count, device):
    generator = torch.Generator().manual_seed(buffer.seen)
    x, weight = torch.randn(count, 16, generator=generator), torch.rand(count, generator=generator)
    batch = x.to(device), torch.randint(7, (count,), generator=generator).to(device)
    buffer.add(batch, **({"weight": weight.to(device)} if isinstance(buffer, WeightedReservoir) else {}))


@KINDS
def test_buffers_are_the_cpus(kind):
    here, there = kind(500, seed=3), kind(500, seed=3, device="cuda")
    for count in (300, 1, 5000, 0, 777):
        for buffer in (here, there):
            add(buffer, count, buffer.device or "cpu")
    assert torch.equal(here.items, there.items.cpu())
    if kind is not RingBuffer:
        order, other = here._order(), there._order()
        assert torch.equal(here._keys[order], there._keys[other].cpu())
        assert torch.equal(here._groups[order], there._groups[other].cpu())
    for one, other in zip(here.sample(200), there.sample(200), strict=True):
        assert torch.equal(one, other.cpu())
    there.to("cpu")
    for buffer in (here, there):
        add(buffer, 333, "cpu")
    assert torch.equal(here.items, there.items)


@KINDS
def test_nothing_waits_for_the_device(kind):
    buffer = kind(500, device="cuda")
    x, y = torch.randn(800, 16, device="cuda"), torch.arange(800, device="cuda")
    options = {"weight": torch.rand(800, device="cuda")} if kind is WeightedReservoir else {}
    buffer.add((x, y), **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.add((x, y), **options)
        buffer.sample(64)
        buffer.sample_into((x, y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
