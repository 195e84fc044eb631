"""Shapes on which the ops are tested and timed; the benches read this list too."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (N, T, O, I): one element, odd sizes, T = 1, few places, several chunks, one sample over several segments, empty.
LINEAR = [
    (1, 1, 1, 1),
    (3, 1, 7, 5),
    (600, 1, 33, 70),
    (4, 3, 10, 784),
    (5, 17, 65, 129),
    (3, 40, 13, 200),
    (2, 700, 13, 20),
    (3, 2500, 7, 67),
    (64, 64, 50, 100),
    (2, 5, 2100, 9),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (3, 2, 0, 5),
]

# Convolutions of a ResNet-18 as patches, layers of a transformer, of an MLP, of GPT-2.
LINEAR_TIMED = [
    (32, 16, 512, 4608),
    (32, 64, 256, 2304),
    (32, 1024, 64, 576),
    (64, 64, 256, 256),
    (128, 1, 1024, 1024),
    (128, 1, 1024, 784),
    (16, 64, 1024, 256),
    (4, 128, 3072, 768),
]


@dataclass(frozen=True)
class Conv:
    """One convolution: samples, channels in and out, input size, and the geometry."""

    samples: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: dict[str, int | tuple[int, ...]] = field(default_factory=dict)

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An output gradient and an input."""
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.size) - 1]
        groups = self.geometry.get("groups", 1)
        input = torch.randn(self.samples, self.in_channels, *self.size)
        weight = torch.randn(self.out_channels, self.in_channels // groups, *self.kernel)
        output = convolve(input, weight, None, **self.geometry)
        return torch.randn(output.shape).to(dtype), input.to(dtype)


CONV = [
    Conv(2, 3, 5, (20,), (3,), {"padding": 1}),
    Conv(3, 4, 6, (9, 11), (3, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    Conv(2, 8, 8, (12, 12), (3, 3), {"padding": 1, "groups": 8}),
    Conv(2, 3, 4, (48, 45), (7, 7), {"stride": 2, "padding": 3}),
    Conv(1, 2, 3, (50, 50), (3, 3)),
    Conv(40, 16, 70, (4, 4), (3, 3), {"padding": 1}),
    Conv(3, 6, 5, (7, 7), (1, 1)),
    Conv(2, 2, 70, (5, 6, 7), (2, 3, 2), {"padding": (0, 1, 1)}),
    Conv(1, 1, 1, (1, 1), (1, 1)),
    # Groups across the lanes of vectors: more than a vector of them and a part, several channels each, small maps.
    Conv(3, 40, 40, (9, 7), (5, 5), {"stride": (2, 1), "padding": 2, "groups": 40}),
    Conv(2, 36, 72, (6, 5), (3, 3), {"padding": 1, "dilation": 2, "groups": 18}),
    Conv(3, 19, 19, (2, 2), (3, 3), {"padding": 1, "groups": 19}),
    Conv(2, 20, 40, (40,), (3,), {"groups": 20}),
    # Many channels in a group, by each way in which a GPU unfolds them.
    Conv(3, 20, 24, (8, 8), (3, 3), {"padding": 1}),
    Conv(2, 36, 40, (9, 16), (3, 2), {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1), "groups": 2}),
    Conv(2, 18, 20, (9, 10), (3, 3), {"stride": 2, "padding": 1}),
    Conv(2, 17, 20, (30,), (5,), {"padding": 2}),
    Conv(2, 16, 18, (3, 4, 8), (2, 3, 3), {"padding": (0, 1, 1)}),
    # Tiles of 2 x 2 places: several strips and jobs, samples together, groups and frames, wide pictures.
    Conv(2, 130, 70, (19, 40), (3, 3), {"padding": 1}),
    Conv(9, 48, 34, (9, 12), (3, 3), {"padding": (2, 0)}),
    Conv(2, 72, 70, (2, 9, 8), (1, 3, 3), {"padding": (0, 1, 0), "groups": 2}),
    Conv(1, 34, 33, (4, 140), (3, 3), {"padding": 1}),
    # Places left out where the kernel lies in the padding: samples in turns, groups, a tap without places, volumes.
    Conv(300, 33, 70, (2, 3), (3, 3), {"padding": 1}),
    Conv(3, 40, 38, (8, 5), (5, 3), {"stride": (2, 1), "padding": (2, 1), "groups": 2}),
    Conv(2, 13, 20, (2, 4), (3, 3), {"padding": (2, 1), "dilation": (2, 1)}),
    Conv(2, 19, 17, (3, 4, 2), (3, 3, 3), {"padding": 1}),
    # Tiles of 4 x 4 places: samples together, several strips and jobs.
    Conv(5, 33, 40, (18, 17), (3, 3), {"padding": 1}),
    Conv(1, 110, 66, (37, 44), (3, 3), {"padding": (2, 0)}),
]

# (N, ..., C) and (N, C, ...): channels last and first.
CHANNELS = [((3, 5, 7), -1), ((3, 7), -1), ((2, 4, 3, 300), -1), ((3, 40, 33, 9), 1), ((4, 3, 2, 50), 1), ((0, 3), -1)]

RESNET18_SHAPES: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
for _width, _before in ((64, 64), (128, 64), (256, 128), (512, 256)):
    for _block in range(2):
        _in = _before if _block == 0 else _width
        RESNET18_SHAPES += [(_width, _in, 3, 3), (_width,), (_width,), (_width, _width, 3, 3), (_width,), (_width,)]
        if _block == 0 and _in != _width:
            RESNET18_SHAPES += [(_width, _in, 1, 1), (_width,), (_width,)]
RESNET18_SHAPES += [(10, 512), (10,)]  # 62 tensors, 11.2M parameters

GPT2_SHAPES: list[tuple[int, ...]] = [(50257, 768), (1024, 768)]
for _ in range(12):
    GPT2_SHAPES += [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    GPT2_SHAPES += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
GPT2_SHAPES += [(768,), (768,)]  # 148 tensors, 124M parameters


def quadratic_inputs(
    shapes: list[tuple[int, ...]],
    theta: torch.dtype = torch.float32,
    anchor: torch.dtype | None = None,
    importance: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters that require grad, anchors near them, and importances that are not negative."""
    params = [torch.randn(shape).to(theta).requires_grad_() for shape in shapes]
    anchors = [(p.detach().double() + 0.1 * torch.randn(p.shape)).to(anchor or theta) for p in params]
    importances = [torch.rand(p.shape).to(importance or theta) for p in params]
    return params, anchors, importances
