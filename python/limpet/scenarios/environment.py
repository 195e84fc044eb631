"""What a result was made with: versions, machine, and the commit of limpet's source."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch

import limpet


def environment() -> dict[str, Any]:
    """Versions, machine, instruction set, threads and devices, ready for JSON; None where something is not there."""
    return {
        "versions": {
            "limpet": limpet.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "commit": source_commit(),
        "core": build_info(),
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def build_info() -> dict[str, Any] | None:
    """What the compiled core says about itself, or None where it was not built."""
    try:
        from limpet import _core
    except ImportError:
        return None
    return dict(_core.build_info())


def source_commit() -> str | None:
    """The commit of the source tree that limpet runs or was installed from, with ``+changes`` if it has been changed.

    None where limpet came from an index, or git is not there. For an installation from a folder this is what the folder
    holds now (PEP 610 keeps the folder, not its commit).
    """
    folder = Path(limpet.__file__).parents[2]
    if not (folder / "pyproject.toml").is_file():
        try:
            origin = json.loads(importlib.metadata.distribution("limpet").read_text("direct_url.json") or "{}")
        except importlib.metadata.PackageNotFoundError:
            return None
        if "vcs_info" in origin:
            return str(origin["vcs_info"]["commit_id"])
        if "dir_info" not in origin:
            return None
        folder = Path(url2pathname(unquote(urlsplit(origin["url"]).path)))
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
    return f"{commit}+changes" if commit and changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says about a folder, or None where it says nothing."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    """The processor's name, as Linux knows it, or else as Python does."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None
