"""Transformers: torch's own layers in every form, and attention written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import LENGTH, VOCABULARY, WIDTH, Entry, Net, batches, classes, head, labelled, lengths, padding, token_loss

HEADS = 2


def causal(x: Tensor, length: int = LENGTH) -> Tensor:  # [T, T], -inf above the diagonal
    return nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)


def with_padding(n: int) -> tuple[Any, Tensor]:
    return (torch.randn(n, LENGTH, WIDTH), padding(lengths(n), LENGTH)), classes(n)


# --- torch's layers --------------------------------------------------------------------------------------------------


def encoder(batch_first: bool = True, **options: Any) -> Callable[[], nn.Module]:
    def forward(m: Net, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        h = m.layers(x if batch_first else x.transpose(0, 1), src_key_padding_mask=ignored)
        return m.head(h[:, 0] if batch_first else h[0])

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=batch_first, **options)
        layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return Net(forward, layers=layers, head=head()).eval()

    return make


def decoder(batch_first: bool = True, **options: Any) -> Callable[[], nn.Module]:
    def forward(m: Net, x: Tensor, memory: Tensor, ignored: Tensor) -> Tensor:  # [N, 5, D], [N, 4, D], [N, 4]
        if not batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h = m.layers(x, memory, tgt_mask=causal(x), tgt_is_causal=True, memory_key_padding_mask=ignored)
        return m.head(h).mean(dim=1 if batch_first else 0)

    def make() -> nn.Module:
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 12, batch_first=batch_first, **options)
        return Net(forward, layers=nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH)), head=head()).eval()

    return make


def transformer(m: Net, x: Tensor, y: Tensor) -> Tensor:
    return m.head(m.layers(x, y, tgt_mask=causal(y)))[:, -1]


def with_memory(n: int) -> tuple[Any, Tensor]:
    return (torch.randn(n, LENGTH, WIDTH), torch.randn(n, 4, WIDTH), padding(lengths(n, 4), 4)), classes(n)


def multihead(
    forward: Callable[..., Tensor], batch_first: bool = True, inputs: Any = None, **options: Any
) -> tuple[Callable[[], nn.Module], Any]:
    """``forward(attention, x, *rest)`` gives rows that are averaged over their places."""

    def pooled(m: Net, x: Tensor, *rest: Tensor) -> Tensor:
        h = forward(m.attention, x if batch_first else x.transpose(0, 1), *rest)
        return m.head(h.mean(dim=1 if batch_first else 0))

    def make() -> nn.Module:
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        for name, p in attention.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
        return Net(pooled, attention=attention, head=head())

    return make, inputs or labelled(LENGTH, WIDTH)


def weighted(a: nn.Module, x: Tensor) -> Tensor:
    y, weights = a(x, x, x, average_attn_weights=False)  # [N, T, D], [N, H, T, T]
    return y + weights.square().sum(dim=(1, 3))[..., None]


def masked_per_head(a: nn.Module, x: Tensor, scores: Tensor) -> Tensor:  # [N, H, T, T]
    return a(x, x, x, attn_mask=scores.flatten(0, 1), need_weights=False)[0]


def of_other_widths(n: int) -> tuple[Any, Tensor]:
    return (torch.randn(n, LENGTH, WIDTH), torch.randn(n, 3, 6), torch.randn(n, 3, 7)), classes(n)


def plain(a: nn.Module, x: Tensor) -> Tensor:
    return a(x, x, x, need_weights=False)[0]


MULTIHEAD = {
    "packed": multihead(plain),
    "packed, no bias": multihead(plain, bias=False),
    "with weights": multihead(lambda a, x: a(x, x, x)[0]),
    "weights in the loss": multihead(weighted),
    "time-major": multihead(plain, batch_first=False),
    "time-major with weights": multihead(lambda a, x: a(x, x, x)[0], batch_first=False),
    "cross": multihead(lambda a, x: a(x[:, :2], x[:, 2:], x[:, 2:], need_weights=False)[0]),
    "separate projections": multihead(
        lambda a, x, k, v: a(x, k, v)[0], inputs=batches(of_other_widths), kdim=6, vdim=7
    ),
    "bias_kv": multihead(plain, add_bias_kv=True, add_zero_attn=True),
    "bias_kv, time-major": multihead(plain, batch_first=False, add_bias_kv=True),
    "key_padding_mask": multihead(
        lambda a, x, ignored: a(x, x, x, key_padding_mask=ignored)[0], inputs=batches(with_padding)
    ),
    "float mask": multihead(lambda a, x: a(x, x, x, attn_mask=causal(x), need_weights=False)[0]),
    "is_causal": multihead(lambda a, x: a(x, x, x, attn_mask=causal(x), is_causal=True, need_weights=False)[0]),
    "mask per head": multihead(
        masked_per_head,
        inputs=batches(lambda n: ((torch.randn(n, LENGTH, WIDTH), torch.randn(n, HEADS, LENGTH, LENGTH)), classes(n))),
    ),
}


# --- attention by hand -----------------------------------------------------------------------------------------------


def heads(x: Tensor, count: int) -> Tensor:  # [N, T, H * d] -> [N, H, T, d]
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def grouped(m: Net, x: Tensor) -> Tensor:
    """Four heads of queries that share two of keys and values; one projection for all."""
    q, k, v = m.qkv(m.norm(x)).split((8, 4, 4), dim=-1)
    k, v = (heads(t, 2).repeat_interleave(2, dim=1) for t in (k, v))
    y = F.scaled_dot_product_attention(heads(q, 4), k, v, is_causal=True)
    return m.head(x + m.out(y.transpose(1, 2).flatten(2))).mean(dim=1)


def rotary(m: Net, x: Tensor) -> Tensor:
    """Rotary positions and a gated MLP, as in Llama."""
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * x.new_tensor([1.0, 0.1])
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(t: Tensor) -> Tensor:
        return t * cos + torch.cat([-t[..., 2:], t[..., :2]], dim=-1) * sin

    h = m.norm(x)
    q, k, v = (heads(part(h), HEADS) for part in (m.q, m.k, m.v))
    x = x + m.out(F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).flatten(2))
    h = m.norm(x)  # the same norm again
    return m.head(x + m.down(F.silu(m.gate(h)) * m.up(h))).mean(dim=1)


def latents(m: Net, x: Tensor) -> Tensor:
    """Perceiver: a learned array, the same for every sample, asks the input."""
    q = m.q(m.array.expand(len(x), -1, -1))
    k, v = m.kv(x).chunk(2, dim=-1)
    return m.head(F.scaled_dot_product_attention(q, k, v)).sum(dim=1)


def latents_per_head(m: Net, x: Tensor) -> Tensor:
    """The same through :class:`nn.MultiheadAttention`, repeated instead of expanded."""
    return m.head(m.attention(m.array.unsqueeze(0).repeat(len(x), 1, 1), x, x)[0]).mean(dim=1)


def language_model(m: Net, ids: Tensor) -> Tensor:  # [N, T] -> [N, T, V]
    h = m.tokens(ids) + m.positions[: ids.shape[1]]
    h = m.layer(h, src_mask=causal(h, ids.shape[1]), is_causal=True)
    return m.head(m.norm(h))


def tied_language_model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True, norm_first=True)
    model = Net(
        language_model, tokens=nn.Embedding(VOCABULARY, WIDTH), positions=torch.randn(LENGTH, WIDTH), layer=layer,
        norm=nn.LayerNorm(WIDTH), head=nn.Linear(WIDTH, VOCABULARY, bias=False),
    )  # fmt: skip
    model.head.weight = model.tokens.weight
    return model.eval()


def text(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(VOCABULARY, (n, LENGTH))
    return torch.randint(VOCABULARY, (n, LENGTH)), labels.masked_fill(padding(lengths(n), LENGTH), -100)


def linears(**widths: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(WIDTH, width) for name, width in widths.items()}


ENTRIES = [
    Entry("encoder", encoder(), batches(with_padding), None, None),
    Entry("encoder, norm first", encoder(norm_first=True, activation="gelu"), labelled(LENGTH, WIDTH), None, None),
    Entry("encoder, time-major", encoder(batch_first=False), batches(with_padding), None, None),
    Entry("decoder", decoder(), batches(with_memory), None, None),
    Entry("decoder, time-major", decoder(batch_first=False, norm_first=True), batches(with_memory), None, None),
    Entry(
        "transformer",
        lambda: Net(transformer, layers=nn.Transformer(WIDTH, HEADS, 1, 1, 12, batch_first=True), head=head()).eval(),
        batches(lambda n: ((torch.randn(n, 4, WIDTH), torch.randn(n, LENGTH, WIDTH)), classes(n))), None, None,
    ),
    *(Entry(f"multihead, {name}", make, inputs, None, None) for name, (make, inputs) in MULTIHEAD.items()),
    Entry(
        "grouped queries",
        lambda: Net(grouped, norm=nn.LayerNorm(WIDTH), head=head(), **linears(qkv=16, out=WIDTH)),
        labelled(LENGTH, WIDTH),
    ),
    Entry(
        "rotary and gated",
        lambda: Net(
            rotary, norm=nn.RMSNorm(WIDTH), down=nn.Linear(12, WIDTH), head=head(),
            **linears(q=8, k=8, v=8, out=8, gate=12, up=12),
        ),
        labelled(LENGTH, WIDTH),
    ),
    Entry(
        "latent array",
        lambda: Net(latents, array=torch.randn(3, WIDTH), head=head(), **linears(q=WIDTH, kv=2 * WIDTH)),
        labelled(LENGTH, WIDTH), None, None,
    ),
    Entry(
        "latent array, multihead",
        lambda: Net(
            latents_per_head, array=torch.randn(3, WIDTH), head=head(),
            attention=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        ),
        labelled(LENGTH, WIDTH), None, None,
    ),
    Entry("tied language model", tied_language_model, batches(text), token_loss, None),
]  # fmt: skip
