"""Split MNIST with the published protocol, on the real images: docs/split-mnist.md and docs/replay-split-mnist.md."""

import json
import os

import pytest

from limpet import cli
from limpet.scenarios import datasets, runner, streams
from limpet.scenarios.models import ProgressiveMLP

FULL = os.environ.get("LIMPET_DATA")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(FULL is None, reason="LIMPET_DATA does not name a folder with the full data sets")
def test_ewc_and_si_keep_what_fine_tuning_forgets(tmp_path):
    """One seed and half of the published steps."""
    arguments = ["--dataset", "mnist", "--data", FULL, "--shuffle-classes", "--methods", "finetune,ewc,si"]
    protocol = ["--iterations", "1000", "--fisher-labels", "expected", "--strength", "1e5", "--si-strength", "10"]
    assert cli.main(["run", *arguments, *protocol, "--report", str(tmp_path)]) == 0
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    accuracy = {name: method["average_accuracy"] for name, method in methods.items()}
    assert accuracy["ewc"] >= 0.985
    assert accuracy["si"] >= 0.985
    assert accuracy["finetune"] < 0.97
    assert methods["ewc"]["bwt"] > -0.01 > methods["finetune"]["bwt"]
    assert methods["si"]["bwt"] > -0.015


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(FULL is None, reason="LIMPET_DATA does not name a folder with the full data sets")
@pytest.mark.parametrize("method", ["replay", "der++"])
def test_replay_keeps_classes_as_published(method, tmp_path):
    """Class-incremental, one seed and half of the published steps: the published 88.8 % less one point."""
    arguments = [
        "--dataset",
        "mnist",
        "--data",
        FULL,
        "--setting",
        "class",
        "--shuffle-classes",
        "--iterations",
        "1000",
    ]
    options = ["--all-outputs"] if method == "der++" else []
    assert cli.main(["run", *arguments, *options, "--methods", method, "--report", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())["methods"][method]
    assert result["average_accuracy"] >= 0.878


class Separate(ProgressiveMLP):
    """A network for each task: columns that read nothing."""

    def begin_task(self, task):
        super().begin_task(task)
        column = self.columns.columns[-1]
        column.prune(column.pairs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_progressive_networks_are_as_good_as_separate_ones():
    dataset = datasets.load("mnist-subset") if FULL is None else datasets.load("mnist", FULL)
    methods = {"progressive": ProgressiveMLP.beside, "separate": Separate.beside}
    training = runner.Training(iterations=500, evaluations_per_task=1)
    progressive, separate = (result.matrix for result in runner.run(streams.split(dataset), methods, training))
    assert progressive.average_accuracy() >= separate.average_accuracy() - 0.003
    assert progressive.forgetting() == separate.forgetting() == 0.0
