"""Peak memory of a Fisher pass, by what torch's allocator was asked for."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import limpet
from cases import ResNet18, with_statistics
from compare import peak_bytes


def conv_net():
    """Activations of 2 MB a layer, and few parameters."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def test_the_first_batch_needs_no_more_than_a_later_one():
    model = conv_net()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    activation = 32 * 16 * 32 * 32 * 4
    ordinary = peak_bytes(lambda: nn.functional.cross_entropy(model(x), y).backward())
    accumulator = limpet.FisherAccumulator(model)
    first = peak_bytes(lambda: accumulator.add((x, y)))  # with the check of rows, which must keep no graph
    later = peak_bytes(lambda: accumulator.add((x, y)))
    assert 4 * activation < first < later + activation / 2
    assert later < ordinary


def test_mixed_precision_keeps_activations_narrow():
    model = with_statistics(ResNet18(width=8))
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))

    def ordinary():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = nn.functional.cross_entropy(model(x), y)
        losses.backward()

    model.zero_grad(set_to_none=False)
    accumulator = limpet.FisherAccumulator(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.add((x, y))
        later = peak_bytes(lambda: accumulator.add((x, y)))
    assert later < 1.2 * peak_bytes(ordinary)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have limits of their own")
def test_memory_that_a_batch_frees_is_kept_for_the_next():
    script = """
import resource, torch, limpet
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(1 << 20, dtype=torch.uint8).fill_(1) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
limpet.FisherAccumulator(torch.nn.Linear(2, 2))
print(min([faults() for _ in range(6)][1:]))  # otherwise 5120, as a rule
"""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    result = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have limits of their own")
@pytest.mark.parametrize("limits", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_large_blocks_are_kept_during_a_batch_unless_malloc_was_set_up(limits):
    script = """
import resource, torch, limpet
from torch import nn
def faults(f):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
model = nn.Sequential(nn.Linear(1, 1 << 15), nn.ReLU(), nn.Linear(1 << 15, 2))
batch = torch.randn(300, 1), torch.zeros(300, dtype=torch.int64)  # activations of 39 MB, of 9600 pages
accumulator = limpet.FisherAccumulator(model)
for _ in range(3):
    accumulator.add(batch)
print(min(faults(lambda: accumulator.add(batch)) for _ in range(3)))
print(min(faults(lambda: torch.ones(300 << 20, dtype=torch.uint8)) for _ in range(3)))
"""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", script], env={**plain, **limits}, capture_output=True, text=True, check=True
    )
    during, outside = map(int, result.stdout.split())
    assert during > 9000 if limits else during < 100
    assert outside > 70000  # mapped as ever: a block that is larger than all that was kept
