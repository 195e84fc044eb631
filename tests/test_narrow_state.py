"""States of regularizers whose anchors and importances are held narrow."""

import copy

import pytest
import torch

from limpet import EWC
from narrow_methods import NARROWEST, batches, held, mlp, move, same
from saved_states import save_with_safetensors, save_with_torch

pytestmark = pytest.mark.usefixtures("one_thread")  # the networks are tiny


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors])
@pytest.mark.parametrize("formats", [("log8", "fixed16"), ("log8", "float32"), ("bfloat16", "float32")], ids=str)
def test_resumed_bit_for_bit(save, formats, tmp_path):
    model = mlp()
    names = dict(zip(("importance_format", "anchor_format"), formats, strict=True))
    ewc, other = EWC(model, 3.0, **names), EWC(model, 1.0)
    for _ in range(2):
        ewc.consolidate(batches())
        move(model)
    other.load_state_dict(save(ewc.state_dict(), tmp_path / "ewc"))
    copies = [other, copy.deepcopy(ewc)]
    copies[1].model = model
    data = batches()
    for method in (ewc, *copies):
        method.consolidate(data)
    for method in copies:
        assert method.penalty().item() == ewc.penalty().item()
        assert same(method.anchors, ewc.anchors)
        assert same(method.importances, ewc.importances)
    assert {t.dtype for t in other.importances.values()} == {t.dtype for t in ewc.importances.values()}


def test_a_float32_state_makes_a_narrow_regularizer_wide_again():
    """As strength and decay do, the formats come with the state."""
    model = mlp()
    wide, narrow = EWC(model, 3.0), EWC(model, 3.0, **NARROWEST)
    wide.consolidate(batches())
    assert wide.state_dict().keys().isdisjoint({"shapes", "anchor_format", "importance_format"})
    narrow.load_state_dict(wide.state_dict())
    assert not narrow.packed
    narrow.consolidate(batches())
    assert {t.dtype for t in held(narrow)} == {torch.float32}


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("shapes"), ValueError, r"state must have the keys \['anchor_format', 'importance_format', 'shapes'\]"),
        (lambda s: {**s, "anchor_format": "bfloat16"}, ValueError, "anchor_format must be one of 'float32', 'fixed16'"),
        (lambda s: {**s, "anchor_format": "split24"}, TypeError, r"\['anchors'\]\['0.weight'\] must be torch.uint8 as"),
        (lambda s: {**s, "importance_format": "float32"}, TypeError, r"'0.weight'\] must be torch.float32 as float32"),
        (lambda s: {**s, "shapes": {}}, ValueError, r"anchors and shapes of the same names, not so: \['0.bias'"),
        (lambda s: {**s, "shapes": 3}, TypeError, r"state\['shapes'\] must be a mapping"),
        (
            lambda s: {**s, "shapes": {**s["shapes"], "0.bias": torch.tensor([4])}},
            ValueError,
            r"state\['anchors'\]\['0.bias'\] must be of shape \[9\] to hold \[4\] as fixed16, got",
        ),
        (
            lambda s: {**s, "shapes": {**s["shapes"], "0.bias": torch.tensor([-4])}},
            ValueError,
            r"state\['shapes'\]\['0.bias'\] must hold the sizes of a shape",
        ),
        (lambda s: {**s, "tasks": []}, ValueError, "state must not have the key 'tasks' with importance_format='log8'"),
    ],
)
def test_a_bad_state_is_refused_before_anything_changes(change, error, message):
    ewc = EWC(mlp(), 5.0, **NARROWEST)
    ewc.consolidate(batches())
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=message):
        ewc.load_state_dict(change(before))
    after = ewc.state_dict()
    assert all(same(before[kind], after[kind]) for kind in ("anchors", "importances", "shapes"))
