import pytest
import torch
from hypothesis import settings

settings.register_profile("limpet", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("limpet")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same seed and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_seeded):
    """For networks so small that threads only wait for each other."""
    torch.set_num_threads(1)
