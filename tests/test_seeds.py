"""Several seeds in one run, and their means."""

import math

import pytest
import torch

from limpet.metrics import AccuracyMatrix
from limpet.scenarios import runner, seeds, streams
from limpet.scenarios.datasets import ImageDataset
from limpet.scenarios.runner import MethodResult, Training


def stream_of(seed):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 4, 4), generator=generator, dtype=torch.uint8)
    dataset = ImageDataset("tiny", images, torch.arange(40) % 4, images, torch.arange(40) % 4)
    return streams.split(dataset, num_tasks=2, batch_size=5, seed=seed)


def test_each_seed_is_a_run_of_its_own():
    methods = {"one": lambda model: None, "two": lambda model: None}
    seen = []
    results = seeds.run(stream_of, methods, Training(epochs=2), [3, 1], progress=seen.append)
    assert [(r.method, r.seed) for r in results] == [("one", 3), ("two", 3), ("one", 1), ("two", 1)]
    for seed, result in ((3, results[0]), (1, results[3])):
        (alone,) = runner.run(stream_of(seed), {"m": lambda model: None}, Training(epochs=2, seed=seed))
        assert torch.equal(result.matrix.values, alone.matrix.values)
    assert results[0].curve != results[2].curve
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert (seen[0].method, seen[-1].method) == ("one, seed 3", "two, seed 1")
    assert (seen[-1].fraction, seen[-1].seconds_left) == (1.0, 0.0)
    assert list(seeds.by_method(results)) == ["one", "two"]
    assert [r.seed for r in seeds.by_method(results)["two"]] == [3, 1]


@pytest.mark.parametrize("wrong", [[], [1, 1]])
def test_seeds_must_differ(wrong):
    with pytest.raises(ValueError, match="seeds must be at least one, each once, got"):
        seeds.run(stream_of, {"m": lambda model: None}, Training(), wrong)


def test_means():
    runs = []
    for seed, kept in enumerate((0.5, 0.7)):
        matrix = AccuracyMatrix(2)
        matrix.record([0.9, math.nan])
        matrix.record([kept, 1.0])
        curve = [(1.0, [0.9, math.nan]), (2.0, [kept, 1.0])]
        runs.append(MethodResult("m", matrix, curve, 1.0 + seed, 0.0, 0.0, [None, 5][seed], 42, seed))
    mean = seeds.mean(runs)
    assert mean.method == "m, mean of 2 seeds"
    assert mean.matrix.values[1].tolist() == pytest.approx([0.6, 1.0])
    assert math.isnan(mean.matrix.values[0, 1])
    assert mean.matrix.baseline is None
    assert mean.curve[1] == (2.0, pytest.approx([0.6, 1.0]))
    assert (mean.training_seconds, mean.peak_memory_bytes, mean.num_parameters) == (1.5, None, 42)
    assert seeds.mean(runs[:1]) is runs[0]


def test_mean_and_error():
    mean, error = seeds.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(seeds.mean_and_error([1.0])[1])
