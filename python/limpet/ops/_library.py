"""The torch library ``limpet``: one place where an op gets its schema, its fake and its default backend."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("limpet", "DEF")
DEFAULTS: dict[str, Callable[..., Any]] = {}


def define(schema: str, *, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``limpet::<schema>``; ``default`` (the reference) serves every device that registers no kernel."""
    name = schema.split("(", 1)[0]
    DEFAULTS[name] = default
    LIBRARY.define(schema)
    LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"limpet::{name}", fake, lib=LIBRARY)


def serve_by_triton(name: str, module: str) -> None:
    """Serve ``limpet::<name>`` on GPUs by the launcher of that name in ``module``, imported at the first call.

    The CUDA key is AMD's too. Tensors of float64, which are there for testing, stay with the reference, and so does
    everything where triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        return
    reference = DEFAULTS[name]

    def launch(total: Tensor, *args: Any) -> None:
        if total.dtype == torch.float64:
            reference(total, *args)
            return
        launcher = getattr(importlib.import_module(module), name)
        device = total.device
        with torch.get_device_module(device).device(device):  # triton launches on the current device
            launcher(total, *args)

    for key in ("CUDA", "XPU"):
        LIBRARY.impl(name, launch, key)
