"""Models chosen against the ways in which ``diagonal_fisher`` finds out whose row is whose.

Each is right for single samples; most are written by people. ``zoo`` says what an entry is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import EVERY, LENGTH, VOCABULARY, WIDTH, Batches, Entry, Net, batches, classes, head, labelled, token_loss


def linear(outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, outputs)


def net(function: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """Fresh parts at each call, and a head."""
    return lambda: Net(function, head=head(), **{name: make() for name, make in parts.items()})


def random(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), classes(shape[0])


# --- where a row lies depends on the shapes --------------------------------------------------------------------------


def transposed_when_long(m: Net, x: Tensor) -> Tensor:
    rows = torch.tanh(m.first(x))
    rows = m.second(rows.transpose(0, 1)).transpose(0, 1) if x.shape[1] > 4 else m.second(rows)
    return m.head(torch.tanh(rows).mean(dim=1))


def time_major_when_large(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    if n > 4:
        return m.head(torch.tanh(m.first(x.transpose(0, 1).reshape(t * n, WIDTH))).view(t, n, WIDTH).mean(dim=0))
    return m.head(torch.tanh(m.first(x.reshape(n * t, WIDTH))).view(n, t, WIDTH).mean(dim=1))


# --- where a row lies depends on the values, by functions that do not search or move ---------------------------------


def compacted(m: Net, x: Tensor) -> Tensor:
    """Tokens that are kept move to the front by a product with a matrix of ones and zeros."""
    tokens = x.flatten(0, 1)  # [N * T, D]
    kept = tokens[:, 0] > 0
    place = torch.where(kept, kept.cumsum(0) - 1, len(tokens))
    move = F.one_hot(place, len(tokens) + 1)[:, :-1].to(x)  # [N * T, N * T]
    return m.head((move @ torch.tanh(m.first(move.t() @ tokens))).view_as(x).sum(dim=1))


def dispatched(m: Net, x: Tensor) -> Tensor:
    """Tokens sent to experts by a one-hot product (Lepikhin et al. 2021, "GShard")."""
    tokens = x.flatten(0, 1)
    gates = m.gate(tokens).softmax(dim=-1)  # [N * T, E]
    chosen = F.one_hot(gates.argmax(dim=-1), 2)
    place = (chosen.cumsum(0) - 1) * chosen
    send = (chosen[..., None] * F.one_hot(place, len(tokens))).to(x)  # [N * T, E, capacity]
    rows = torch.einsum("nec,nd->ecd", send, tokens)
    rows = torch.stack([torch.tanh(expert(r)) for expert, r in zip(m.experts, rows, strict=True)])
    return m.head(torch.einsum("nec,ecd->nd", send * gates[..., None], rows).view_as(x).sum(dim=1))


def dispatcher() -> nn.Module:
    model = Net(
        dispatched, gate=nn.Linear(WIDTH, 2, bias=False), experts=nn.ModuleList([linear(), linear()]), head=head()
    )
    nn.init.zeros_(model.gate.weight)
    with torch.no_grad():
        model.gate.weight[:, 0] = torch.tensor([1.0, -1.0])
    return model


def first_kept(n: int) -> tuple[Tensor, Tensor]:  # all tokens of the first three samples are kept
    x, y = random(n, 3, WIDTH)
    x[:3, :, 0] = 1.0
    return x, y


# --- rows of which the first batch says nothing ----------------------------------------------------------------------


def two_kinds(m: Net, text: Tensor, image: Tensor) -> Tensor:
    """A row of text for each sample, then the rows of all images, through one layer; zeros are no image."""
    n, present = len(text), image.ne(0).any(dim=-1, keepdim=True)
    rows = torch.tanh(m.first(torch.cat([text, image.flatten(0, 1)])))
    return m.head(rows[:n] + (rows[n:].view(n, -1, WIDTH) * present).sum(dim=1))


def without_images_first() -> Batches:
    seen, unseen = ((torch.randn(4, WIDTH), torch.randn(4, 3, WIDTH)) for _ in range(2))
    return [((unseen[0], torch.zeros_like(unseen[1])), classes(4)), (seen, classes(4))]


def class_table(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(m.first(x)), m.second(m.table)


def to_its_row(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    h, rows = output  # [N, D], [C, D]
    return (h - F.one_hot(target, len(rows)).to(h) @ rows).square().sum(dim=1)


def in_turn_then_repeated() -> Batches:
    return [(torch.randn(3, WIDTH), torch.tensor(y)) for y in ([0, 1, 2], [1, 1, 0])]


def padded_once(m: Net, ids: Tensor) -> Tensor:
    """One table, read with and without an index that is not learned."""
    return m.head((F.embedding(ids, m.table, padding_idx=1) + F.embedding(ids.flip(1), m.table)).mean(dim=1))


# --- gradients within forward ----------------------------------------------------------------------------------------


def forces(m: Net, x: Tensor) -> Tensor:
    """The gradient of an energy with respect to the positions, as interatomic potentials give it."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.second(torch.tanh(m.first(x))).sum(), x, create_graph=True)
    return m.head(slope)


def one_step(m: Net, x: Tensor) -> Tensor:
    """A step down an energy that counts as a constant."""
    y = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.second(torch.tanh(m.first(y))).sum(), y)
    return m.head(x - slope)


def over_samples(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(torch.func.vmap(m.first)(x)))


# --- what stops a gradient, and what ends early ----------------------------------------------------------------------


def two_branches(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        other = m.first(x.flip(-1))
    return m.head(torch.tanh(m.first(x)) - other)


def detached(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(F.linear(x, m.first.weight.detach(), m.first.bias)))


def straight_through(m: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A codebook (van den Oord et al. 2017)."""
    h = m.first(x)
    nearest = m.book(torch.cdist(h.detach(), m.book.weight.detach()).argmin(dim=-1))
    return m.head(h + (nearest - h).detach()), h, nearest


def codebook_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    logits, h, nearest = output
    distance = (nearest - h.detach()).square() + 0.25 * (nearest.detach() - h).square()
    return F.cross_entropy(logits, target, reduction="none") + distance.sum(dim=1)


def early_exit(m: Net, x: Tensor) -> Tensor:
    """Another depth when the whole batch is sure. (The first batch's samples all are.)"""
    h = torch.tanh(m.first(x))
    return m.head(h if bool((h.abs().amax(dim=1) > 0.999).all()) else torch.tanh(m.first(h)))


def sure_then_unsure() -> Batches:
    x, y = random(4, WIDTH)
    return [(x * 50, y), random(4, WIDTH), random(5, WIDTH)]


def each_alone(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.stack([torch.tanh(m.first(sample)) for sample in x]))


def language_model(m: Net, ids: Tensor) -> Tensor:
    return m.out(torch.tanh(m.first(m.table(ids))))


def nothing_asked_first() -> Batches:
    first, *rest = [torch.randint(VOCABULARY, (n, LENGTH)) for n in (4, 4, 1)]
    return [(first, torch.full_like(first, -100)), *((ids, ids.flip(1)) for ids in rest)]


LAYER, ENERGY = {"first": linear}, {"first": linear, "second": lambda: linear(1)}

EXACT = [
    Entry("branch without gradients", net(two_branches, **LAYER), labelled(WIDTH)),
    Entry("detached weight", net(detached, **LAYER), labelled(WIDTH)),
    Entry("codebook", net(straight_through, book=lambda: nn.Embedding(7, WIDTH), **LAYER), labelled(WIDTH),
          codebook_loss),
    Entry("early exit", net(early_exit, **LAYER), sure_then_unsure),
    Entry("each sample alone", net(each_alone, **LAYER), labelled(WIDTH), None, None),
    Entry("nothing asked first",
          lambda: Net(language_model, table=nn.Embedding(VOCABULARY, WIDTH), first=linear(), out=linear(VOCABULARY)),
          nothing_asked_first, token_loss, EVERY),
    Entry("rows of two kinds", net(two_kinds, **LAYER),
          batches(lambda n: ((torch.randn(n, WIDTH), torch.randn(n, 3, WIDTH)), classes(n))), None, None),
]  # fmt: skip


def changed_in_place(m: Net, x: Tensor) -> Tensor:
    h = m.first(x)  # a view inside of torch
    h += m.positions
    return m.head(F.relu(h, inplace=True).mean(dim=1))


EXACT += [
    Entry("changed in place", lambda: Net(changed_in_place, first=linear(), positions=torch.randn(LENGTH, WIDTH),
          head=head()), labelled(LENGTH, WIDTH), None, EVERY),
    # a layout holds at the shapes that it was checked at
    Entry("transposed when long", net(transposed_when_long, first=linear, second=linear),
          lambda: [random(4, 3, WIDTH), random(5, 5, WIDTH)], None, None),
    Entry("time-major when large", net(time_major_when_large, **LAYER), lambda: [random(6, 5, WIDTH)], None, None),
    # values decide
    Entry("compacted", net(compacted, **LAYER), lambda: [first_kept(8)], None, None),
    Entry("compacted, later", net(compacted, **LAYER), lambda: [first_kept(3), random(4, 3, WIDTH)], None, None),
    Entry("dispatched", dispatcher, lambda: [first_kept(3), random(4, 3, WIDTH)], None, None),
    # rows of which the first batch says nothing
    Entry("no images first", net(two_kinds, **LAYER), without_images_first, None, None),
    Entry("as many classes as samples",
          lambda: Net(class_table, first=linear(), table=torch.randn(3, WIDTH), second=linear()),
          in_turn_then_repeated, to_its_row, None),
    Entry("padding in one use", lambda: Net(padded_once, table=torch.randn(VOCABULARY, WIDTH), head=head()),
          batches(lambda n: (torch.randint(VOCABULARY, (n, LENGTH)), classes(n))), None, None),
    # gradients within forward, and torch.func
    Entry("forces", net(forces, **ENERGY), labelled(WIDTH), None, None),
    Entry("one step down", net(one_step, **ENERGY), labelled(WIDTH), None, None),
    Entry("vmap", net(over_samples, **LAYER), labelled(WIDTH), None, None),
]  # fmt: skip
