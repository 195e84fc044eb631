"""The reservoir on a GPU: the CPU's slots, rows and samples, without waiting for the device, in a captured graph.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

import pytest
import torch

from limpet import ReservoirBuffer, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("seen", [0, 1, 777, 10**6 + 1, 2**40 + 1, 2**62 + 2**61])
@pytest.mark.parametrize("capacity", [1, 1000, 2**61])
def test_slots_are_the_cpus(seen, capacity):
    assert torch.equal(
        ops.reservoir_slots(seen, 100_001, capacity, 5, device="cuda").cpu(),
        ops.reservoir_slots(seen, 100_001, capacity, 5),
    )


@pytest.mark.parametrize("row", [(), (3,), (16,), (784,), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_buffers_are_the_cpus(row, dtype):
    batches = [torch.randint(100, (count, *row)).to(dtype) for count in (300, 1, 5000, 777)]
    here, there = ReservoirBuffer(1000, seed=3), ReservoirBuffer(1000, seed=3, device="cuda")
    for batch in batches:
        first = batch if row == () else batch[..., :1]
        here.add((batch, first))
        there.add((batch.cuda(), first.cuda()))
    assert torch.equal(here.items, there.items.cpu())
    for size in (500, 3):
        for mine, theirs in zip(here.sample(size), there.sample(size), strict=True):
            assert torch.equal(mine.cpu(), theirs.cpu())
        here.to("cuda")


@pytest.mark.parametrize(("population", "count"), [(1, 1), (5000, 5000), (10**12, 4096)])
def test_samples_are_the_cpus(population, count):
    got = ops.sample_without_replacement(population, count, seed=1, draw=2, device="cuda")
    assert torch.equal(got.cpu(), ops.sample_without_replacement(population, count, seed=1, draw=2))


def test_nothing_waits_for_the_device():
    buffer = ReservoirBuffer(1000, device="cuda")
    x, y = torch.randn(500, 16, device="cuda"), torch.arange(500, device="cuda")
    buffer.add((x, y))
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.add((x, y))
        buffer.sample(64)
        buffer.sample_into((x, y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_goes_on_with_the_stream():
    stored, items = torch.zeros(100, 4, device="cuda"), torch.full((100,), -1, device="cuda")
    seen, batch = torch.tensor(0, device="cuda"), torch.zeros(64, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.reservoir_insert_([stored], items, seen, [batch], seed=7)
    expected = ReservoirBuffer(100, seed=7)
    for k in range(20):
        rows = torch.arange(64 * k, 64 * (k + 1)).unsqueeze(1).expand(-1, 4).float()
        batch.copy_(rows)
        graph.replay()
        expected.add(rows)
    assert int(seen) == 20 * 64
    assert torch.equal(items.cpu(), expected.items)
    assert torch.equal(stored.cpu(), torch.stack(list(expected)))


def test_page_locked_buffers_are_the_cpus():
    here, there = ReservoirBuffer(100, seed=3), ReservoirBuffer(100, seed=3, storage="pinned")
    for start, count, device in ((0, 60, "cuda"), (60, 500, "cuda"), (560, 300, "cpu")):
        x = torch.arange(start, start + count).unsqueeze(1).expand(-1, 7).float()
        here.add((x, x[:, 0]))
        there.add((x.to(device), x[:, 0].to(device)))
    assert torch.equal(here.items, there.items)
    for mine, theirs in zip(here.sample(50), there.sample(50), strict=True):
        assert torch.equal(mine, theirs)
        assert theirs.is_pinned()
    new = torch.zeros(30, 7), torch.zeros(30)
    for mine, theirs in zip(
        here.sample_into(new, 0.5), there.sample_into(tuple(t.cuda() for t in new), 0.5), strict=True
    ):
        assert theirs.is_cuda
        assert torch.equal(mine, theirs.cpu())


def test_files_take_batches_from_the_gpu(tmp_path):
    here, there = ReservoirBuffer(100, seed=3), ReservoirBuffer(100, seed=3, storage="mmap", path=tmp_path)
    for count in (60, 500):
        x = torch.randn(count, 7)
        here.add(x)
        there.add(x.cuda())
    assert torch.equal(here.items, there.items)
    assert torch.equal(here.sample(50), there.sample(50))
