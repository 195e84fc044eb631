"""One parameter, several uses: tied, looped, through views, through functions that compute the weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from zoo import (
    LENGTH,
    VOCABULARY,
    WIDTH,
    Entry,
    Net,
    batches,
    head,
    labelled,
    token_loss,
)

# --- the same parameter again ----------------------------------------------------------------------------------------


def autoencoder(m: Net, x: Tensor) -> Tensor:
    """A decoder that is its encoder transposed."""
    return m.head(F.linear(torch.tanh(m.first(x)), m.first.weight.t(), m.shift))


def tied_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), head())
    model[2].weight = model[0].weight
    return model


def tied_convolutions(m: Net, x: Tensor) -> Tensor:
    """A transposed convolution with its convolution's weight."""
    h = torch.tanh(F.conv2d(x, m.weight, stride=2))
    return m.head(F.conv_transpose2d(h, m.weight, stride=2).flatten(2).mean(dim=2))


def looped(m: Net, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + torch.tanh(m.layer(m.norm(x)))
    return m.head(x.mean(dim=1))


def deep_equilibrium(m: Net, x: Tensor) -> Tensor:
    """A loop whose number of turns depends on the values."""
    h, turns = torch.zeros_like(x), 0
    while turns < 6 and float((nxt := torch.tanh(m.layer(h) + x)).sub(h).abs().amax()) > 1e-3:
        h, turns = nxt, turns + 1
    return m.head(h)


def conv_twice(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.conv(torch.tanh(m.conv(x)))).flatten(2).mean(dim=2))


def conv_at_two_scales(m: Net, x: Tensor) -> Tensor:
    return m.head(m.conv(x).flatten(2).mean(dim=2) + m.conv(F.avg_pool2d(x, 2)).flatten(2).amax(dim=2))


def norm_twice(m: Net, x: Tensor) -> Tensor:
    return m.head(m.norm(torch.tanh(m.norm(x))).mean(dim=1))


def bias_as_input(m: Net, x: Tensor) -> Tensor:
    """A bias by its rule, and once more by hand."""
    return m.head(torch.tanh(m.layer(x)) * m.layer.bias)


def embedding_as_head(m: Net, ids: Tensor) -> Tensor:
    h = torch.tanh(m.mix(m.table(ids)))
    return h @ m.table.weight.t() + m.table.weight.sum(dim=1)


def siamese(m: Net, a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(m.tower(a), m.tower(b), dim=-1) * m.sharpness


def siamese_at_once(m: Net, a: Tensor, b: Tensor) -> Tensor:
    """Both inputs through the tower in one call, one behind the other."""
    left, right = m.tower(torch.cat([a, b])).chunk(2)
    return F.cosine_similarity(left, right, dim=-1) * m.sharpness


def matching(scores: Tensor, same: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, same.to(scores), reduction="none")


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 6))


def pairs(n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randn(n, WIDTH), torch.randn(n, WIDTH)), torch.randint(2, (n,))


# --- parts of a parameter --------------------------------------------------------------------------------------------


def slices(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x[:, :3], m.weight[:, :3], m.shift)) + F.linear(x, m.weight)[:, :1])


def chunks(m: Net, x: Tensor) -> Tensor:
    """A packed projection taken apart before it is used."""
    q, k, v = (F.linear(x, w, b) for w, b in zip(m.weight.chunk(3), m.shift.chunk(3), strict=True))
    return m.head(F.scaled_dot_product_attention(q, k, v).mean(dim=1))


def viewed(m: Net, x: Tensor) -> Tensor:
    h = F.conv1d(x[..., None], m.weight.view(WIDTH, WIDTH, 1)).squeeze(-1)
    return m.head(torch.tanh(F.linear(torch.tanh(h), m.weight.view(WIDTH, WIDTH))))


def stacked(m: Net, x: Tensor) -> Tensor:
    """Weights of several parameters in one."""
    weight, shift = torch.cat([m.a.weight, m.b.weight]), torch.stack([m.a.bias, m.b.bias])
    return m.head(torch.tanh(F.linear(x, weight) + shift.flatten()))


def all_experts(m: Net, x: Tensor) -> Tensor:
    """Dense gating: every expert's answer, weighted."""
    answers = torch.stack([expert(x) for expert in m.experts], dim=1)  # [N, K, D]
    return m.head((m.gate(x).softmax(dim=-1)[..., None] * torch.tanh(answers)).sum(dim=1))


def stacked_experts(m: Net, x: Tensor) -> Tensor:
    weight = torch.stack([expert.weight for expert in m.experts])  # [K, D, D]
    answers = torch.einsum("ni,koi->nko", x, weight)
    return m.head((m.gate(x).softmax(dim=-1)[..., None] * torch.tanh(answers)).sum(dim=1))


def experts() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))


# --- weights that are computed ---------------------------------------------------------------------------------------


def adapted(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.base(x) + 0.5 * m.up(m.down(x))))


def merged(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x, m.base.weight + m.b @ m.a, m.base.bias)))


def frozen_base(model: nn.Module) -> nn.Module:
    model.base.requires_grad_(False)
    return model


def other_dtype(m: Net, x: Tensor) -> Tensor:
    """Weights kept in one dtype and used in another."""
    wide = x.to(torch.float64)
    return m.head(torch.tanh(F.linear(wide, m.layer.weight.to(wide.dtype), m.layer.bias.to(wide.dtype))).to(x.dtype))


def parametrised(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), wrap(nn.Linear(WIDTH, WIDTH)), head()).eval()


TOKENS = batches(lambda n: (torch.randint(VOCABULARY, (n, LENGTH)), torch.randint(VOCABULARY, (n, LENGTH))))
SQUARE = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))

ENTRIES = [
    Entry("tied layers", tied_layers, labelled(WIDTH)),
    Entry(
        "weight and its transpose",
        lambda: Net(autoencoder, first=nn.Linear(WIDTH, 5), shift=torch.randn(WIDTH), head=head()),
        labelled(WIDTH), None, None,
    ),
    Entry(
        "convolution and its transpose",
        lambda: Net(tied_convolutions, weight=torch.randn(4, 3, 3, 3), head=head(3)),
        labelled(3, 5, 7), None, None,
    ),
    Entry(
        "looped", lambda: Net(looped, norm=nn.LayerNorm(WIDTH), layer=nn.Linear(WIDTH, WIDTH), head=head()),
        labelled(LENGTH, WIDTH),
    ),
    Entry("convolution twice", lambda: Net(conv_twice, conv=nn.Conv2d(3, 3, 3, padding=1), head=head(3)),
          labelled(3, 5, 5), None, None),
    Entry("convolution at two scales", lambda: Net(conv_at_two_scales, conv=nn.Conv2d(3, WIDTH, 3), head=head()),
          labelled(3, 6, 7), None, None),
    Entry("norm twice", lambda: Net(norm_twice, norm=nn.LayerNorm(WIDTH), head=head()), labelled(LENGTH, WIDTH)),
    Entry("bias twice", lambda: Net(bias_as_input, layer=nn.Linear(WIDTH, WIDTH), head=head()), labelled(WIDTH),
          None, None),
    Entry("table as head", lambda: Net(embedding_as_head, table=nn.Embedding(VOCABULARY, WIDTH),
                                       mix=nn.Linear(WIDTH, WIDTH)), TOKENS, token_loss, None),
    Entry("siamese", lambda: Net(siamese, tower=tower(), sharpness=torch.tensor(2.0)), batches(pairs), matching, None),
    Entry("siamese at once", lambda: Net(siamese_at_once, tower=tower(), sharpness=torch.tensor(2.0)), batches(pairs),
          matching, None),
    Entry("slices", lambda: Net(slices, weight=SQUARE, shift=torch.randn(WIDTH), head=head()), labelled(WIDTH),
          None, None),
    Entry("chunks", lambda: Net(chunks, weight=torch.randn(3 * WIDTH, WIDTH), shift=torch.randn(3 * WIDTH),
                                head=head()), labelled(LENGTH, WIDTH), None, None),
    Entry("view", lambda: Net(viewed, weight=SQUARE.flatten(), head=head()), labelled(WIDTH), None, None),
    Entry("stacked", lambda: Net(stacked, a=nn.Linear(WIDTH, 3), b=nn.Linear(WIDTH, 3), head=head(6)),
          labelled(WIDTH), None, None),
    Entry("dense experts", lambda: Net(all_experts, experts=experts(), gate=nn.Linear(WIDTH, 3), head=head()),
          labelled(WIDTH)),
    Entry("stacked experts", lambda: Net(stacked_experts, experts=experts(), gate=nn.Linear(WIDTH, 3), head=head()),
          labelled(WIDTH), None, None),
    Entry(
        "LoRA",
        lambda: frozen_base(Net(adapted, base=nn.Linear(WIDTH, WIDTH), down=nn.Linear(WIDTH, 2, bias=False),
                                up=nn.Linear(2, WIDTH, bias=False), head=head())),
        labelled(WIDTH),
    ),
    Entry(
        "LoRA, merged",
        lambda: frozen_base(Net(merged, base=nn.Linear(WIDTH, WIDTH), a=torch.randn(2, WIDTH), b=torch.randn(WIDTH, 2),
                                head=head())),
        labelled(WIDTH), None, None,
    ),
    Entry("weight in another dtype", lambda: Net(other_dtype, layer=nn.Linear(WIDTH, WIDTH), head=head()),
          labelled(WIDTH), None, None),
    Entry("weight norm", parametrised(parametrizations.weight_norm), labelled(WIDTH), None, None),
    Entry("spectral norm", parametrised(parametrizations.spectral_norm), labelled(WIDTH), None, None),
    Entry("orthogonal", parametrised(parametrizations.orthogonal), labelled(WIDTH), None, None),
]  # fmt: skip
