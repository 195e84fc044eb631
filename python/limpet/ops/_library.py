"""The torch library ``limpet``: one place where an op gets its schema, its fake and its default backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("limpet", "DEF")


def define(schema: str, *, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``limpet::<schema>``; ``default`` (the reference) serves every device that registers no kernel."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"limpet::{name}", fake, lib=LIBRARY)
