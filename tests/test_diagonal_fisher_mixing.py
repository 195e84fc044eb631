"""``diagonal_fisher`` of models that bring rows to other places without an index, and of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from limpet.fisher.row_check import RowCheck
from zoo import WIDTH, Batches, Net, assert_exact, classes, definition, head

# --- the tokens of all samples sorted by their first feature, and put back behind the layer --------------------------


TOKENS = 2  # of each sample: with one row each, the sum over samples would not show whose is whose


def ranks(x: Tensor) -> Tensor:  # [R, D] -> [R, R], row r is 1 at the rank of token r
    """By counts alone: no function that sorts, and none that runs along the samples. Equal ones stay in order."""
    s = x.detach()[:, 0]
    rank = [(s < one).sum() + (s[:n] == one).sum() for n, one in enumerate(s)]
    return (torch.stack(rank).unsqueeze(1) == torch.arange(len(s))).to(x)


def soft(p: Tensor, x: Tensor) -> Tensor:
    """The same values, with a gradient that the model needs none of."""
    return p + 0 * (x @ x.t())


def as_batch(p: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(p.unsqueeze(0), x.unsqueeze(0)).squeeze(0)


def summed(p: Tensor, x: Tensor) -> Tensor:
    return (p.unsqueeze(-1) * x.unsqueeze(0)).sum(dim=1)


def largest(p: Tensor, x: Tensor) -> Tensor:
    return torch.where(p.unsqueeze(-1) > 0, x.unsqueeze(0), -torch.inf).amax(1)


def elementwise(p: Tensor, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([(row * column).sum() for column in x.t()]) for row in p])


def padded(p: Tensor, x: Tensor) -> Tensor:
    """With a row that nothing is sent to."""
    return torch.einsum("sn,nd->sd", F.pad(p, (0, 1)), F.pad(x, (0, 0, 0, 1)))


def attended(p: Tensor, x: Tensor) -> Tensor:
    q = torch.zeros(1, len(x), 1, dtype=x.dtype)
    return F.scaled_dot_product_attention(q, q, x.unsqueeze(0), attn_mask=p.unsqueeze(0) > 0).squeeze(0)


def convolved(p: Tensor, x: Tensor) -> Tensor:
    return F.conv1d(x.t().unsqueeze(1), p.unsqueeze(1)).squeeze(2).t()


def as_attention(p: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(torch.zeros_like(p).masked_fill(p == 0, -torch.inf), dim=-1) @ x


def gathered(p: Tensor, x: Tensor) -> Tensor:
    return x.gather(0, p.argmax(1, keepdim=True).expand_as(x))


def taken_along(p: Tensor, x: Tensor) -> Tensor:
    return x.take_along_dim(p.argmax(1, keepdim=True), dim=0)


def put(p: Tensor, x: Tensor) -> Tensor:
    """Masked values, scattered one by one."""
    return torch.stack([x.masked_select(row.unsqueeze(1) > 0) for row in p])


def scattered(p: Tensor, x: Tensor) -> Tensor:
    kept = p.t().unsqueeze(-1).expand(-1, -1, x.shape[1]) > 0
    return torch.zeros_like(kept, dtype=x.dtype).masked_scatter(kept, x).sum(0)


Move = Callable[[Tensor, Tensor], Tensor]  # [R, R] of zeros and ones, [R, D] -> [R, D]
MOVES: dict[str, Move] = {
    "@": lambda p, x: p @ x,
    "@ from the right": lambda p, x: (x.t() @ p.t()).t(),
    "@ with a gradient": lambda p, x: soft(p, x) @ x,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "bmm": as_batch,
    "addmm": lambda p, x: torch.addmm(torch.zeros_like(x), p, x),
    "addmm, named": lambda p, x: torch.addmm(torch.zeros_like(x), mat1=p, mat2=x),
    "addbmm": lambda p, x: torch.addbmm(torch.zeros_like(x), p.t().unsqueeze(2), x.unsqueeze(1)),
    "linear": lambda p, x: F.linear(p, x.t()),
    "linear, named": lambda p, x: F.linear(weight=p, input=x.t()).t(),
    "solve, named": lambda p, x: torch.linalg.solve(B=x, A=p.t()),
    "einsum": lambda p, x: torch.einsum("s n, n ... -> s ...", p, x),
    "einsum, implicit": lambda p, x: torch.einsum("sn,nt", p, x),
    "einsum, by lists": lambda p, x: torch.einsum(p, [0, 1], x, [1, ...], [0, ...]),
    "tensordot": lambda p, x: torch.tensordot(p, x, 1),
    "tensordot by lists": lambda p, x: torch.tensordot(x, p, dims=([0], [1])).t(),
    "multi_dot": lambda p, x: torch.linalg.multi_dot([p, p.t(), p, x]),
    "solve": lambda p, x: torch.linalg.solve(p.t(), x),
    "sparse": lambda p, x: torch.sparse.mm(p.to_sparse(), x),
    "sum": summed,
    "each sum": elementwise,
    "max": largest,
    "a padded row": padded,
    "attention": attended,
    "attention by hand": as_attention,
    "convolution": convolved,
    "gather": gathered,
    "take_along_dim": taken_along,
    "index_select": lambda p, x: x.index_select(0, p.argmax(1)),
    "topk": lambda p, x: x[p.topk(1).indices.squeeze(1)],
    "masked_select": put,
    "masked_scatter": scattered,
}


def moved(move: Move) -> Callable[..., Tensor]:
    def forward(m: Net, x: Tensor) -> Tensor:  # [N, T, D]
        tokens = x.flatten(0, 1)
        p = ranks(tokens)
        return m.head(move(p, torch.tanh(m.first(move(p.t(), tokens)))).view_as(x).sum(dim=1))

    return forward


def net(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Net(forward, first=nn.Linear(WIDTH, WIDTH), head=head()).double()


def in_order(n: int = 6) -> tuple[Tensor, Tensor]:
    x, y = out_of_order(n)
    x[..., 0] = 1.0  # in whichever way samples are replaced by others
    return x, y


def out_of_order(n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, TOKENS, WIDTH, dtype=torch.float64)
    x[0, 0, 0], x[-1, 0, 0] = 5.0, -5.0
    return x, classes(n)


ORDERS: dict[str, Callable[[], Batches]] = {
    "sorted first": lambda: [in_order(), out_of_order()],
    "in pairs": lambda: [in_order(2), out_of_order(2)],
    "one first, then other sizes": lambda: [in_order(1), in_order(5), in_order(4), out_of_order(4), out_of_order(5)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MOVES)
def test_rows_that_change_places(name: str, order: str) -> None:
    model, batches = net(moved(MOVES[name])), ORDERS[order]()
    assert_exact(limpet.diagonal_fisher(model, batches), definition(model, batches), torch.float64)


def descending(x: Tensor) -> Tensor:
    return x[:1, :1, :1] > x[-1:, :1, :1]


def flipped(m: Net, x: Tensor) -> Tensor:
    """The first tokens of all samples, or none."""
    choice = descending(x)

    def swap(rows: Tensor) -> Tensor:
        return torch.cat([torch.where(choice, rows[:, :1].flip(0), rows[:, :1]), rows[:, 1:]], dim=1)

    return m.head(swap(torch.tanh(m.first(swap(x)))).sum(dim=1))


def rolled(m: Net, x: Tensor) -> Tensor:
    """Or not, by a product with a truth value."""
    choice = descending(x).flatten().to(x)

    def roll(rows: Tensor, shift: int) -> Tensor:
        return rows + choice * (rows.roll(shift, 0) - rows)

    return m.head(roll(torch.tanh(m.first(roll(x.flatten(0, 1), -1))), 1).view_as(x).sum(dim=1))


def rolled_by_a_number(m: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    shift = int(tokens[:, 0].argmax()) + 1 if bool(descending(x)) else 0
    return m.head(torch.tanh(m.first(tokens.roll(-shift, 0))).roll(shift, 0).view_as(x).sum(dim=1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("forward", [flipped, rolled, rolled_by_a_number])
def test_rows_that_are_flipped_or_rolled(forward: Callable[..., Tensor], order: str) -> None:
    model, batches = net(forward), ORDERS[order]()
    assert_exact(limpet.diagonal_fisher(model, batches), definition(model, batches), torch.float64)


# --- models whose samples stay apart ---------------------------------------------------------------------------------

N, LONG = 4, 8  # every length and width is a multiple of the number of samples


def padded_text(n: int = N) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tokens, and which of them count: others in each batch."""
    kept = torch.arange(LONG) < torch.randint(1, LONG + 1, (n, 1))
    return (torch.randn(n, LONG, WIDTH), kept), classes(n)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def encoded(m: Net, x: Tensor, kept: Tensor) -> Tensor:
    return m.head(m.encoder(x, src_key_padding_mask=~kept)[:, 0])


def attention_by_hand(m: Net, x: Tensor, kept: Tensor) -> Tensor:
    """With a mask that is read by constant indices, and positions that leave the padding out."""
    x = x + m.positions((kept.cumsum(1) * kept).long())
    allowed = kept[torch.arange(len(x)).view(-1, 1, 1), torch.arange(LONG).view(1, 1, -1)]
    weights = torch.softmax((m.first(x) @ x.mT).masked_fill(~allowed, -torch.inf), dim=-1)
    return m.head((weights @ x).amax(dim=1))


def pooled(m: Net, x: Tensor, kept: Tensor) -> Tensor:
    """A mean by a batched product, and one by a sum."""
    h = torch.tanh(m.first(x))
    by_product = torch.bmm(kept.unsqueeze(1).to(h), h).squeeze(1)
    return m.head((by_product + (h * kept.unsqueeze(-1)).sum(dim=1)) / kept.sum(dim=1, keepdim=True))


def on_a_graph(m: Net, x: Tensor, kept: Tensor) -> Tensor:
    """Dense adjacency matrices, and a transform of the data that is built in forward."""
    edges = (kept.unsqueeze(1) & kept.unsqueeze(2)).to(x)
    x = torch.einsum("ntd,de->nte", x, torch.eye(WIDTH) - 1 / WIDTH).flip(-1)
    h = m.first(edges @ x)
    return m.head((h * (h > 0)).logsumexp(1))


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: Net(encoded, encoder=encoder(), head=head()),
    "attention by hand": lambda: Net(attention_by_hand, first=nn.Linear(WIDTH, WIDTH),
                                     positions=nn.Embedding(LONG + 1, WIDTH), head=head()),
    "pooled": lambda: Net(pooled, first=nn.Linear(WIDTH, WIDTH), head=head()),
    "graph": lambda: Net(on_a_graph, first=nn.Linear(WIDTH, WIDTH), head=head()),
}  # fmt: skip


def checks(monkeypatch: pytest.MonkeyPatch, model: nn.Module, batches: Batches) -> list[int]:
    """The sizes of the batches whose rows were checked."""
    checked: list[int] = []
    monkeypatch.setattr(
        "limpet.fisher.computation.RowCheck",
        lambda losses, *rest, **options: checked.append(len(losses)) or RowCheck(losses, *rest, **options),
    )
    limpet.diagonal_fisher(model, batches)
    return checked


@pytest.mark.parametrize("name", ORDINARY)
def test_other_values_alone_set_off_no_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [padded_text() for _ in range(5)] + [padded_text(8), padded_text(8)]
    assert checks(monkeypatch, ORDINARY[name](), batches) == [N, 8]


def test_rows_that_may_change_places_are_checked_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(moved(MOVES["@"]))
    assert checks(monkeypatch, model, [in_order() for _ in range(3)]) == [6, 6, 6]
