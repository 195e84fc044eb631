"""Recurrent layers, step by step: the library's own kernels hide the gradients at the gates.

These functions run in place of the library's, under the recorder, so that their linear layers are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limpet.fisher.rules.packed import Padding

State = tuple[Tensor, ...]  # (h,), for an LSTM (h, c): [N, H] each
# (input's gates [N, G], state, weight_hh, bias_hh, projection or None) -> state
Cell = Callable[[Tensor, State, Tensor, Tensor | None, Tensor | None], State]


def _lstm_cell(gates: Tensor, state: State, w: Tensor, b: Tensor | None, projection: Tensor | None) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, w, b)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if projection is None else F.linear(h, projection)), c


def _gru_cell(gates: Tensor, state: State, w: Tensor, b: Tensor | None, projection: Tensor | None) -> State:
    (h,) = state
    of_input, of_state = gates.chunk(3, dim=-1), F.linear(h, w, b).chunk(3, dim=-1)
    r, z = torch.sigmoid(of_input[0] + of_state[0]), torch.sigmoid(of_input[1] + of_state[1])
    n = torch.tanh(of_input[2] + r * of_state[2])
    return (n + z * (h - n),)


def _plain_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates: Tensor, state: State, w: Tensor, b: Tensor | None, projection: Tensor | None) -> State:
        return (activation(gates + F.linear(state[0], w, b)),)

    return cell


def _layers(
    cell: Cell,
    input: Tensor,  # [T, N, I]
    initial: State,  # [layers * directions, N, H] each
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    padding: Padding | None,  # the steps at which a sample's state stays
) -> tuple[Tensor, ...]:  # the output, and the last states
    projected = len(initial) == 2 and initial[0].shape[-1] != initial[1].shape[-1]
    of_layer = iter(_by_layer(weights, has_biases, projected))
    running = None if padding is None else padding.running.unbind(0)
    last: list[State] = []
    for _ in range(num_layers):
        outputs = []
        for reverse in (False, True) if bidirectional else (False,):
            w_ih, w_hh, b_ih, b_hh, projection = next(of_layer)
            state = tuple(s[len(last)] for s in initial)
            gates = F.linear(input, w_ih, b_ih)
            steps = []
            for t, step in enumerate((_reversed(gates, padding) if reverse else gates).unbind(0)):
                after = cell(step, state, w_hh, b_hh, projection)
                if running is not None:
                    after = tuple(torch.where(running[t], new, old) for new, old in zip(after, state, strict=True))
                state = after
                steps.append(state[0])
            output = torch.stack(steps)
            outputs.append(_reversed(output, padding) if reverse else output)
            last.append(state)
        input = torch.cat(outputs, dim=-1)
    return input, *(torch.stack(states) for states in zip(*last, strict=True))


def _reversed(steps: Tensor, padding: Padding | None) -> Tensor:  # [T, N, *]
    """Every sample's steps from its last to its first; padding stays behind them."""
    return steps.flip(0) if padding is None else steps.gather(0, padding.reverse.expand_as(steps))


def _by_layer(
    weights: Sequence[Tensor], has_biases: bool, projected: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    width = 2 + 2 * has_biases + projected
    for k in range(0, len(weights), width):
        w_ih, w_hh, *rest = weights[k : k + width]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        yield w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None


def _opened(cell: Cell) -> Callable[..., Any]:
    def padded(
        input: Tensor,  # [T, N, I], [N, T, I] or [T, I]
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if train and dropout > 0:
            return None
        initial, one = _state(hx), input.dim() == 2
        if one:
            input, initial = input.unsqueeze(1), tuple(s.unsqueeze(1) for s in initial)
        elif batch_first:
            input = input.transpose(0, 1)
        output, *last = _layers(cell, input, initial, weights, has_biases, num_layers, bidirectional, None)
        output = output.squeeze(1) if one else output.transpose(0, 1) if batch_first else output
        return output, *(s.squeeze(1) if one else s for s in last)

    def packed(
        data: Tensor,  # [R, I]
        batch_sizes: Tensor,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        if train and dropout > 0:
            return None
        padding = Padding(batch_sizes, data.device)
        initial = tuple(padding.to_batch(s) for s in _state(hx))
        output, *last = _layers(
            cell, padding.pad(data), initial, weights, has_biases, num_layers, bidirectional, padding
        )
        return padding.pack(output), *(padding.from_batch(s) for s in last)

    return lambda *args: (padded if isinstance(args[3], bool) else packed)(*args)


def _state(hx: Any) -> State:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def _single(cell: Cell) -> Callable[..., Any]:
    def step(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = cell(F.linear(input, w_ih, b_ih), _state(hx), w_hh, b_hh, None)
        return state if len(state) > 1 else state[0]

    return step


# Each returns None where it does not apply: the library's function then runs as it is.
OPENED: dict[object, Callable[..., Any]] = {
    torch.lstm: _opened(_lstm_cell),
    torch.gru: _opened(_gru_cell),
    torch.rnn_tanh: _opened(_plain_cell(torch.tanh)),
    torch.rnn_relu: _opened(_plain_cell(torch.relu)),
    torch.lstm_cell: _single(_lstm_cell),
    torch.gru_cell: _single(_gru_cell),
    torch.rnn_tanh_cell: _single(_plain_cell(torch.tanh)),
    torch.rnn_relu_cell: _single(_plain_cell(torch.relu)),
}
