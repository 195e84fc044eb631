import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same seed and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
