import pytest
import torch

from limpet.scenarios.memory import PeakMemory


def test_peak_memory_sees_a_short_peak():
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    if idle.bytes is None:
        pytest.skip("this system does not tell the peak of resident memory")
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(8 << 20)  # 32 MiB, free again at once
    assert peak.bytes >= 30 << 20
    assert idle.bytes < 8 << 20
