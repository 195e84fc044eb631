"""Small columns for the tests of progressive networks, and networks grown from them."""

import torch
from torch import nn
from torch.nn import functional as F

from limpet import ProgressiveNetwork


def mlp(width=8, outputs=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def normalised(width=8):
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


def grown(factory=mlp, tasks="abc", **options):
    net = ProgressiveNetwork(factory, **options)
    for task in tasks:
        if net.tasks:
            net.freeze()
        net.add_column(task)
    return net


def train(net, task, steps=3):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(16, 5), task), torch.randint(3, (16,))).backward()
        optimizer.step()


def parts(column):
    return {name: tensor.clone() for name, tensor in column.state_dict().items()}
