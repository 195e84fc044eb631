"""The models that are measured, and the small ones that are hard to get right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cases import MLP, RESNET18, Mean
from peers.operators import declare_torchvision_operators

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> [N]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:  # [N, C], [N] -> [N]
    """Each sample's cross-entropy."""
    return F.cross_entropy(outputs, targets, reduction="none")


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:  # [N, T, C], [N, T] -> [N]
    """Each sample's cross-entropy, summed over its tokens."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)


@dataclass(frozen=True)
class Problem:
    """A model, one batch and a loss per sample. Each method gets a copy of the model, so that none spoils another's."""

    original: nn.Module
    inputs: Tensor  # [N, *]
    targets: Tensor  # [N, *]
    loss: Loss = cross_entropy
    exists: bool = True  # whether each sample has a gradient of its own

    @property
    def size(self) -> int:
        return len(self.inputs)

    def model(self) -> nn.Module:
        model = copy.deepcopy(self.original)
        model.zero_grad(set_to_none=True)
        return model


@dataclass(frozen=True)
class Measured:
    """A model to be timed: at one batch size beside every method, and over several for the picture."""

    title: str
    make: Callable[[], tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Loss]]
    batch: int
    batches: int  # in one call of limpet's, which probes the layout once a call
    chunk: int  # samples at a time, for vmap in chunks
    sizes: tuple[int, ...] = ()  # batch sizes for the picture

    def problem(self, size: int | None = None) -> Problem:
        torch.manual_seed(0)
        model, batch, loss = self.make()
        size = size or self.batch
        model.eval()
        return Problem(model, *smooth_samples(model, batch, size), loss)


class _Kinks(TorchFunctionMode):
    """Keeps, for each sample, how close the input of any ReLU comes to zero."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.nearest = torch.full((samples,), torch.inf, dtype=torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.relu, torch.relu_, F.relu):
            self.nearest = torch.minimum(self.nearest, args[0].detach().flatten(1).abs().amin(1).double())
        return func(*args, **(kwargs or {}))


def smooth_samples(
    model: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]], size: int, margin: float = 2e-6
) -> tuple[Tensor, Tensor]:
    """A batch in which no ReLU's input lies so close to zero that rounding decides the gradient.

    With one such place, the exact float32 ways differ from float64, and from each other, by up to a sample's whole
    share: 1e-2 was seen. That would be no method's fault, and would hide its errors.
    """
    kinks = _Kinks(1)
    with kinks:
        model(batch(1)[0])
    if kinks.nearest.isinf():
        return batch(size)  # no ReLU in it
    double, kept, found = copy.deepcopy(model).double(), [], 0
    while found < size:
        inputs, targets = batch(size)
        kinks = _Kinks(size)
        with kinks:
            double(inputs.double() if inputs.is_floating_point() else inputs)
        smooth = kinks.nearest > margin
        kept.append((inputs[smooth], targets[smooth]))
        found += int(smooth.sum())
    inputs, targets = (torch.cat(parts)[:size] for parts in zip(*kept, strict=True))
    return inputs, targets


class Encoder(nn.Module):
    """Transformer encoder layers over vectors, their mean, a linear head."""

    def __init__(self, width: int = 256, layers: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, width] -> [N, classes]
        return self.head(self.layers(x).mean(dim=1))


class GPT2(nn.Module):
    """Hugging Face's GPT-2, small shape, random weights: 124 million parameters, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        declare_torchvision_operators()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.lm = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:  # [N, T] -> [N, T, vocabulary]
        return self.lm(input_ids=ids).logits


def _gpt2() -> tuple[nn.Module, Any, Loss]:
    vocabulary, length = 50257, 128
    tokens = lambda n: (torch.randint(vocabulary, (n, length)), torch.randint(vocabulary, (n, length)))  # noqa: E731
    return GPT2(), tokens, token_cross_entropy


def _encoder() -> tuple[nn.Module, Any, Loss]:
    return Encoder(), lambda n: (torch.randn(n, 64, 256), torch.randint(10, (n,))), cross_entropy


MEASURED = {
    "mlp": Measured(
        "MLP 784-1024-1024-10, batch 128",
        lambda: (MLP.make_model(), MLP.make_batch, cross_entropy),
        128, 16, 16, tuple(2**i for i in range(10)),
    ),
    "resnet18": Measured(
        "CIFAR ResNet-18 in evaluation mode, batch 64",
        lambda: (RESNET18.make_model(), RESNET18.make_batch, cross_entropy),
        64, 2, 4,
    ),
    "encoder": Measured(
        "Transformer encoder, 4 layers, d = 256, 64 tokens, batch 16", _encoder,
        16, 4, 4, tuple(2**i for i in range(10)),
    ),
    "gpt2": Measured("GPT-2 small shape, 128 tokens, tied head, batch 4", _gpt2, 4, 2, 1),
}  # fmt: skip


# --- hard cases: tiny, one difficulty each ---------------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    """One matrix embeds the tokens and predicts them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:  # [N, T] -> [N, T, 11]
        return self.head(torch.tanh(self.mix(self.tokens(ids))))


class CalledTwice(nn.Module):
    """One linear layer, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6] -> [N, 5]
        return self.head(torch.tanh(self.loop(torch.tanh(self.loop(x)))))


class Positions(nn.Module):
    """Embeds tokens, and positions once for the whole batch, as GPT-2 and BERT do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(8, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:  # [N, T] -> [N, 5]
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(torch.tanh(h).mean(dim=1))


class Functional(nn.Module):
    """A linear layer whose weight and bias are used through F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6] -> [N, 5]
        return self.head(torch.tanh(F.linear(x, self.inner.weight, self.inner.bias)))


def _convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), Mean(), nn.Linear(4, 5))


def _hard(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss = cross_entropy, **options: bool) -> Problem:
    return Problem(model, inputs, targets, loss, **options)


def hard_cases() -> dict[str, Problem]:
    """Problems of eight samples, by what is hard about them."""
    torch.manual_seed(0)
    ids, images, vectors = torch.randint(11, (8, 7)), torch.randn(8, 4, 6, 6), torch.randn(8, 6)
    classes = torch.randint(5, (8,))
    depthwise = _convolutions(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    normed = _convolutions(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    return {
        "tied embedding and head": _hard(
            TiedLanguageModel().eval(), ids, torch.randint(11, ids.shape), token_cross_entropy
        ),
        "module called twice": _hard(CalledTwice().eval(), vectors, classes),
        "depthwise convolution": _hard(depthwise.eval(), images, classes),
        "position embedding of arange": _hard(Positions().eval(), ids, classes),
        "weight used by F.linear": _hard(Functional().eval(), vectors, classes),
        "BatchNorm in training mode": _hard(normed.train(), images, classes, exists=False),
    }
