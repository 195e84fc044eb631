"""What the fused optimizers refuse: by name, and before anything has changed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from limpet import optim


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (optim.AdamW, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (optim.AdamW, {"lr": float("nan")}, "Invalid learning rate: nan"),
        (optim.AdamW, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        (optim.AdamW, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        (optim.AdamW, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        (optim.AdamW, {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        (optim.AdamW, {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        (optim.AdamW, {"foreach": True}, "foreach=True"),
        (optim.AdamW, {"fused": False}, "fused=False"),
        (optim.AdamW, {"differentiable": True}, "differentiable=True"),
        (optim.SGD, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (optim.SGD, {"momentum": -1.0}, "Invalid momentum value: -1.0"),
        (optim.SGD, {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        (optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ],
    ids=str,
)
def test_settings(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(2))], **options)


def test_a_refused_group_is_not_added():
    optimizer = optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="Invalid learning rate: -2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -2})
    with pytest.raises(TypeError, match="must be float32, float64, bfloat16 or float16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_by_name():
    table, other = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2)
    params = [*(("other." + name, p) for name, p in other.named_parameters()), ("table", table.weight)]
    optimizer = optim.SGD(params, lr=0.1)
    other(table(torch.tensor([1]))).sum().backward()
    before = other.weight.clone()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'table' must be dense.*sparse"):
        optimizer.step()
    assert torch.equal(other.weight, before)


def test_moments_that_no_longer_fit():
    param = nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([param])
    param.grad = torch.ones(2)
    optimizer.step()
    param.data = torch.ones(3)
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"exp_avg of params\[0\] of its group must be like the parameter"):
        optimizer.step()
    assert param.eq(1).all()


class Penalty:
    def __init__(self, model, anchors=None, strength=1.0):
        self.model, self.anchors, self.strength = model, anchors or {}, strength

    def quadratic(self):
        return self.anchors, self.anchors, self.strength


class Integrating(Penalty):
    def __init__(self, model):
        super().__init__(model)
        self.integrals = {}


def test_regularizers():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="regularizers must be a list or tuple"):
        optim.AdamW(model.parameters(), regularizers=Penalty(model))
    with pytest.raises(TypeError, match=r"regularizers\[1\].model must be a module"):
        optim.AdamW(model.parameters(), regularizers=[Penalty(model), 3])
    with pytest.raises(TypeError, match=r"regularizers\[0\].model must be a module"):
        optim.AdamW(model.parameters(), regularizers=[Penalty(None)])
    with pytest.raises(TypeError, match=r"regularizers\[0\] must have a method quadratic"):
        optim.AdamW(model.parameters(), regularizers=[SimpleNamespace(model=model)])
    with pytest.raises(ValueError, match=r"regularizers\[0\].model shares no parameter"):
        optim.AdamW(model.parameters(), regularizers=[Penalty(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match=r"at most one of regularizers may have path integrals"):
        optim.AdamW(model.parameters(), regularizers=[Integrating(model), Integrating(model)])


@pytest.mark.parametrize(
    ("anchors", "strength", "error", "message"),
    [
        ({"weight": torch.ones(3)}, 1.0, ValueError, "anchor of 'weight' must fit"),
        ({"weight": torch.ones(2, 2).double()}, 1.0, ValueError, "anchor of 'weight' must fit"),
        ({"weight": torch.ones(2, 2).int()}, 1.0, ValueError, "anchor of 'weight' must fit"),
        ({"gone": torch.ones(2, 2)}, 1.0, RuntimeError, r"the model of regularizers\[0\] has no parameter 'gone'"),
        ({}, float("inf"), ValueError, r"strength of regularizers\[0\] must be finite"),
    ],
    ids=str,
)
def test_regularizers_whose_tensors_do_not_fit(anchors, strength, error, message):
    model = nn.Linear(2, 2)
    optimizer = optim.AdamW(model.parameters(), regularizers=[Penalty(model, anchors, strength)])
    model(torch.ones(2)).sum().backward()
    before = model.weight.clone()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(model.weight, before)
