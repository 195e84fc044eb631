"""Recurrent networks: layers, packed sequences, cells in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from zoo import LENGTH, WIDTH, Entry, Net, batches, classes, head, labelled, lengths

HIDDEN = 6


def last(h: Tensor) -> Tensor:  # [L, N, H] or a pair of them -> [N, L * H]
    h = h[0] if isinstance(h, tuple) else h
    return h.transpose(0, 1).flatten(1)


def layers(kind: Any, batch_first: bool = True, width: int = HIDDEN, **options: Any) -> Callable[[], nn.Module]:
    """Every output's mean and the last hidden state."""
    directions = 2 if options.get("bidirectional") else 1

    def forward(m: Net, x: Tensor) -> Tensor:
        outputs, hidden = m.rnn(x if batch_first else x.transpose(0, 1))
        return m.head(torch.cat([outputs.mean(dim=1 if batch_first else 0), last(hidden)], dim=1))

    features = width * directions * (1 + options.get("num_layers", 1))
    return lambda: Net(forward, rnn=kind(WIDTH, HIDDEN, batch_first=batch_first, **options), head=head(features))


def packed(
    kind: Any, enforce_sorted: bool, batch_first: bool = True, width: int = HIDDEN, **options: Any
) -> Callable[[], nn.Module]:
    """Every output's sum and the last hidden state, behind a linear layer."""

    def forward(m: Net, x: Tensor, counts: Tensor) -> Tensor:
        x = m.first(x)
        rows = pack_padded_sequence(
            x if batch_first else x.transpose(0, 1),
            counts.cpu(),
            batch_first=batch_first,
            enforce_sorted=enforce_sorted,
        )
        outputs, hidden = m.rnn(rows)
        padded, _ = pad_packed_sequence(outputs, batch_first=batch_first)
        return m.head(torch.cat([padded.sum(dim=1 if batch_first else 0), last(hidden)], dim=1))

    features = width * (2 if options.get("bidirectional") else 1) * (1 + options.get("num_layers", 1))
    return lambda: Net(
        forward,
        first=nn.Linear(WIDTH, WIDTH),
        rnn=kind(WIDTH, HIDDEN, batch_first=batch_first, **options),
        head=head(features),
    )


def of_lengths(in_order: bool) -> Callable[[int], tuple[Any, Tensor]]:
    def make(n: int) -> tuple[Any, Tensor]:
        counts = lengths(n)
        return (torch.randn(n, LENGTH, WIDTH), counts.sort(descending=True)[0] if in_order else counts), classes(n)

    return make


def packed_features(m: Net, x: Tensor, counts: Tensor) -> Tensor:
    """Packed inputs that need no gradient, a start from the sample, a longer padding."""
    rows = pack_padded_sequence(x, counts.tolist(), batch_first=True, enforce_sorted=False)
    start = torch.tanh(m.start(x[:, 0])).expand(2, -1, -1)
    outputs, (hidden, cell) = m.rnn(rows, (start, start.square()))
    padded, _ = pad_packed_sequence(outputs, batch_first=True, padding_value=0.5, total_length=LENGTH + 1)
    return m.head(torch.cat([padded.sum(dim=1), last(hidden), last(cell)], dim=1))


def sorted_by_hand(m: Net, x: Tensor, counts: Tensor) -> Tensor:
    counts, order = counts.sort(descending=True)
    _, hidden = m.rnn(pack_padded_sequence(x[order], counts.cpu(), batch_first=True))
    return m.head(last(hidden)[order.argsort()])


def sorted_by_python(m: Net, x: Tensor, counts: Tensor) -> Tensor:
    """An order that cannot be followed."""
    order = sorted(range(len(x)), key=counts.tolist().__getitem__, reverse=True)
    _, hidden = m.rnn(pack_padded_sequence(x[order], counts[order].cpu(), batch_first=True))
    return m.head(last(hidden)[torch.tensor(order).argsort()])


def linear_on_packed(m: Net, x: Tensor, counts: Tensor) -> Tensor:
    """A linear layer on the packed rows, which lie by time and not by sample."""
    rows = pack_padded_sequence(x, counts.cpu(), batch_first=True, enforce_sorted=False)
    padded, _ = pad_packed_sequence(rows._replace(data=torch.tanh(m.first(rows.data))), batch_first=True)
    return m.head(padded.sum(dim=1))


def padded_to_the_longest(m: Net, x: Tensor, counts: Tensor) -> Tensor:
    """The sequences cut to their lengths, and padded to the longest of the batch."""
    rows = pad_sequence([row[:count] for row, count in zip(x, counts.tolist(), strict=True)], batch_first=True)
    h = torch.tanh(m.first(rows)) * (torch.arange(rows.shape[1], device=x.device) < counts[:, None])[..., None]
    return m.head(h.sum(dim=1))


def cells(m: Net, x: Tensor) -> Tensor:
    state = None
    for place in x.unbind(dim=1):
        state = m.cell(place, state)
    return m.head(state[0] if isinstance(state, tuple) else state)


def learned_start(m: Net, x: Tensor) -> Tensor:
    return m.head(last(m.rnn(x, m.start.expand(-1, len(x), -1).contiguous())[1]))


def minimal_gated(m: Net, x: Tensor) -> Tensor:
    """A gated unit by hand: linear layers called at every place."""
    h = x.new_zeros(len(x), HIDDEN)
    for t in range(x.shape[1]):
        both = torch.cat([x[:, t], h], dim=1)
        gate = torch.sigmoid(m.gate(both))
        h = gate * h + (1 - gate) * torch.tanh(m.value(both))
    return m.head(m.norm(h))


KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
LAYERS = {
    **{name: layers(kind) for name, kind in KINDS.items()},
    **{f"{name}, time-major": layers(kind, batch_first=False) for name, kind in KINDS.items()},
    **{f"{name}, bidirectional": layers(kind, num_layers=2, bidirectional=True) for name, kind in KINDS.items()},
    "LSTM, no bias": layers(nn.LSTM, bias=False),
    "RNN, ReLU": layers(nn.RNN, nonlinearity="relu"),
    "LSTM, proj_size": layers(nn.LSTM, width=3, proj_size=3, num_layers=2),
}
PACKED = {
    f"{name}, {'sorted' if in_order else 'unsorted'}{'' if batch_first else ', time-major'}": (
        packed(kind, in_order, batch_first),
        batches(of_lengths(in_order)),
    )
    for name, kind in KINDS.items()
    for in_order, batch_first in ((True, True), (False, False))
}

PACKED["LSTM, bidirectional"] = (packed(nn.LSTM, False, num_layers=2, bidirectional=True), batches(of_lengths(False)))
PACKED["GRU, bidirectional, sorted"] = packed(nn.GRU, True, bidirectional=True), batches(of_lengths(True))
PACKED["LSTM, proj_size"] = (packed(nn.LSTM, False, width=3, proj_size=3, num_layers=2), batches(of_lengths(False)))
PACKED["LSTM from a start"] = (
    lambda: Net(
        packed_features,
        rnn=nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True),
        start=nn.Linear(WIDTH, HIDDEN),
        head=head(6 * HIDDEN),
    ),
    batches(of_lengths(False)),
)
PACKED["GRU, sorted by hand"] = (
    lambda: Net(sorted_by_hand, rnn=nn.GRU(WIDTH, HIDDEN, batch_first=True), head=head(HIDDEN)),
    batches(of_lengths(False)),
)  # fmt: skip

ENTRIES = [
    *(Entry(name, make, labelled(LENGTH, WIDTH)) for name, make in LAYERS.items()),
    *(Entry(f"packed {name}", make, inputs) for name, (make, inputs) in PACKED.items()),
    *(
        Entry(kind.__name__, lambda kind=kind: Net(cells, cell=kind(WIDTH, HIDDEN), head=head(HIDDEN)),
              labelled(LENGTH, WIDTH))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    Entry(
        "learned start",
        lambda: Net(learned_start, rnn=nn.GRU(WIDTH, HIDDEN, batch_first=True), start=torch.randn(1, 1, HIDDEN),
                    head=head(HIDDEN)),
        labelled(LENGTH, WIDTH),
    ),
    Entry(
        "gated unit by hand",
        lambda: Net(minimal_gated, gate=nn.Linear(WIDTH + HIDDEN, HIDDEN), value=nn.Linear(WIDTH + HIDDEN, HIDDEN),
                    norm=nn.LayerNorm(HIDDEN), head=head(HIDDEN)),
        labelled(LENGTH, WIDTH),
    ),
    Entry(
        "packed GRU, sorted by Python",
        lambda: Net(sorted_by_python, rnn=nn.GRU(WIDTH, HIDDEN, batch_first=True), head=head(HIDDEN)),
        batches(of_lengths(False)), None, None,
    ),
    Entry(
        "linear on packed rows",
        lambda: Net(linear_on_packed, first=nn.Linear(WIDTH, HIDDEN), head=head(HIDDEN)),
        batches(of_lengths(False)), None, None,
    ),
    Entry(
        "padded to the longest",
        lambda: Net(padded_to_the_longest, first=nn.Linear(WIDTH, HIDDEN), head=head(HIDDEN)),
        batches(of_lengths(False)),
    ),
]  # fmt: skip
