"""The label modes against explicit sums over samples and labels in float64."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from cases import CLASSES, MODELS, Case, LanguageModel, TimeMajor, mlp
from limpet.fisher import labels as modes
from limpet.fisher.batches import read
from test_diagonal_fisher import BOUND, assert_fisher, double


def squared_gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True, retain_graph=True)
    zeros = [torch.zeros_like(p) for p in params.values()]
    return {
        name: (z if grad is None else grad).double().square()
        for name, grad, z in zip(params, grads, zeros, strict=True)
    }


def expectation(model: nn.Module, inputs: Any, ignored: Tensor | None = None) -> dict[str, Tensor]:
    """The definition: for each sample, place and class the squared gradient, weighted by its probability; float64.

    The labels of different places are independent given the input, and each one's gradient has mean zero, so the
    expected square of their sum is the sum of their expected squares.
    """
    total: dict[str, Tensor] = {}
    batch = read((inputs, None), 0, 0)
    for n in range(batch.size):
        one = batch.take(slice(n, n + 1)).inputs
        logits = model(**one) if isinstance(one, dict) else model(*one) if isinstance(one, tuple) else model(one)
        log_p = torch.log_softmax(logits.double().reshape(logits.shape[1], -1), dim=0)  # [C, T]
        for t, c in itertools.product(range(log_p.shape[1]), range(log_p.shape[0])):
            if ignored is not None and bool(ignored[n].flatten()[t]):
                continue
            for name, square in squared_gradient(model, log_p[c, t]).items():
                total[name] = total.get(name, 0.0) + log_p[c, t].detach().exp() * square / batch.size
    return total


class WithLogits(nn.Module):
    """A language model whose output is an object, a mapping or a tuple around logits ``[N, T, C]``."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = LanguageModel(tied=True), wrap

    def forward(self, ids: Tensor) -> Any:
        return self.wrap(self.inner(ids).transpose(1, 2))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "attribute": lambda logits: SimpleNamespace(logits=logits),
    "key": lambda logits: OrderedDict(logits=logits),
}


# --- expected --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["default loss", "own loss"])
@pytest.mark.parametrize(
    ("make_model", "shape"),
    [(lambda: mlp(4, 6, CLASSES), (4,)), (lambda: mlp(4, 2), (4,)), (TimeMajor, (7, 4))],
    ids=["mlp", "binary", "time_major"],
)
def test_expected(make_model: Callable[[], nn.Module], shape: tuple[int, ...], own: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make_model().to(dtype)
    x = torch.randn(6, *shape, dtype=dtype)
    loss = (lambda o, y: F.cross_entropy(o, y, reduction="none")) if own else None
    batches = [(x[:3], None), (x[3:5], None), (x[5:], None)]
    fisher = limpet.diagonal_fisher(model, batches, labels="expected", loss=loss)
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, expectation(model.double(), x.double()), BOUND[dtype])


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_expected_of_every_model(case: Case) -> None:
    torch.manual_seed(0)
    model, (inputs, _) = case.make_model().double(), double(case.make_batch(2))
    fisher = limpet.diagonal_fisher(model, [(inputs, None)], labels="expected")
    assert_fisher(fisher, expectation(model, inputs), BOUND[torch.float64])


@pytest.mark.parametrize("own", [False, True], ids=["default loss", "own loss"])
def test_expected_over_places(own: bool) -> None:
    """Places are columns of their own, those without a label left out; the table is tied, the positions are shared."""
    torch.manual_seed(0)
    model = LanguageModel(tied=True).double()
    ids = torch.randint(0, 6, (3, 2))
    targets = torch.tensor([[1, 2], [-100, 3], [0, -100]])
    loss = (lambda o, y: F.cross_entropy(o, y, reduction="none").sum(dim=1)) if own else None
    fisher = limpet.diagonal_fisher(model, [(ids, targets)], labels="expected", loss=loss)
    assert_fisher(fisher, expectation(model, ids, targets == -100), BOUND[torch.float64])


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("labels", ["expected", "sampled"])
def test_outputs_that_hold_logits(wrap: str, labels: str) -> None:
    torch.manual_seed(0)
    model, ids = WithLogits(WRAPS[wrap]), torch.randint(0, 6, (3, 2))
    got = limpet.diagonal_fisher(model, [(ids, ids)], labels=labels)
    want = limpet.diagonal_fisher(model.inner, [(ids, ids)], labels=labels)
    assert all(torch.equal(value, want[name.removeprefix("inner.")]) for name, value in got.items())


def test_expected_of_a_binary_classification_is_one_column() -> None:
    batch = read((torch.zeros(3, 4), None), 0, 0)
    assert modes.expected_scores(torch.randn(3, 2), batch).shape == (3, 1)
    assert modes.expected_scores(torch.randn(3, 5, 2, 2), batch).shape == (3, 16)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 30.0, -300.0, 700.0, -1e4, 3e38, -3e38]), min_size=2, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_columns_are_a_factor_of_the_covariance(scores: list[float], dtype: torch.dtype) -> None:
    """``S S^T = diag(p) - p p^T``, also where probabilities vanish."""
    logits = torch.tensor([scores], dtype=dtype, requires_grad=True)
    columns = modes.expected_scores(logits, read((torch.zeros(1, 1), None), 0, 0))
    S = torch.stack([torch.autograd.grad(column, logits, retain_graph=True)[0][0] for column in columns[0]], dim=1)
    p = torch.softmax(logits.detach().double(), dim=1)[0]
    assert columns.dtype == dtype
    assert ((S.double() @ S.T.double()) - (p.diag() - p.outer(p))).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.cross_entropy(o, y, reduction="none").sum(dim=1) / (y != -100).sum(dim=1),
        lambda o, y: -o.log_softmax(dim=1).gather(1, y.unsqueeze(1) % 11).sum(dim=(1, 2)),
    ],
    ids=["a mean over labels", "no place ignored"],
)
def test_a_loss_that_does_not_sum_over_places_is_refused_for_expected(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (3, 2))
    with pytest.raises(ValueError, match=r"labels='expected' takes places one by one: loss must sum over them"):
        limpet.diagonal_fisher(LanguageModel(tied=False), [(ids, ids)], labels="expected", loss=loss)


# --- sampled ---------------------------------------------------------------------------------------------------------


def drawn(model: nn.Module, batches: list[tuple[Any, Any]], seed: int = 0) -> Tensor:
    """The labels that the model is given in the default loss's place."""
    seen: dict[int, Tensor] = {}
    number = first = 0
    for number, pair in enumerate(batches):
        batch = read(pair, number, first)
        modes.sampled(None, seed)(model(batch.inputs), batch)
        seen |= batch.drawn
        first += batch.size
    return torch.stack([seen[n] for n in range(first)])


@pytest.mark.parametrize(("make_model", "shape"), [(lambda: mlp(4, 6, CLASSES), (4,)), (TimeMajor, (7, 4))])
def test_sampled_is_the_empirical_one_of_the_labels_drawn(
    make_model: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = make_model().double(), torch.randn(9, *shape, dtype=torch.float64)
    labels = drawn(model, [(x, None)])
    assert len(labels.unique()) > 1
    want = limpet.diagonal_fisher(model, [(x, labels)])
    for cuts in ([9], [4, 5], [1, 1, 7]):
        batches = [(part, None) for part in x.split(cuts)]
        got = limpet.diagonal_fisher(model, batches, labels="sampled")
        assert_fisher(got, want, BOUND[torch.float64])
    other = limpet.diagonal_fisher(model, [(x, None)], labels="sampled", seed=1)
    assert any(not torch.allclose(other[name], want[name]) for name in want)


def test_draws_depend_on_seed_sample_and_place_alone() -> None:
    torch.manual_seed(0)
    model, ids = LanguageModel(tied=False).double(), torch.zeros(12, 7, dtype=torch.int64)
    labels = drawn(model, [(ids, ids)])
    assert labels.shape == (12, 7)
    assert torch.equal(labels, drawn(model, [(part, part) for part in ids.split([5, 1, 6])]))
    assert len({tuple(row) for row in labels.tolist()}) == 12  # the same input twelve times, other labels each time
    assert not torch.equal(labels, drawn(model, [(ids, ids)], seed=1))
    assert not torch.equal(labels, drawn(model, [(ids, ids)], seed=1 << 32))
    state = torch.get_rng_state()
    limpet.diagonal_fisher(model, [(ids, ids)], labels="sampled")
    assert torch.equal(state, torch.get_rng_state())


def test_draws_follow_the_distribution() -> None:
    """A chi-squared test of 40,000 draws; the seed is fixed, so that it either always passes or never."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.1], dtype=torch.float64)
    logits = probabilities.log().expand(10_000, 5).unsqueeze(2).expand(-1, -1, 4)
    labels = modes.draw(logits, torch.arange(10_000), (3, 0))
    counts = torch.bincount(labels.flatten(), minlength=5).double()
    assert counts[3] == 0
    expected = (probabilities * 40_000)[probabilities > 0]
    assert ((counts[probabilities > 0] - expected).square() / expected).sum() < 16.3  # 99.9 % for 3 degrees of freedom


@pytest.mark.parametrize("uniform", [0, 0xFFFFFFFF])
def test_draws_at_the_ends_have_a_probability(uniform: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "philox", lambda counter, key: torch.full_like(counter, uniform))
    scores = torch.full((1, 12), -1e4)
    scores[0, 3:9] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert modes.draw(scores, torch.tensor([0]), (0, 0)).item() == (8 if uniform else 3)


def test_a_batch_keeps_its_labels() -> None:
    """Another evaluation of the same samples, with other rounding, is given the same labels."""
    batch = read((torch.zeros(4, 1), None), 0, 100)
    given: list[Tensor] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        given.append(labels)
        return outputs.sum(dim=1)

    objective = modes.sampled(loss, 0)
    few = batch.take(torch.tensor([2, 2, 1]))
    certain = torch.full((4, 3), -1e4)
    certain[:, 0] = 0
    objective(certain[:3], few)
    objective(certain.flip(1), batch)  # all would be class 2 now
    assert [labels.tolist() for labels in given] == [[0, 0, 0], [2, 0, 0, 2]]


def test_places_without_a_label_stay_without() -> None:
    torch.manual_seed(0)
    model, ids = LanguageModel(tied=False), torch.randint(0, 6, (4, 3))
    targets = torch.where(torch.rand(4, 3) < 0.5, -100, ids)
    given: list[Tensor] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        given.append(labels)
        return F.cross_entropy(outputs, labels, reduction="none").sum(dim=1)

    modes.sampled(loss, 0)(model(ids), read((ids, targets), 0, 0))
    assert torch.equal(given[0] == -100, targets == -100)


@pytest.mark.parametrize("labels", ["sampled", "expected", "sampled_batched"])
def test_bfloat16(labels: str) -> None:
    """Against the same labels drawn in float64 from the same rounded parameters and inputs."""
    torch.manual_seed(0)
    model, x = mlp(4, 6, 3).bfloat16(), torch.randn(8, 4).bfloat16()
    got = limpet.diagonal_fisher(model, [(x, None)], labels=labels)
    want = limpet.diagonal_fisher(model.double(), [(x.double(), None)], labels=labels)
    assert all(value.dtype == torch.float32 for value in got.values())
    assert_fisher(got, want, 3e-2)


@pytest.mark.filterwarnings("ignore:labels='batched' squares:UserWarning")
@pytest.mark.parametrize("labels", modes.LABELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(labels: str, dtype: torch.dtype) -> None:
    """Gradients that float16 cannot hold without a loss scale."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.double(), labels, reduction="none") * 2.0**-24

    torch.manual_seed(0)
    model, batch = mlp(4, 6, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    with torch.autocast("cpu", dtype):
        got = limpet.diagonal_fisher(model, [batch], labels=labels, loss=loss)
    want = limpet.diagonal_fisher(model.double(), [(batch[0].double(), batch[1])], labels=labels)
    assert_fisher({name: value.double() * 2.0**48 for name, value in got.items()}, want, 5e-2)


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_max_samples(labels: str) -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 6, CLASSES), torch.randn(8, 4)
    got = limpet.diagonal_fisher(model, [(x[:3], None), (x[3:], None)], labels=labels, max_samples=5)
    assert got.num_samples == 5
    want = limpet.diagonal_fisher(model, [(x[:5], None)], labels=labels)
    assert_fisher(got, {name: value.double() for name, value in want.items()}, BOUND[torch.float32])


# --- batched ---------------------------------------------------------------------------------------------------------


def test_batched_is_the_mean_gradient_squared_and_says_so() -> None:
    torch.manual_seed(0)
    model = mlp(4, 6, CLASSES).double()
    batches = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(CLASSES, (n,))) for n in (5, 2, 1)]
    with pytest.warns(UserWarning, match="not the Fisher information"):
        got = limpet.diagonal_fisher(model, batches, labels="batched")
    want: dict[str, Tensor] = {}
    for x, y in batches:
        for name, square in squared_gradient(model, F.cross_entropy(model(x), y)).items():
            want[name] = want.get(name, 0.0) + square * len(x) / 8
    assert_fisher(got, want, BOUND[torch.float64])


def test_sampled_batched_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over every way in which the labels of two batches can be drawn is the exact expectation."""
    torch.manual_seed(0)
    classes, model = 3, mlp(2, 3).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    p = torch.softmax(model(x), dim=1).detach()
    total: dict[str, Tensor] = {}
    for labels in itertools.product(range(classes), repeat=4):
        row = torch.tensor(labels)
        monkeypatch.setattr(modes, "draw", lambda logits, samples, key, row=row: row[samples])
        got = limpet.diagonal_fisher(model, [(x[:3], None), (x[3:], None)], labels="sampled_batched")
        chance = p[range(4), row].prod()
        total = {name: total.get(name, 0.0) + chance * value for name, value in got.items()}
    assert_fisher(limpet.diagonal_fisher(model, [(x, None)], labels="expected"), total, BOUND[torch.float64])


@pytest.mark.filterwarnings("ignore:labels='batched' squares:UserWarning")
@pytest.mark.parametrize("labels", ["batched", "sampled_batched"])
@pytest.mark.parametrize(
    ("make_model", "loss", "error", "words"),
    [
        (lambda: mlp(4, 6, CLASSES).append(nn.Dropout(0.5)), None, RuntimeError, "drops at random"),
        (lambda: mlp(4, 6, CLASSES), F.cross_entropy, ValueError, "one value per sample"),
        (lambda: mlp(4, 6, CLASSES), lambda o, y: (o - o.mean(0))[:, 0], RuntimeError, "mixes samples"),
        (lambda: mlp(4, 6, CLASSES), lambda o, y: o.detach()[:, 0], RuntimeError, "do not depend on any parameter"),
        (lambda: mlp(4, 6, CLASSES), lambda o, y: o[:, 0] / 0, RuntimeError, "the loss of sample 0 of batch 0 is"),
    ],
)
def test_batched_refuses_what_the_others_do(
    labels: str, make_model: Callable[[], nn.Module], loss: Any, error: type[Exception], words: str
) -> None:
    torch.manual_seed(0)
    batch = torch.randn(4, 4), torch.randint(CLASSES, (4,))
    with pytest.raises(error, match=words):
        limpet.diagonal_fisher(make_model(), [batch], labels=labels, loss=loss)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["sampled", "expected", "sampled_batched"])
@pytest.mark.parametrize(
    ("outputs", "targets", "error", "words"),
    [
        (lambda h: (h,), None, TypeError, "need outputs of shape [N, C, *], or outputs with logits"),
        (lambda h: {"scores": h}, None, TypeError, "need outputs of shape [N, C, *], or outputs with logits"),
        (lambda h: h[:, 0], None, TypeError, "got a torch.float32 tensor of shape [4]"),
        (lambda h: h[:, :1], None, ValueError, "at least two classes, got a torch.float32 tensor of shape [4, 1]"),
        (lambda h: h.T[:, :3], None, ValueError, "samples and at least two classes, got"),
        (
            lambda h: h,
            {"y": torch.zeros(4)},
            TypeError,
            "replace the targets, which must be a tensor or None, got dict",
        ),
    ],
)
def test_what_labels_cannot_be_drawn_from(
    labels: str, outputs: Callable[[Tensor], Any], targets: Any, error: type[Exception], words: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Any:
            return outputs(self.linear(x))

    with pytest.raises(error, match=re.escape(words).replace(r"\[4", r"\[\d")):
        limpet.diagonal_fisher(
            Model(), [(torch.randn(4, 4), targets)], labels=labels, loss=lambda o, y: F.cross_entropy(o, y)
        )


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1 << 64, ValueError), (0.5, TypeError)])
def test_seeds(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed must be"):
        limpet.diagonal_fisher(mlp(4, 2), [(torch.randn(4, 4), None)], labels="sampled", seed=seed)


def test_ewc_passes_the_mode_on() -> None:
    torch.manual_seed(0)
    model, batch = mlp(4, 6, CLASSES), (torch.randn(8, 4), torch.randint(CLASSES, (8,)))
    ewc = limpet.EWC(model, 1.0)
    ewc.consolidate([batch], labels="sampled", seed=5)
    want = limpet.diagonal_fisher(model, [batch], labels="sampled", seed=5)
    assert all(torch.equal(ewc.importances[name], want[name]) for name in want)
