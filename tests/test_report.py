import json
import re
import struct
import sys

import pytest
import torch

from limpet.metrics import AccuracyMatrix
from limpet.scenarios import environment, plots
from limpet.scenarios.datasets import ImageDataset
from limpet.scenarios.report import write_report
from limpet.scenarios.runner import MethodResult, Training
from limpet.scenarios.streams import split


def finished(setting="task"):
    """A stream of two tasks and what two methods did on it."""
    labels = torch.arange(4).repeat(3)
    images = torch.zeros(12, 2, 2, dtype=torch.uint8)
    stream = split(ImageDataset("tiny", images, labels, images, labels), num_tasks=2, setting=setting)
    results = []
    for name, kept in (("finetune", 0.5), ("ewc", 0.875)):
        unseen = 0.5 if setting != "class" else float("nan")
        matrix = AccuracyMatrix(2, baseline=[0.5, 0.25] if setting != "class" else None)
        matrix.record([0.9, unseen])
        matrix.record([kept, 1.0])
        curve = [(0.5, [0.7, unseen]), (1.0, [0.9, unseen]), (1.5, [0.6, 0.8]), (2.0, [kept, 1.0])]
        results.append(MethodResult(name, matrix, curve, 1.5, 0.25, 0.125, 3_000_000, 42, 7))
        results[-1].task_parameters, results[-1].task_seconds = [40, 1042], [1.0, 0.5]
    return stream, Training(seed=7), results


def test_numbers_and_pictures_are_there(tmp_path):
    folder = tmp_path / "deep" / "report"
    write_report(folder, *finished(), arguments={"epochs": 3})
    pictures = [f"accuracy-{kind}-{name}.png" for kind in ("curves", "matrix") for name in ("ewc", "finetune")]
    pictures += ["average-accuracy.png", "parameters-and-seconds.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*pictures, "report.md", "results.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["report"]  # no temporary folder is left

    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["arguments"] == {"epochs": 3}
    assert numbers["seeds"] == [7]
    assert numbers["environment"]["versions"]["torch"] == torch.__version__
    ewc = numbers["methods"]["ewc"]
    assert ewc["accuracy_matrix"] == [[0.9, 0.5], [0.875, 1.0]]
    assert ewc["average_accuracy"] == 0.9375
    assert ewc["bwt"] == pytest.approx(-0.025)
    assert ewc["fwt"] == pytest.approx(0.25)
    assert ewc["forgetting"] == pytest.approx(0.025)
    assert ewc["peak_memory_bytes"] == 3_000_000
    assert ewc["standard_errors"] == dict.fromkeys(["average_accuracy", "bwt", "fwt", "forgetting"])
    (run,) = ewc["runs"]
    assert run["seed"] == 7
    assert run["average_accuracy"] == 0.9375
    assert ewc["task_parameters"] == [40, 1042]
    assert ewc["task_seconds"] == run["task_seconds"] == [1.0, 0.5]
    assert run["curve"][-1] == {"tasks_trained": 2.0, "accuracies": [0.875, 1.0]}

    text = (folder / "report.md").read_text()
    assert "| ewc | 0.9375 | -0.0250 | +0.2500 | 0.0250 | 1.5 | 0.2 | 3.0 |" in text
    assert "| 2/3 | 0.8750 | 1.0000 | 1,042 | 0.5 |" in text
    assert "task-incremental: the task is known at test time" in text
    assert sorted(re.findall(r"\]\((.*\.png)\)", text)) == pictures
    for name in pictures:
        content = (folder / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 300


def test_what_was_not_evaluated_is_null_and_a_dash(tmp_path):
    stream, training, results = finished("class")
    results[0].peak_memory_bytes = None
    write_report(tmp_path, stream, training, results)
    method = json.loads((tmp_path / "results.json").read_text())["methods"]["finetune"]
    assert method["accuracy_matrix"] == [[0.9, None], [0.5, 1.0]]
    assert method["fwt"] is method["runs"][0]["baseline"] is method["peak_memory_bytes"] is None
    text = (tmp_path / "report.md").read_text()
    assert "| 0/1 | 0.9000 | – |" in text
    assert "class-incremental: one head over all classes" in text


def test_several_seeds_give_means_and_standard_errors(tmp_path):
    stream, training, results = finished()
    again = finished()[2]
    for result, kept in zip(again, (0.7, 0.725), strict=True):
        result.seed, result.training_seconds, result.peak_memory_bytes = 8, 2.5, 4_000_000
        result.matrix = AccuracyMatrix(2, baseline=[0.5, 0.25])
        result.matrix.record([0.8, 0.5])
        result.matrix.record([kept, 1.0])
    write_report(tmp_path, stream, training, [*results, *again])
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers["seeds"] == [7, 8]
    ewc = numbers["methods"]["ewc"]
    assert [run["seed"] for run in ewc["runs"]] == [7, 8]
    assert ewc["average_accuracy"] == pytest.approx((0.9375 + 0.8625) / 2)
    assert ewc["standard_errors"]["average_accuracy"] == pytest.approx(0.0375)  # half the difference of two
    assert ewc["forgetting"] == pytest.approx((0.025 + 0.075) / 2)
    assert ewc["accuracy_matrix"][1] == [pytest.approx(0.8), 1.0]
    assert (ewc["training_seconds"], ewc["peak_memory_bytes"]) == (2.0, 4_000_000)
    text = (tmp_path / "report.md").read_text()
    assert "seed 7, 8" in text
    assert "| ewc | 0.9000 ± 0.0375 | -0.0500 ± 0.0250 |" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", ["average_accuracy", "accuracy_matrix", "accuracy_curves"])
def test_an_interrupted_report_leaves_the_old_one(tmp_path, monkeypatch, at, error):
    folder = tmp_path / "report"
    write_report(folder, *finished())
    (folder / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(plots, at, interrupted)
    with pytest.raises(error):
        write_report(folder, *finished("domain"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_second_report_replaces_the_first(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    write_report(tmp_path, *finished())
    write_report(tmp_path, *finished("domain"))
    assert json.loads((tmp_path / "results.json").read_text())["stream"]["setting"] == "domain"
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_report_cannot_be_made_in_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_report(tmp_path / "file", *finished())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'limpet\[cli\]'"):
        write_report(tmp_path, *finished())
    assert not list(tmp_path.iterdir())


def test_the_commit_is_a_commit_or_unknown():
    commit = environment.source_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)


@pytest.mark.parametrize(
    ("origin", "commit"),
    [({"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "abc"), ({"url": "https://x"}, None)],
)
def test_the_commit_of_an_installation(tmp_path, monkeypatch, origin, commit):
    class Distribution:
        def read_text(self, name):
            return json.dumps(origin) if name == "direct_url.json" else None

    monkeypatch.setattr(environment.limpet, "__file__", str(tmp_path / "a" / "limpet" / "__init__.py"))
    monkeypatch.setattr(environment.importlib.metadata, "distribution", lambda name: Distribution())
    assert environment.source_commit() == commit
