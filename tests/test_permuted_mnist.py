"""Permuted MNIST: each task has the digits' pixels in an order of its own."""

import dataclasses
import os

import pytest
import torch

from limpet import EWC, SynapticIntelligence
from limpet.scenarios import datasets, runner, streams
from limpet.scenarios.models import ProgressiveMLP

FULL = os.environ.get("LIMPET_DATA")
TASKS = 5


def permuted(dataset, setting):
    """Task-incremental with a head for each task, or domain-incremental with one for all."""
    whole = streams.split(dataset, num_tasks=1, setting="domain").tasks[0]
    generator = torch.Generator().manual_seed(0)

    def shuffled(images, order):
        return images.flatten(1)[:, order].view_as(images)

    tasks = []
    for index in range(TASKS):
        order = torch.randperm(whole.images[0].numel(), generator=generator)
        test = dataclasses.replace(whole.test_batches, images=shuffled(whole.test_batches.images, order))
        tasks.append(
            dataclasses.replace(
                whole,
                index=index,
                name=f"permutation {index}",
                head=index if setting == "task" else 0,
                images=shuffled(whole.images, order),
                test_batches=test,
            )
        )
    return streams.Stream("permuted", setting, tuple(tasks), (10,) * (TASKS if setting == "task" else 1))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(FULL is None, reason="LIMPET_DATA does not name a folder with the full data sets")
def test_progressive_networks_beat_ewc_and_si():
    """In their published setting and with its strengths (van de Ven et al. 2022): one head for all tasks."""
    dataset = datasets.load("mnist", FULL)
    training = runner.Training(iterations=400, evaluations_per_task=1, consolidation_samples=6000)
    one_head = {
        "ewc": lambda model: EWC(model, 100.0),
        "si": lambda model: SynapticIntelligence(model, strength=10.0),
    }
    ewc, si = (r.matrix.average_accuracy() for r in runner.run(permuted(dataset, "domain"), one_head, training))
    columns = runner.run(permuted(dataset, "task"), {"progressive": ProgressiveMLP.beside}, training)[0].matrix
    assert columns.average_accuracy() > max(ewc, si)
    assert columns.forgetting() == 0.0
    assert min(ewc, si) > 0.8  # they were given a fair chance
