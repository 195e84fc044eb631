"""Regularizers whose anchors and importances are held narrow, and how to look at them."""

import torch
from torch import nn

from limpet.methods.storage import ANCHOR_FORMATS, IMPORTANCE_FORMATS
from limpet.reference import dense_anchor, dense_importance

NARROWEST = {"importance_format": "log8", "anchor_format": "fixed16"}
NARROW = [(f, a) for f in IMPORTANCE_FORMATS for a in ANCHOR_FORMATS if (f, a) != ("float32", "float32")]


def mlp(hidden=40, outputs=3):
    """Its first weight has more elements than one block."""
    return nn.Sequential(nn.Linear(30, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def batches(outputs=3):
    return [(torch.randn(8, 30), torch.randint(outputs, (8,))) for _ in range(2)]


@torch.no_grad()
def move(model, by=0.1):
    for param in model.parameters():
        param.add_(by * torch.randn_like(param))


def held(method):
    return [*method.anchors.values(), *method.importances.values()]


def values(method):
    """Anchors and importances of each parameter as floats."""
    params = dict(method.model.named_parameters())
    return {
        name: (dense_anchor(method.anchors[name], p), dense_importance(method.importances[name], p))
        for name, p in params.items()
        if name in method.anchors
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
