"""What all regularizers share, and their page of documentation."""

import copy
import re
from pathlib import Path

import pytest
import torch

import limpet
from si_training import backward, mlp, tasks
from tolerances import assert_close

PAGE = Path(__file__).parent.parent / "docs" / "regularizers.md"


def test_the_page_runs():
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["si"].num_steps == 1
    assert set(scope["numbers"]) == {"strength", "num_tasks", "constant", "num_steps", "damping"}
    assert "integrals.weight" in scope["tensors"]


METHODS = {
    "ewc": lambda model, optimizer: limpet.EWC(model, strength=2.0),
    "ewc_online": lambda model, optimizer: limpet.EWC(model, strength=2.0, decay=0.5),
    "si": lambda model, optimizer: limpet.SynapticIntelligence(model, optimizer, strength=1.0),
    "mas": lambda model, optimizer: limpet.MemoryAwareSynapses(model, strength=1.0),
    "rwalk": lambda model, optimizer: limpet.RWalk(model, optimizer, strength=1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_quadratic_is_the_penalty(name):
    """``strength / 2 * (sum F (theta - anchor)^2 + constant)``, whatever the method's own convention."""
    model, data = mlp(), tasks(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = METHODS[name](model, optimizer)
    assert method.quadratic() == ({}, {}, 2.0)
    for batches in data:
        for batch in batches:
            backward(model, batch, optimizer)
            optimizer.step()
        method.end_task(batches)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    anchors, importances, strength = method.quadratic()
    params = dict(model.named_parameters())
    value = sum((importances[n] * (params[n].detach() - anchors[n]).square()).sum() for n in params)
    assert_close(method.penalty(), 0.5 * strength * (value + method.constant))
    model.zero_grad()
    assert_close(method.add_penalty_grad_(), method.penalty().detach())
    for n, p in params.items():
        assert_close(p.grad, strength * importances[n] * (p.detach() - anchors[n]))
    again = copy.deepcopy(method)
    assert again.penalty().item() == method.penalty().item()
    assert repr(again) == repr(method)
    assert "num_tasks=2" in repr(again)
