"""From tensors to the plain integers that the compiled core takes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def threads() -> int:
    """The thread count that torch itself uses."""
    return torch.get_num_threads()


def workspace(size: int, device: torch.device) -> Tensor:  # [size] bytes
    """Scratch memory from torch's allocator, aligned to 64 bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device)
