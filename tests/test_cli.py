"""The command line, inside this process: what it prints, and when it refuses."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from limpet import EWC, cli

FULL = os.environ.get("LIMPET_DATA")
QUICK = ["run", "--epochs", "1", "--batch-size", "500", "--fisher-samples", "20"]


def test_run_prints_progress_and_tables_and_writes_the_report(tmp_path, capsys):
    folder = tmp_path / "report"
    assert cli.main([*QUICK, "--setting", "domain", "--seed", "3", "--report", str(folder)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert sum(line.startswith(("finetune: task ", "ewc: task ")) for line in lines) == 10
    assert lines[0].startswith("finetune: task 1/5 (0/1), epoch 1/1, loss ")
    assert lines[0].endswith(" left")
    for text in (
        "finetune: accuracy (%)",
        "ewc: accuracy (%)",
        "mnist-subset, domain-incremental",
        "BWT",
        "forgetting",
    ):
        assert text in out
    assert "\x1b" not in out
    numbers = json.loads((folder / "results.json").read_text())
    assert list(numbers["methods"]) == ["finetune", "ewc"]
    assert numbers["arguments"]["seed"] == 3
    assert numbers["seeds"] == [run["seed"] for run in numbers["methods"]["ewc"]["runs"]] == [3]
    assert numbers["training"]["consolidation_samples"] == 20


def test_run_with_synaptic_intelligence_forgets_less(tmp_path):
    arguments = ["run", "--epochs", "3", "--methods", "finetune,si", "--report", str(tmp_path)]
    assert cli.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert results["si"]["forgetting"] < 0.5 * results["finetune"]["forgetting"]


def test_run_with_replay_in_one_head(tmp_path):
    names = ["replay", "der", "der++", "replay-ewc", "replay-si"]
    arguments = [*QUICK, "--iterations", "2", "--setting", "class", "--all-outputs", "--buffer", "50"]
    assert cli.main([*arguments, "--methods", ",".join(names), "--report", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())["methods"]) == names


def test_replay_options_reach_the_methods():
    options = ["--buffer", "70", "--replay-fraction", "0.2", "--alpha", "0.3", "--beta", "0.7", "--batch-size", "40"]
    options = cli._parser().parse_args(["run", *options])
    torch.manual_seed(-1)
    model = torch.nn.Linear(2, 2)
    made = {name: cli._factory(name, options)(model) for name in ("replay", "der", "der++", "replay-si")}
    assert made["replay"].fraction == 0.2
    assert [type(part).__name__ for part in made["replay-si"].methods] == ["Replay", "SynapticIntelligence"]
    assert (made["der"].alpha, made["der"].beta, made["der"].batch_size) == (0.3, 0.0, 10)
    assert (made["der++"].alpha, made["der++"].beta) == (0.3, 0.7)
    buffers = [made["replay"].buffer, made["der"].buffer, made["replay-si"].methods[0].buffer]
    assert [(buffer.capacity, buffer.seed) for buffer in buffers] == [(70, 2**63 - 1)] * 3


def test_run_with_a_progressive_network_forgets_nothing(tmp_path, capsys):
    arguments = ["--methods", "progressive", "--iterations", "3", "--cache", "--report", str(tmp_path)]
    assert cli.main([*QUICK, *arguments]) == 0
    assert "earlier columns' features for 2000 images of task 8/9: 25600000 bytes\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())["methods"]["progressive"]
    assert result["bwt"] == result["forgetting"] == 0.0
    assert result["fwt"] is None
    assert result["task_parameters"] == sorted(set(result["task_parameters"]))


def test_run_with_several_seeds_shows_means(tmp_path, capsys):
    arguments = ["--iterations", "2", "--fisher-labels", "expected", "--seed", "4", "--seeds", "2", "--shuffle-classes"]
    assert cli.main([*QUICK, *arguments, "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"finetune, seed 5: task \d/5 \(\d/\d\), epoch 1/1, loss ", out)) == 5
    assert "task 5" in out
    assert "mean of 2 seeds" in out
    assert " ± " in out
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers["seeds"] == [4, 5]
    first, second = (run["tasks"] for run in numbers["methods"]["ewc"]["runs"])
    assert sorted("/".join(first).split("/")) == sorted("/".join(second).split("/")) == list("0123456789")
    assert first != second
    assert [task["name"] for task in numbers["stream"]["tasks"]] == [f"task {k}" for k in range(1, 6)]
    assert numbers["training"]["iterations"] == 2
    assert "Each task: 2 steps" in (tmp_path / "report.md").read_text()


def test_fisher_labels_reach_the_measurement(monkeypatch):
    asked = []
    monkeypatch.setattr(EWC, "consolidate", lambda self, batches, *, labels: asked.append(labels))
    assert cli.main([*QUICK, "--iterations", "1", "--methods", "ewc", "--fisher-labels", "sampled"]) == 0
    assert asked == ["sampled"] * 5


def test_run_shows_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main([*QUICK, "--methods", "finetune"]) == 0
    out = capsys.readouterr().out
    assert "━" in out
    assert "epoch 1/1" in out
    assert "consolidation" in out


@pytest.mark.skipif(FULL is None, reason="LIMPET_DATA does not name a folder with the full data sets")
def test_run_reads_a_full_data_set(capsys):
    arguments = ["run", "--dataset", "fashion-mnist", "--data", FULL, "--methods", "finetune"]
    assert cli.main([*arguments, "--epochs", "1", "--batch-size", "4000"]) == 0
    assert "fashion-mnist, task-incremental" in capsys.readouterr().out


def test_defaults_are_the_demo():
    options = cli._parser().parse_args(["run"])
    assert (options.dataset, options.setting, options.methods) == ("mnist-subset", "task", ["finetune", "ewc"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "data_dir must name the folder"),
        (["--dataset", "mnist", "--data", "nowhere"], "no train-images-idx3-ubyte"),
        (["--device", "warp"], "--device must name a device that answers, got 'warp'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--iterations", "0"], "iterations must be at least 1, got 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--lr", "0"], "learning_rate must be above 0"),
        (["--strength", "-1"], "strength must be finite and at least 0"),
        (["--methods", "si", "--si-strength", "-1"], "si_strength must be finite and at least 0"),
        (["--methods", "replay", "--buffer", "0"], "capacity must be at least 1, got 0"),
        (["--methods", "replay-ewc", "--replay-fraction", "1"], "fraction must be below 1, got 1.0"),
        (["--methods", "der", "--alpha", "-1"], "alpha must be finite and at least 0"),
        (["--methods", "der++", "--beta", "nan"], "beta must be finite"),
        (["--methods", "der", "--setting", "class"], "der compares logits, and needs --all-outputs"),
        (["--methods", "progressive", "--setting", "class"], "needs --setting task, got 'class'"),
        (["--report", __file__], "--report must name a folder"),
    ],
)
def test_mistakes_are_explained_in_one_line(capsys, arguments, message):
    assert cli.main(["run", *arguments]) == 1
    got = capsys.readouterr()
    assert got.err.startswith("limpet: error: ")
    assert got.err.count("\n") == 1
    assert message in got.err
    assert not got.out


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_without_the_extra_it_is_named_before_any_work(package, capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    assert cli.main([*QUICK, "--report", str(tmp_path / "report")]) == 1
    got = capsys.readouterr()
    assert f"needs {package}: pip install 'limpet[cli]'" in got.err
    assert not got.out


def test_importing_limpet_leaves_the_command_line_alone():
    unwanted = "{'limpet.cli', 'limpet.scenarios', 'rich', 'matplotlib'}"
    code = f"import sys, limpet; sys.exit(', '.join({unwanted} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)
