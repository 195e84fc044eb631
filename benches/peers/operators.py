"""Makes a torchvision importable that was built for another torch: packages import it that never call it here."""

from __future__ import annotations

import torch

_KEPT: list[torch.library.Library] = []  # a library's definitions end with it


def declare_torchvision_operators() -> None:
    """Declare the operators that torchvision describes on import, where its own library does not load."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        pooled = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for name in ("nms", "qnms", *pooled, *(f"_{kind}_backward" for kind in pooled)):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)
