"""From tensors to the plain integers that the compiled core takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet import _core

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def threads() -> int:
    """The thread count that torch itself uses."""
    return torch.get_num_threads()


def workspace(size: int, device: torch.device) -> Tensor:  # [size] bytes
    """Scratch memory from torch's allocator, aligned to 64 bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device)


_HUGE_PAGE = 2 << 20  # bytes


def zeros_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [*] -> [*]
    """Zeros for what every step reads and writes: on the CPU in huge pages, where the system grants them.

    A processor fetches ahead to the end of a page only. Moments in huge pages take a tenth or more off a step of AdamW.
    """
    result = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    if type(result) is Tensor and result.device.type == "cpu" and result.nbytes >= 2 * _HUGE_PAGE:
        _core.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result.zero_()


def flat(
    lists: Sequence[Sequence[Tensor]],  # of tensors [*]; the k-th of each list have one shape
    written: int,
) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Bring the k-th tensors of all lists into one order in memory, without gaps, for kernels that pair them flat.

    What lies in memory alike stays where it is; the others are copied.

    Args:
        lists: one tensor of each parameter; an empty list stands for none.
        written: so many of the first lists are written by the kernel.

    Returns:
        The lists to launch with, and what to copy back after it: pairs ``(to, from)``.
    """
    result = [list(tensors) for tensors in lists]
    if all(t.is_contiguous() for tensors in lists for t in tensors):  # the usual case
        return result, []
    copies = []
    for k in range(max(map(len, lists))):
        if lie_alike([tensors[k] for tensors in lists if tensors]):
            continue
        for index, tensors in enumerate(lists):
            if tensors:
                result[index][k] = tensors[k].contiguous()
                if index < written and result[index][k] is not tensors[k]:
                    copies.append((tensors[k], result[index][k]))
    return result, copies


def lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors of one parameter lie in memory alike and without gaps, so that a flat loop pairs them up."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return True
    dense = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    return dense and all(t.stride() == first.stride() for t in tensors)
