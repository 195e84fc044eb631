"""Modules that people write: products and arithmetic on parameters, inputs and outputs of every structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import (
    EVERY,
    LENGTH,
    N_CLASSES,
    VOCABULARY,
    WIDTH,
    Entry,
    Net,
    batches,
    classes,
    head,
    labelled,
    lengths,
    padding,
    squared,
)

WEIGHT, SHIFT = (WIDTH, WIDTH), (WIDTH,)


def behind(function: Callable[[Net, Tensor], Tensor], places: bool = False, **shapes: tuple[int, ...]) -> Any:
    """``function(m, h)`` between a linear layer and a head; its parameters' shapes by name; and batches for it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.tanh(function(m, torch.tanh(m.first(x))))
        return m.head(y.mean(dim=1) if places else y)

    def make() -> nn.Module:
        parts = {name: torch.randn(shape) for name, shape in shapes.items()}
        return Net(forward, first=nn.Linear(WIDTH, WIDTH), head=head(), **parts)

    return make, labelled(LENGTH, WIDTH) if places else labelled(WIDTH)


PRODUCTS = {
    "x @ W": behind(lambda m, h: h @ m.w, w=WEIGHT),
    "x @ W, places": behind(lambda m, h: h @ m.w, places=True, w=WEIGHT),
    "x @ W.mT": behind(lambda m, h: torch.matmul(h, m.w.mT), places=True, w=WEIGHT),
    "W @ x": behind(lambda m, h: (m.w @ h.t()).t(), w=WEIGHT),
    "W @ x, mixing the places": behind(lambda m, h: m.w @ h, places=True, w=(LENGTH, LENGTH)),
    "mm": behind(lambda m, h: torch.mm(h, m.w), w=WEIGHT),
    "x @ v": behind(lambda m, h: h * (h @ m.v)[..., None], places=True, v=SHIFT),
    "vector product": behind(lambda m, h: h + torch.stack([torch.dot(row, m.v) for row in h])[:, None], v=SHIFT),
    "addmm": behind(lambda m, h: torch.addmm(m.b, h, m.w, beta=0.5, alpha=2), w=WEIGHT, b=SHIFT),
    "baddbmm": behind(
        lambda m, h: torch.baddbmm(m.b, h, m.w.expand(len(h), -1, -1)), places=True, w=WEIGHT, b=(1, 1, WIDTH)
    ),
    "bmm": behind(
        lambda m, h: torch.bmm(h.unflatten(-1, (2, -1)).transpose(0, 1), m.w).transpose(0, 1).flatten(1), w=(2, 4, 4)
    ),
    "einsum": behind(lambda m, h: torch.einsum("nti,io->nto", h, m.w), places=True, w=WEIGHT),
    "einsum per head": behind(
        lambda m, h: torch.einsum("nthi,hio->ntho", h.unflatten(-1, (2, -1)), m.w).flatten(2), places=True, w=(2, 4, 4)
    ),
    "baddbmm, computed": behind(
        lambda m, h: torch.baddbmm(m.b, h, (2 * m.w).expand(len(h), -1, -1), beta=-0.5, alpha=2),
        places=True,
        w=WEIGHT,
        b=(LENGTH, 1),
    ),
    "addmv": behind(lambda m, h: h * torch.addmv(m.b, h, m.v, alpha=2)[:, None], v=SHIFT, b=(1,)),
    "x @ computed": behind(lambda m, h: h @ m.w.tanh() + (h @ m.v.tanh())[..., None], places=True, w=WEIGHT, v=SHIFT),
    "einsum, computed": behind(lambda m, h: torch.einsum("nti,oi->nto", h, m.w.tanh()), places=True, w=WEIGHT),
    "einsum of elements": behind(
        lambda m, h: h * torch.einsum("nthd,hd->nth", h.unflatten(-1, (2, -1)), m.w).repeat_interleave(4, -1),
        places=True,
        w=(2, 4),
    ),
    "einsum of a factor": behind(lambda m, h: torch.einsum("i,nti->tni", m.v, h).transpose(0, 1), places=True, v=SHIFT),
    "einsum of two factors": behind(
        lambda m, h: torch.einsum("...i,ir,ro->...o", h, m.a, m.b), places=True, a=(WIDTH, 3), b=(3, WIDTH)
    ),
    "einsum of factors first": behind(
        lambda m, h: torch.einsum("ir,ro,nti->nto", m.a, m.b, h), places=True, a=(WIDTH, 3), b=(3, WIDTH)
    ),
    "einsum of three": behind(lambda m, h: torch.einsum("ni,ijk,nj->nk", h, m.w, h), w=(WIDTH, WIDTH, WIDTH)),
    "tensordot": behind(
        lambda m, h: torch.tensordot(h, m.w, dims=([1, 2], [1, 0]))[:, None], places=True, w=(WIDTH, LENGTH, WIDTH)
    ),
    "tensordot, one dimension": behind(lambda m, h: torch.tensordot(h, m.w, 1).sum(-1), places=True, w=(8, 8, 2)),
    "inner": behind(lambda m, h: torch.inner(h, m.w), places=True, w=WEIGHT),
    "outer": behind(lambda m, h: h + torch.outer(h.sum(dim=-1), m.v), v=SHIFT),
    "bilinear": behind(lambda m, h: F.bilinear(h, h.sin(), m.w, m.b), w=(WIDTH, WIDTH, WIDTH), b=SHIFT),
    "linear, functional": behind(lambda m, h: F.linear(h, weight=m.w, bias=m.b), w=WEIGHT, b=SHIFT),
    "linear, one output": behind(lambda m, h: h * F.linear(h, m.v)[:, None], v=SHIFT),
    "conv, functional": behind(
        lambda m, h: F.conv1d(h.transpose(1, 2), m.w, padding=1).transpose(1, 2), places=True, w=(WIDTH, WIDTH, 3)
    ),
    "bias of the scores": behind(
        lambda m, h: F.scaled_dot_product_attention(h, h, h, attn_mask=m.bias), places=True, bias=(LENGTH, LENGTH)
    ),
    "distance": behind(lambda m, h: torch.cdist(h, m.w), w=WEIGHT),
    "distance to prototypes": behind(lambda m, h: (-torch.cdist(h, m.w, p=1.0)).softmax(dim=1) @ m.w, w=(3, WIDTH)),
}

ARITHMETIC = {
    "scale and shift": behind(lambda m, h: h * m.scale + m.shift, scale=SHIFT, shift=SHIFT),
    "scale and shift, places": behind(lambda m, h: m.scale * h + m.shift, places=True, scale=SHIFT, shift=SHIFT),
    "scale per place": behind(lambda m, h: h * m.scale, places=True, scale=(LENGTH, 1)),
    "centred": behind(lambda m, h: h - m.centre, centre=SHIFT),
    "reversed": behind(lambda m, h: m.centre - h, centre=(1, WIDTH)),
    "temperature": behind(lambda m, h: h / m.temperature, temperature=()),
    "scalars": behind(lambda m, h: h * m.scale + m.shift, places=True, scale=(), shift=(1,)),
    "softplus": behind(lambda m, h: h * F.softplus(m.raw), raw=SHIFT),
    "log scale": behind(lambda m, h: torch.exp(m.log_scale) * h, log_scale=SHIFT),
    "power": behind(lambda m, h: h.abs().add(0.1) ** m.power, power=SHIFT),
    "gate": behind(lambda m, h: torch.lerp(h, h.flip(-1), torch.sigmoid(m.gate)), gate=SHIFT),
    "lerp to a parameter": behind(lambda m, h: h.lerp(m.end, 0.3), places=True, end=(LENGTH, WIDTH)),
    "addcmul": behind(lambda m, h: torch.addcmul(m.shift, h, m.scale), scale=SHIFT, shift=SHIFT),
    "in place": behind(lambda m, h: h.clone().mul_(m.scale).add_(m.shift), scale=SHIFT, shift=SHIFT),
    "where": behind(lambda m, h: torch.where(h > 0, h, m.low), low=SHIFT),
    "where, by a mask": behind(lambda m, h: torch.where(h[..., :1] > 0, m.low, h), places=True, low=(1, 1, WIDTH)),
    "maximum": behind(lambda m, h: torch.maximum(h, m.low), low=SHIFT),
    "minimum and clamp": behind(
        lambda m, h: torch.minimum(m.high, h).clamp(min=m.low), places=True, high=(), low=(LENGTH, 1)
    ),
    "ties": behind(lambda m, h: torch.maximum(h.round(), m.low.round()), low=SHIFT),
    "numerator": behind(lambda m, h: m.scale / (h + 2), scale=SHIFT),
    "base": behind(lambda m, h: m.base.exp() ** h, base=SHIFT),
    "positions": behind(lambda m, h: h + m.positions[: h.shape[1]], places=True, positions=(LENGTH + 2, WIDTH)),
    "gathered": behind(lambda m, h: h + m.table[(h[:, 0] > 0).long()], table=(2, WIDTH)),
    "index_select": behind(lambda m, h: h + m.table.index_select(0, (h[:, 0] > 0).long()), table=(2, WIDTH)),
    "one-hot product": behind(lambda m, h: h + F.one_hot((h[:, 0] > 0).long(), 2).to(h) @ m.table, table=(2, WIDTH)),
    "stacked parameters": behind(lambda m, h: h * torch.stack([m.a, m.b]).prod(dim=0), a=SHIFT, b=SHIFT),
    "concatenated parameters": behind(lambda m, h: h * torch.cat([m.a, m.b]), a=(3,), b=(5,)),
    "appended token": behind(
        lambda m, h: torch.cat([h, m.token.expand(len(h), 1, -1)], dim=1), places=True, token=SHIFT
    ),
    "normalised": behind(lambda m, h: F.layer_norm(h, (WIDTH,), m.scale, m.shift), scale=SHIFT, shift=SHIFT),
    "norm of the weight": behind(lambda m, h: h @ F.normalize(m.w, dim=0), w=WEIGHT),
}

# --- inputs and outputs ----------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def two_outputs(as_dataclass: bool) -> Callable[[Net, Tensor], Any]:
    def forward(m: Net, x: Tensor) -> Any:
        hidden = torch.tanh(m.first(x))
        return Output(m.head(hidden), hidden) if as_dataclass else {"logits": m.head(hidden), "hidden": hidden}

    return forward


def output_loss(output: Any, targets: Tensor) -> Tensor:
    found = vars(output) if isinstance(output, Output) else output
    return F.cross_entropy(found["logits"], targets, reduction="none") + found["hidden"].square().sum(dim=1)


def nested(m: Net, first: Tensor, others: list[Any]) -> Tensor:
    return m.head(torch.tanh(m.first(first) + m.second(others[0]) + m.third(others[1]["z"])))


def nested_batch(n: int) -> tuple[Any, Tensor]:
    x, y, z = torch.randn(n, WIDTH), torch.randn(n, 3), torch.randn(n, 2)
    return {"first": x, "others": [y, {"z": z, "kind": "unused"}]}, classes(n)


def detection_loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:  # [N, T, 4 + classes]
    boxes = (output[..., :4] - target["boxes"]).abs().sum(dim=-1)  # [N, T]
    found = F.cross_entropy(output[..., 4:].transpose(1, 2), target["classes"], reduction="none")
    return ((boxes + found) * target["present"]).sum(dim=1)


def detection_batch(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(n, LENGTH, WIDTH), {
        "boxes": torch.randn(n, LENGTH, 4),
        "classes": classes(n, LENGTH),
        "present": ~padding(lengths(n), LENGTH),
    }


def normal_likelihood(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.mean(x), m.log_deviation.expand(len(x), -1)


def normal_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    mean, log_deviation = output
    return (0.5 * ((target - mean) * torch.exp(-log_deviation)).square() + log_deviation).sum(dim=1)


def words(m: Net, ids: Tensor) -> Tensor:
    return m.head(torch.tanh(m.bag(ids)))


def words_with_offsets(m: Net, ids: Tensor) -> Tensor:
    return m.head(torch.tanh(m.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1], device=ids.device))))


def ragged_words(m: Net, ids: Tensor, counts: Tensor) -> Tensor:
    """Bags of different sizes, some empty; weights where they are summed."""
    kept = ids[~padding(counts, LENGTH)]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    weighted = m.bag.mode == "sum"
    weights = torch.linspace(0.5, 1.5, LENGTH).to(m.bag.weight).expand(len(ids), -1)[~padding(counts, LENGTH)]
    return m.head(torch.tanh(m.bag(kept, starts if weighted else starts[:-1], weights if weighted else None)))


def words_with_weights(m: Net, ids: Tensor, weights: Tensor) -> Tensor:
    return m.head(torch.tanh(m.bag(ids, per_sample_weights=weights)))


def ids(n: int) -> Tensor:  # [n, T]
    return torch.randint(VOCABULARY, (n, LENGTH))


WORDS = batches(lambda n: (ids(n), classes(n)))


def bag(forward: Callable[..., Tensor], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(forward, bag=nn.EmbeddingBag(VOCABULARY, WIDTH, **options), head=head())


PER_SAMPLE = {"vector product"}  # a call for each sample

ENTRIES = [
    *(
        Entry(name, make, inputs, None, None if name in PER_SAMPLE else EVERY)
        for name, (make, inputs) in {**PRODUCTS, **ARITHMETIC}.items()
    ),
    *(
        Entry(f"output in a {'dataclass' if flag else 'dict'}",
              lambda flag=flag: Net(two_outputs(flag), first=nn.Linear(WIDTH, WIDTH), head=head()), labelled(WIDTH),
              output_loss)
        for flag in (False, True)
    ),
    Entry("nested input", lambda: Net(nested, first=nn.Linear(WIDTH, WIDTH), second=nn.Linear(3, WIDTH),
                                      third=nn.Linear(2, WIDTH), head=head()), batches(nested_batch)),
    Entry("targets in a dict", lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(),
                                                     nn.Linear(WIDTH, 4 + N_CLASSES)),
          batches(detection_batch), detection_loss),
    Entry("bilinear module", lambda: Net(lambda m, x, y: m.head(torch.tanh(m.mix(x, y))), mix=nn.Bilinear(3, 4, WIDTH),
                                         head=head()),
          batches(lambda n: ((torch.randn(n, 3), torch.randn(n, 4)), classes(n))), None, None),
    Entry("likelihood with a deviation", lambda: Net(normal_likelihood, mean=nn.Linear(WIDTH, 3),
                                                     log_deviation=torch.randn(3)),
          batches(lambda n: (torch.randn(n, WIDTH), torch.randn(n, 3))), normal_loss, None),
    Entry("regression", lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.SELU(), nn.Linear(6, 1)),
          batches(lambda n: (torch.randn(n, WIDTH), torch.randn(n, 1))), squared),
    *(
        Entry(f"embedding bag, {mode}, {padding}", bag(words, mode=mode, padding_idx=padding), WORDS)
        for mode in ("sum", "mean", "max")
        for padding in (None, 2, -1)
    ),
    Entry("embedding bag, offsets", bag(words_with_offsets), WORDS),
    Entry("embedding bag, weights", bag(words_with_weights, mode="sum"),
          batches(lambda n: ((ids(n), torch.rand(n, LENGTH)), classes(n)))),
    *(
        Entry(f"ragged embedding bag, {mode}", bag(ragged_words, mode=mode, include_last_offset=mode == "sum",
              padding_idx=2), batches(lambda n: ((ids(n), lengths(n) - 1), classes(n))))
        for mode in ("sum", "mean", "max")
    ),
]  # fmt: skip
