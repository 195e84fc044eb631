"""How much memory a piece of work needed at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """The growth of memory from the start of a block to its peak inside it.

    On CUDA: the bytes that torch allocated. On the CPU: the resident memory of the whole process, read from Linux's own
    high-water mark after setting it back, so that short peaks count, too. Memory that the process holds free at the
    start is given back to the system first; what it holds all the same, the block uses without growing, so that a
    reading is good to a few megabytes. Where the system cannot tell (another platform, a locked-down container),
    ``bytes`` is None.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     _ = torch.ones(1 << 20)
    >>> peak.bytes is None or peak.bytes > 0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: int | None = None
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            _release_free_memory()
            self._start = _reset_peak_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        on_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else _status_bytes("VmHWM")
        self.bytes = max(0, peak - self._start)


def _reset_peak_resident() -> int | None:
    """Set the process's high-water mark back to what is resident now, and say how much that is."""
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): reset the peak resident set size
        return _status_bytes("VmRSS")
    except (OSError, ValueError):
        return None


def _status_bytes(field: str) -> int:
    """A size from Linux's status file of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


def _release_free_memory() -> None:
    """Let the C library give free memory back to the system, where it knows how to (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
