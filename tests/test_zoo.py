"""Every model of the zoo: exact against the definition, in both dtypes, and by the route that is expected."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

import limpet
import zoo_attention
import zoo_custom
import zoo_recurrent
import zoo_reuse
import zoo_vision
from zoo import BOUND, Entry, assert_exact, definition, in_dtype

ENTRIES = [
    *zoo_attention.ENTRIES,
    *zoo_recurrent.ENTRIES,
    *zoo_vision.ENTRIES,
    *zoo_reuse.ENTRIES,
    *zoo_custom.ENTRIES,
]


def check(entry: Entry, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small models: a second thread costs more than it does
    model = entry.make_model().to(dtype)
    batches = in_dtype(entry.make_batches(), dtype)
    fisher = limpet.diagonal_fisher(model, batches, loss=entry.loss)
    assert_exact(fisher, definition(model, batches, entry.loss), dtype)
    slow = [name for name, route in fisher.routes.items() if route == "per_sample"]
    late = [name for name in slow if any(fnmatchcase(name, pattern) for pattern in entry.expected_routes or ())]
    assert not late, f"per sample: {late}"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_agrees_with_the_definition(entry: Entry, dtype: torch.dtype) -> None:
    check(entry, dtype)


def test_names_are_unique() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
