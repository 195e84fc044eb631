"""Models and batches that tests and benches share: ``CASES`` lists (name, make model, make batch).

``make_model()`` gives a module, ``make_batch(n)`` one batch ``(inputs, targets)`` of ``n`` samples; both float32, and
seeded by the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


class Case(NamedTuple):
    name: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Any, Any]]


class Mean(nn.Module):
    """The mean over every dimension but the first two."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C, *] -> [N, C]
        return x.flatten(2).mean(dim=2)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet18(nn.Sequential):
    """The CIFAR ResNet-18: a 3 x 3 stem and four stages of two blocks; 11.2 million parameters."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        stages: list[nn.Module] = []
        channels_in = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(channels_in, width << stage, stride))
                channels_in = width << stage
        super().__init__(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            *stages, Mean(), nn.Linear(channels_in, classes),
        )  # fmt: skip


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch normalisation layers running statistics and factors that are not 0 and 1, and switch to evaluation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            for p in module.parameters():
                nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


class Affine(nn.Module):
    """Parameters used by plain arithmetic."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)
        self.shift = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class TimeMajor(nn.Module):
    """Linear layers on ``[T, N, I]``, on flattened time-major rows and on flattened batch-major rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.third, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        n, t, _ = x.shape
        h = torch.tanh(self.first(x.transpose(0, 1)))  # [T, N, 6]
        h = torch.tanh(self.second(h.reshape(t * n, 6))).view(t, n, 6)
        h = self.norm(torch.tanh(self.third(h.transpose(0, 1).reshape(n * t, 6))))
        return self.head(h.view(n, t, 6).mean(dim=1))


class Repeated(nn.Module):
    """Modules called several times in one forward, on different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.loop, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        h = self.first(x)
        for _ in range(3):
            h = h + torch.tanh(self.loop(self.norm(h)))
        return self.head(self.loop(h.mean(dim=1)))


class RepeatedConv(nn.Module):
    """A convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean(dim=(2, 3)))


class LanguageModel(nn.Module):
    """Token and position embeddings, and a head; tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6, padding_idx=0), nn.Embedding(8, 6)
        self.mix, self.norm = nn.Linear(6, 6), nn.RMSNorm(6)
        self.head = nn.Linear(6, 11, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:  # [N, T] -> [N, 11, T]
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(h + torch.tanh(self.mix(h)))).transpose(1, 2)


class ClassToken(nn.Module):
    """A learned token in front of the sequence, pooled by taking its row alone, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        return self.head(self.norm(h)[:, 0])


class Frames(nn.Module):
    """Convolutions over frames that are flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.norm, self.act, self.head = nn.GroupNorm(2, 4), nn.PReLU(4), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2, H, W]
        h = self.up(self.act(self.norm(self.conv(x.flatten(0, 1)))))
        return self.head(h.view(*x.shape[:2], *h.shape[1:]).mean(dim=(1, 3, 4)))


class Clips(nn.Module):
    """A convolution in three dimensions over clips that are flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(2, 4, 2), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2, D, H, W]
        h = torch.tanh(self.conv(x.flatten(0, 1)))
        return self.head(h.view(*x.shape[:2], *h.shape[1:]).mean(dim=(1, 3, 4, 5)))


class TwoInputs(nn.Module):
    """Takes its inputs as a tuple or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) + self.right(b)))


def images(*shape: int, classes: int = CLASSES) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of normal noise ``[n, *shape]`` with random classes."""
    return lambda n: (torch.randn(n, *shape), torch.randint(classes, (n,)))


def tokens(length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of token ids in which tokens repeat, with a token to predict at each place."""
    return lambda n: (torch.randint(0, 6, (n, length)), torch.randint(0, 11, (n, length)))


def _net(layer: Callable[[], nn.Module], channels: int) -> Callable[[], nn.Module]:
    """A layer between a fixed nonlinearity and a linear head over its channels."""
    return lambda: with_statistics(nn.Sequential(layer(), nn.Tanh(), Mean(), nn.Linear(channels, CLASSES)))


def _last(layer: Callable[[], nn.Module], channels: int) -> Callable[[], nn.Module]:
    """The same for a layer whose channels come last."""

    class ChannelsSecond(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)

    return lambda: with_statistics(
        nn.Sequential(layer(), nn.Tanh(), ChannelsSecond(), Mean(), nn.Linear(channels, CLASSES))
    )


def _behind_linear(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer of six features behind a linear one, so that gradients pass through it."""
    return _last(lambda: nn.Sequential(nn.Linear(4, 6), layer()), 6)


def _norm(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer of four channels behind a convolution, so that gradients pass through it."""
    return lambda: with_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), layer(), nn.Tanh(), Mean(), nn.Linear(4, CLASSES))
    )


def _named(batch: Callable[[int], tuple[Any, Any]]) -> Callable[[int], tuple[Any, Any]]:
    def make(n: int) -> tuple[Any, Any]:
        (a, b), y = batch(n)
        return {"a": a, "b": b}, y

    return make


def _pair(n: int) -> tuple[Any, Any]:
    return (torch.randn(n, 4), torch.randn(n, 3)), torch.randint(CLASSES, (n,))


def _channels_last(n: int) -> tuple[Any, Any]:
    return torch.randn(n, 4, 6, 6).to(memory_format=torch.channels_last), torch.randint(CLASSES, (n,))


def _strided(n: int) -> tuple[Any, Any]:
    return torch.randn(5, n, 8).permute(1, 2, 0)[:, ::2], torch.randint(CLASSES, (n,))


LAYERS = [
    Case("linear", _last(lambda: nn.Linear(4, 6), 6), images(4)),
    Case("linear_places", _last(lambda: nn.Linear(4, 6), 6), images(3, 2, 4)),
    Case("linear_strided", _last(lambda: nn.Linear(5, 6), 6), _strided),
    Case("conv1d", _net(lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2), 6), images(4, 11)),
    Case("conv1d_same", _net(lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), 6), images(4, 11)),
    Case("conv2d", _net(lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), bias=False), 6), images(4, 7, 6)),
    Case("conv2d_same", _net(lambda: nn.Conv2d(4, 6, (3, 4), padding="same"), 6), images(4, 6, 6)),
    Case("conv2d_valid", _net(lambda: nn.Conv2d(4, 6, 2, padding="valid"), 6), images(4, 6, 6)),
    Case("conv2d_circular", _net(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), 6), images(4, 6, 6)),
    Case("conv2d_depthwise", _net(lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), 8), images(4, 6, 6)),
    Case("conv2d_channels_last", _net(lambda: nn.Conv2d(4, 6, 3), 6), _channels_last),
    Case("conv3d", _net(lambda: nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (1, 0, 0)), 4), images(2, 4, 5, 3)),
    Case("conv_transpose1d", _net(lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), 6), images(4, 5)),
    Case("conv_transpose2d", _net(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, (1, 0), dilation=2), 6), images(4, 4, 3)),
    Case("conv_transpose3d", _net(lambda: nn.ConvTranspose3d(2, 4, 2, 2), 4), images(2, 2, 3, 2)),
    Case("layer_norm", _behind_linear(lambda: nn.LayerNorm(6)), images(3, 4)),
    Case("layer_norm_2d", _behind_linear(lambda: nn.LayerNorm((3, 6))), images(3, 4)),
    Case("layer_norm_no_bias", _behind_linear(lambda: nn.LayerNorm(6, bias=False)), images(3, 4)),
    Case("layer_norm_plain", _behind_linear(lambda: nn.LayerNorm(6, elementwise_affine=False)), images(3, 4)),
    Case("rms_norm", _behind_linear(lambda: nn.RMSNorm(6)), images(3, 4)),
    Case("group_norm", _norm(lambda: nn.GroupNorm(2, 4)), images(3, 6, 6)),
    Case("instance_norm", _norm(lambda: nn.InstanceNorm2d(4, affine=True)), images(3, 6, 6)),
    Case("instance_norm_running", _norm(lambda: nn.InstanceNorm2d(4, 1e-5, 0.1, True, True)), images(3, 6, 6)),
    Case("batch_norm1d", _behind_linear(lambda: nn.BatchNorm1d(6)), images(4)),
    Case("batch_norm2d", _norm(lambda: nn.BatchNorm2d(4)), images(3, 6, 6)),
    Case("batch_norm2d_plain", _norm(lambda: nn.BatchNorm2d(4, affine=False)), images(3, 6, 6)),
    Case("prelu", _norm(lambda: nn.PReLU()), images(3, 6, 6)),
    Case("prelu_channels", _norm(lambda: nn.PReLU(4)), images(3, 6, 6)),
    Case("affine", _behind_linear(lambda: Affine(6)), images(4)),
]  # fmt: skip

MODELS = [
    Case("time_major", TimeMajor, images(7, 4)),
    Case("time_major_square", TimeMajor, images(3, 4)),  # as many places as the probe has samples
    Case("repeated", Repeated, images(3, 4)),
    Case("repeated_conv", RepeatedConv, images(3, 6, 6)),
    Case("language_model", lambda: LanguageModel(tied=False), tokens(7)),
    Case("language_model_square", lambda: LanguageModel(tied=False), tokens(3)),
    Case("language_model_tied", lambda: LanguageModel(tied=True), tokens(7)),
    Case("class_token", ClassToken, images(3, 4)),
    Case("frames", Frames, images(3, 2, 4, 4)),
    Case("clips", Clips, images(2, 2, 3, 3, 3)),
    Case("tuple_inputs", TwoInputs, _pair),
    Case("dict_inputs", TwoInputs, _named(_pair)),
    Case("resnet18_narrow", lambda: with_statistics(ResNet18(width=4)), images(3, 16, 16)),
]

CASES = LAYERS + MODELS

# The models whose time is measured, with the batch size they are measured at.
MLP = Case("mlp", lambda: mlp(784, 1024, 1024, 10), images(784, classes=10))
RESNET18 = Case("resnet18", lambda: with_statistics(ResNet18()), images(3, 32, 32, classes=10))
