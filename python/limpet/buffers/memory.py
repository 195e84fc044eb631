"""Whether a buffer fits where it is to lie."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch


def require_room(
    sizes: Sequence[int], device: torch.device, folder: Path | None = None, *, what: str = "capacity"
) -> None:
    """Require that a device, or the disk of a folder, has so many bytes free for something, as far as it says.

    Raises:
        ValueError: it has fewer.
    """
    asked, free = sum(sizes), _free(device) if folder is None else shutil.disk_usage(folder).free
    if free is not None and asked > free:
        raise ValueError(f"{what} must fit {folder or device}: {asked} bytes are asked for, {free} are free")


def _free(device: torch.device) -> int | None:
    """Free bytes; ``None`` where that is not told."""
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:  # what is free counts too little: caches give way
                available = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), None)
        except OSError:
            return None
        return None if available is None else 1024 * int(available)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None
