"""``diagonal_fisher`` on batches and models chosen against the ways in which it finds out whose row is whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import limpet
import zoo_attention
import zoo_hard
import zoo_vision
from test_zoo import check
from zoo import LENGTH, WIDTH, Batches, Entry, Net, assert_exact, classes, definition, head, single_samples, tree_map

# --- ordinary models, batches of every kind --------------------------------------------------------------------------


def collated(samples: list[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Tensor):
        return torch.cat(samples)
    return tuple(collated(list(parts)) for parts in zip(*samples, strict=True))


def zeros(sample: Any) -> Any:
    inputs, target = sample
    return tree_map(lambda t: torch.zeros_like(t) if t.is_floating_point() else t, inputs), target


KINDS = {
    "one first": lambda s: [s[:1], s[1:5], s[5:7]],
    "pairs": lambda s: [s[:2], s[2:4]],
    "multiples of three": lambda s: [s[:6], [*s[:8], s[0]]],
    "identical first": lambda s: [[s[0]] * 4, s[1:4]],
    "two of a kind": lambda s: [[s[0], s[0], *s[1:3]], s[3:6]],
    "zeros first": lambda s: [[*map(zeros, s[:3]), *s[3:5]], s[5:8]],
}
ORDINARY = [entry for entry in zoo_attention.ENTRIES + zoo_vision.ENTRIES if entry.loss is None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ORDINARY, ids=lambda entry: entry.name)
def test_batches_of_every_kind(entry: Entry, kind: str) -> None:
    def make() -> Batches:
        return [collated(samples) for samples in KINDS[kind](list(single_samples(entry.make_batches())))]

    check(entry._replace(make_batches=make, expected_routes=None), torch.float64)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", zoo_hard.EXACT, ids=lambda entry: entry.name)
def test_models(entry: Entry) -> None:
    check(entry, torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(compiler: str) -> None:
    model = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), head()).double(), backend=compiler)
    batches = [(torch.randn(n, WIDTH, dtype=torch.float64), classes(n)) for n in (4, 3)]
    assert_exact(limpet.diagonal_fisher(model, batches), definition(model, batches), torch.float64)


def test_hooks_of_parameters_do_not_run() -> None:
    model = Net(lambda m, x: m.head(x * m.scale), scale=torch.rand(WIDTH), head=head()).double()
    batches = [(torch.randn(n, WIDTH, dtype=torch.float64), classes(n)) for n in (4, 3)]
    want = definition(model, batches)
    for p in model.parameters():
        p.register_hook(torch.zeros_like)
    assert_exact(limpet.diagonal_fisher(model, batches), want, torch.float64)


@pytest.mark.parametrize("use", [lambda m, x: torch.stack([row @ m.w for row in x]), lambda m, x: x * m.w.exp().sum(0)])
def test_hooks_that_would_run_are_refused(use: Any) -> None:
    model = Net(lambda m, x: m.head(use(m, x)), w=torch.rand(WIDTH, WIDTH), head=head())
    hook = model.w.register_hook(torch.zeros_like)
    batches = [(torch.randn(WIDTH, WIDTH), classes(WIDTH))]
    with pytest.raises(RuntimeError, match="parameter 'w' has a gradient hook"):
        limpet.diagonal_fisher(model, batches)
    hook.remove()
    assert limpet.diagonal_fisher(model, batches)["w"].any()


def test_lengths_in_descending_order_stay_so() -> None:
    def forward(m: Net, x: Tensor, counts: Tensor) -> Tensor:
        return m.head(m.rnn(pack_padded_sequence(x, counts, batch_first=True))[1][-1])

    model = Net(forward, rnn=nn.GRU(WIDTH, WIDTH, batch_first=True), head=head()).double()
    x = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64).expand(3, -1, -1)
    batches = [((x, torch.tensor([4, 4, 2])), classes(3))]
    assert_exact(limpet.diagonal_fisher(model, batches), definition(model, batches), torch.float64)


@pytest.mark.parametrize("mode", ["product", "mask"])
def test_a_square_input_of_all_samples(mode: str) -> None:
    def forward(m: Net, x: Tensor, shared: Tensor) -> Tensor:
        h = m.first(x)
        h = (m.weight * shared) @ h if mode == "product" else F.scaled_dot_product_attention(h, h, x, shared)
        return m.head(torch.tanh(h).mean(dim=1))

    model = Net(forward, first=nn.Linear(WIDTH, WIDTH), weight=torch.randn(LENGTH, LENGTH), head=head()).double()
    shared = torch.rand(LENGTH, LENGTH, dtype=torch.float64)
    x, y = torch.randn(LENGTH, LENGTH, WIDTH, dtype=torch.float64), classes(LENGTH)
    alone = [((x[n : n + 1], shared), y[n : n + 1]) for n in range(LENGTH)]
    assert_exact(limpet.diagonal_fisher(model, [((x, shared), y)]), definition(model, alone), torch.float64)


def test_a_square_input_of_its_samples_stays_so() -> None:
    model = Net(lambda m, x, own: m.head(torch.tanh(m.first(x) * own[..., None]).mean(dim=1)), first=nn.Linear(
        WIDTH, WIDTH), head=head()).double()  # fmt: skip
    inputs = torch.randn(LENGTH, LENGTH, WIDTH, dtype=torch.float64), torch.rand(LENGTH, LENGTH, dtype=torch.float64)
    batches = [(inputs, classes(LENGTH))]
    assert_exact(limpet.diagonal_fisher(model, batches), definition(model, batches), torch.float64)


def beyond_the_third(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.first(x))
    return m.head(torch.cat([h[:3], h[3:] - h[3:].mean(dim=0)]) if len(x) > 3 else h)


def in_large_batches(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.first(x))
    return m.head(h - h.mean(dim=0) if len(x) > 4 else h)


@pytest.mark.parametrize("forward", [beyond_the_third, in_large_batches])
def test_samples_that_interact_where_the_probe_does_not_look(forward: Any) -> None:
    model = Net(forward, first=nn.Linear(WIDTH, WIDTH), head=head())
    with pytest.raises(RuntimeError, match="mixes samples"):
        limpet.diagonal_fisher(model, [(torch.randn(n, WIDTH), classes(n)) for n in (4, 8)])
