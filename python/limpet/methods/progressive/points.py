"""Lateral points: which submodules of a column they are, and what goes in and comes out there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from limpet import _checks
from limpet.fisher.batches import call
from limpet.methods.quadratic import evaluating


@dataclass(frozen=True)
class Ends:
    """What goes into a lateral point and what comes out: how many features, and in how many places."""

    path: str  # of the submodule
    features_dim: int  # 1 where features are channels of an image, [N, C, *]; else -1, [N, *, D]
    num_spatial: int  # dimensions of an image; 0 where features come last
    inputs: int  # features
    outputs: int
    input_places: tuple[int, ...] | None = None  # all sizes but samples and features; None where they are not known
    output_places: tuple[int, ...] | None = None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module works on: the first that it was given."""
    for value in itertools.chain(args, kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a lateral point must be given a tensor")


def first_output(output: Any) -> Tensor:
    """The tensor that a module gives: its output, or the first value of a tuple or list."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor):
        raise TypeError(f"a lateral point must give a tensor, or a tuple of which the first is, got {type(value)}")
    return value


def with_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with another tensor in the place of :func:`first_output`."""
    if not isinstance(output, (tuple, list)):
        return tensor
    values = [tensor, *output[1:]]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def find(network: nn.Module, given: Sequence[str] | None, *, before: bool) -> list[str]:
    """The paths of a column's lateral points: those given, or found between the stages of a Sequential.

    A stage is a child that has a weight of two dimensions or more; normalisation layers belong to the stage before.

    Args:
        network: the column.
        given: the paths, or None.
        before: whether features cross before a stage (so that the first has none), or behind it (so the last).
    """
    if given is not None:
        for path in given:
            _submodule(network, path)
        return list(given)
    if not isinstance(network, nn.Sequential):
        raise ValueError(
            "lateral_points must name submodules where a column is no nn.Sequential, "
            f"got None for a {type(network).__name__}"
        )
    stages = [name for name, child in network.named_children() if any(p.dim() > 1 for p in child.parameters())]
    if len(stages) < 2:
        raise ValueError(
            "lateral_points must be given where a Sequential has fewer than two children with weights, "
            f"got None and {len(stages)}"
        )
    return stages[1:] if before else stages[:-1]


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in network.named_modules() if name]
        shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"lateral_points must name submodules of the column ({shown}), got {path!r}") from None


def measure(network: nn.Module, paths: Sequence[str], example: Any) -> list[Ends]:
    """What goes in and comes out at each point: read from linear layers and convolutions, else seen on an example."""
    modules = {path: network.get_submodule(path) for path in paths}
    shapes = {} if example is None else _shapes(network, modules, example)
    return [_ends(path, module, shapes.get(path)) for path, module in modules.items()]


def _shapes(network: nn.Module, modules: Mapping[str, nn.Module], example: Any) -> dict[str, tuple[torch.Size, ...]]:
    """Run an example, and note the shapes of what goes in and comes out."""
    seen: dict[str, tuple[torch.Size, ...]] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] = (first_input(args, kwargs).shape, first_output(output).shape)

        return hook

    handles = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules.items()]
    try:
        with evaluating(network), torch.no_grad():
            call(network, example)
    finally:
        for handle in handles:
            handle.remove()
    for path in modules:
        if path not in seen:
            raise ValueError(f"lateral_points must run in the column's forward, {path!r} did not")
    return seen


def _ends(path: str, module: nn.Module, shapes: tuple[torch.Size, ...] | None) -> Ends:
    """One point's ends."""
    ready = all(not isinstance(p, nn.UninitializedParameter) for p in module.parameters())
    if shapes is None:
        if ready and isinstance(module, nn.Linear):
            return Ends(path, -1, 0, module.in_features, module.out_features)
        if ready and isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            return Ends(path, 1, len(module.kernel_size), module.in_channels, module.out_channels)
        raise ValueError(
            f"example must be given: the lateral point {path!r} is a {type(module).__name__}, "
            "and only a batch shows what goes in and comes out there"
        )
    before, after = shapes
    images = len(after) > 2 and any(isinstance(part, _ConvNd) for part in module.modules())
    if len(before) != len(after) or len(before) < 2 or (images and len(before) > 5):
        raise ValueError(
            f"a lateral point must turn [N, *, D] into [N, *, D'], or images into images, {path!r} turns "
            f"{list(before)} into {list(after)}"
        )
    dim = 1 if images else -1
    places = [tuple(size for d, size in enumerate(shape) if d not in (0, dim % len(shape))) for shape in shapes]
    return Ends(path, dim, len(before) - 2 if images else 0, before[dim], after[dim], *places)


def same_places(a: Tensor, b: Tensor, features_dim: int) -> bool:
    """Whether two tensors have the same sizes but for their features."""
    if features_dim == -1:
        return a.shape[:-1] == b.shape[:-1]
    return a.shape[:1] == b.shape[:1] and a.shape[2:] == b.shape[2:]


def check_paths(given: Any) -> tuple[str, ...] | None:
    """Require None, or paths of submodules, each once."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"lateral_points must be a sequence of submodule paths, got {_checks.describe(given)}")
    for k, path in enumerate(given):
        if not isinstance(path, str):
            raise TypeError(f"lateral_points[{k}] must be a submodule's path, got {_checks.describe(path)}")
    if not given or "" in given or len(set(given)) < len(given):
        raise ValueError(f"lateral_points must name one or more submodules, each once, got {list(given)}")
    return tuple(given)
