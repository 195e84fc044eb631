"""The torch library ``limpet``: one place where an op gets its schema, its fake and its default backend."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
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


def serve_by_triton(name: str, module: str, keys: Sequence[str] = ("CUDA", "XPU")) -> None:
    """Serve ``limpet::<name>`` on GPUs by the launcher of that name in ``module``, imported at the first call.

    The CUDA key is AMD's too. The first argument, a tensor or a list of them, says where to launch. Float64, which is
    there for testing, stays with the reference, and so does everything where triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        return
    reference = DEFAULTS[name]

    def launch(total: Tensor | Sequence[Tensor], *args: Any) -> Any:
        totals = [total] if isinstance(total, Tensor) else total
        if any(t.dtype == torch.float64 for t in totals):
            return reference(total, *args)
        launcher = getattr(importlib.import_module(module), name)
        device = totals[0].device
        with torch.get_device_module(device).device(device):  # triton launches on the current device
            return launcher(total, *args)

    for key in keys:
        LIBRARY.impl(name, launch, key)
