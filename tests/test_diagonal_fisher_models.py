"""``diagonal_fisher`` on the ways in which people write models: exact by one route or the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import limpet
from test_diagonal_fisher import assert_fisher, one_by_one


class Written(nn.Module):
    """A forward as a function of the module and its input."""

    def __init__(self, forward: Callable[["Written", Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def experts(m: Written, x: Tensor) -> Tensor:
    """Top-1 routing: rows go to one of two experts, and back to their places."""
    chosen, out = m.gate(x).argmax(-1), x.new_zeros(len(x), 5)
    for k, expert in enumerate((m.first, m.second)):
        rows = (chosen == k).nonzero()[:, 0]
        if len(rows):
            out = out.index_copy(0, rows, expert(x[rows]))
    return m.head(out)


def by_length(m: Written, x: Tensor) -> Tensor:
    """Rows sorted, as for packed sequences, and put back."""
    order = x[:, 0].argsort()
    return m.head(m.body(x[order]).relu()[order.argsort()])


def lora() -> Written:
    model = Written(
        lambda m, x: m.head(m.base(x) + m.up(m.down(x))),
        base=nn.Linear(4, 5), down=nn.Linear(4, 2, bias=False), up=nn.Linear(2, 5, bias=False), head=nn.Linear(5, 3),
    )  # fmt: skip
    model.base.requires_grad_(False)
    return model


def attention(time_major: bool) -> Written:
    def forward(m: Written, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1) if time_major else x
        return m.head(m.attention(rows, rows, rows, need_weights=False)[0].mean(0 if time_major else 1))

    return Written(forward, attention=nn.MultiheadAttention(4, 2, batch_first=not time_major), head=nn.Linear(4, 3))


def encoder() -> Written:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return Written(lambda m, x: m.head(m.layers(x)[:, 0]), layers=nn.TransformerEncoder(layer, 2), head=nn.Linear(4, 3))


LINEAR = nn.Linear
MODELS = {
    "lora": (lora, (4,)),
    "attention": (lambda: attention(False), (5, 4)),
    "time-major attention": (lambda: attention(True), (5, 4)),
    "encoder": (encoder, (5, 4)),
    "lstm": (
        lambda: Written(
            lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 5, batch_first=True), head=LINEAR(5, 3)
        ),
        (6, 4),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(LINEAR(4, 5)), nn.Tanh(), LINEAR(5, 3)),
        (4,),
    ),
    "matmul with a parameter": (
        lambda: Written(lambda m, x: (x @ m.a.weight.t()).relu() @ m.b.weight.t(), a=LINEAR(4, 5), b=LINEAR(5, 3)),
        (4,),
    ),
    "checkpoint": (
        lambda: Written(
            lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
            body=nn.Sequential(LINEAR(4, 5), nn.ReLU()),
            head=LINEAR(5, 3),
        ),
        (4,),
    ),
    "channels last to linear": (
        lambda: Written(
            lambda m, x: m.head(m.mix(m.conv(x).permute(0, 2, 3, 1)).mean((1, 2))),
            conv=nn.Conv2d(2, 4, 3),
            mix=LINEAR(4, 5),
            head=LINEAR(5, 3),
        ),
        (2, 5, 5),
    ),
    "experts": (
        lambda: Written(experts, gate=LINEAR(4, 2), first=LINEAR(4, 5), second=LINEAR(4, 5), head=LINEAR(5, 3)),
        (4,),
    ),
    "sorted rows": (lambda: Written(by_length, body=LINEAR(4, 5), head=LINEAR(5, 3)), (4,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_loop(name: str) -> None:
    make, shape = MODELS[name]
    model = make().eval()
    batches = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in (6, 3, 16, 1)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.num_samples == 26
    assert_fisher(fisher, one_by_one(model, batches), 1e-5)


def test_as_many_places_and_features_as_samples() -> None:
    model = Written(lambda m, x: m.head(m.body(x).mean(1)), body=nn.Linear(6, 6), head=nn.Linear(6, 3))
    batches = [(torch.randn(6, 6, 6), torch.randint(3, (6,)))]
    fisher = limpet.diagonal_fisher(model, batches)
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, batches), 1e-5)


def test_attention_across_the_batch_is_refused() -> None:
    """A time-major layer that was given batch-major rows: a mistake that trains without an error."""
    model = Written(
        lambda m, x: m.head(m.layer(x)[:, 0]),
        layer=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(RuntimeError, match=r"mixes samples: they interact at or before 'layer"):
        limpet.diagonal_fisher(model, [(torch.randn(6, 5, 4), torch.randint(3, (6,)))], loss=per_sample)


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")
