"""The runner, its report and the command line, end to end."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import limpet
from limpet import cli
from limpet.buffers import memory
from limpet.scenarios import datasets, report, runner, streams
from limpet.scenarios.models import MultiHeadMLP, ProgressiveMLP


@pytest.fixture(scope="module")
def small():
    """A fifth of the subset."""
    whole = datasets.load("mnist-subset")
    parts = [getattr(whole, f"{part}_{kind}")[::5] for part in ("train", "test") for kind in ("images", "labels")]
    return datasets.ImageDataset("small", *parts)


def test_ewc_forgets_less_than_a_quarter_of_what_fine_tuning_does():
    """The demo's outcome, task-incremental: one head per task."""
    stream = streams.split(datasets.load("mnist-subset"), setting="task", seed=0)
    methods = {"finetune": lambda model: None, "ewc": lambda model: limpet.EWC(model, strength=1e6)}
    training = runner.Training(epochs=10, seed=0, evaluations_per_task=1)
    finetune, ewc = (result.matrix for result in runner.run(stream, methods, training))
    assert finetune.bwt() < -0.05
    assert ewc.bwt() > finetune.bwt() / 4
    assert ewc.average_accuracy() > finetune.average_accuracy()


class Recorder:
    """A method with every moment, and a list of those that were called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name in ("penalty", "network", "features"):
            raise AttributeError(name)

        def moment(*args):
            self.calls.append(name)
            return args if name == "mix" else None

        return moment


def test_the_moments_come_in_their_order(small):
    stream = streams.split(small, num_tasks=2, batch_size=500)
    method = Recorder()
    runner.run(stream, {"recorder": lambda model: method}, runner.Training(epochs=1))
    step = ["mix", "add_penalty_grad_", "project_grads_", "after_step", "observe"]
    steps = [step * len(task.train_batches) for task in stream.tasks]
    assert method.calls == ["begin_task", *steps[0], "end_task", "begin_task", *steps[1], "end_task"]


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
def test_what_is_observed_can_be_replayed(small, setting):
    """Images with their targets, and the outputs of the step; with the head of each where tasks have their own."""
    stream = streams.split(small, num_tasks=2, batch_size=500, setting=setting)
    kept, models = [], []

    class Keeper:
        def __init__(self, model):
            models.append(model)

        def mix(self, x, y):
            old_x, old_y = kept[-1][:2] if kept else (x, y)
            joined = tuple(map(torch.cat, zip(x, old_x, strict=True))) if setting == "task" else torch.cat([x, old_x])
            return joined, torch.cat([y, old_y])

        def observe(self, x, y, outputs):
            kept.append((x, y, outputs))

    runner.run(stream, {"keeper": Keeper}, runner.Training(epochs=1))
    first, last = kept[0], kept[-1]
    assert not last[2].requires_grad
    assert last[2].shape == (len(last[1]), {"task": 5, "domain": 5, "class": 10}[setting])
    if setting == "task":
        assert [heads.unique().tolist() for (_, heads), _, _ in (first, last)] == [[0], [1]]
        models[0].select(0)
        assert torch.equal(models[0](*first[0]), models[0](first[0][0]))


def test_a_progressive_network_takes_the_place_of_the_model_and_forgets_nothing(small):
    stream = streams.split(small, num_tasks=5, batch_size=100)
    training = runner.Training(epochs=1, seed=3, evaluations_per_task=2)
    (result,) = runner.run(stream, {"progressive": ProgressiveMLP.beside}, training)
    values = result.matrix.values
    for task in range(5):
        assert values[:task, task].isnan().all()  # there is no column yet
        assert (values[task:, task] == values[task, task]).all()
    assert result.matrix.bwt() == result.matrix.forgetting() == 0.0
    assert math.isnan(result.matrix.fwt())
    layers = 784 * 400 + 400 + 400 * 400 + 400 + 400 * 2 + 2
    lateral = [0, *(k * (2 * 400 * 400 + 2) + 400 * 400 + 400 * 2 for k in range(1, 5))]
    grown = [layers + added for added in lateral]
    assert result.task_parameters == [sum(grown[: k + 1]) for k in range(5)]
    assert result.num_parameters == sum(grown)
    assert sum(result.task_seconds) == pytest.approx(result.training_seconds)


def progressive(stream, cache):
    nets, said = [], []

    def make(model):
        nets.append(ProgressiveMLP.beside(model, cache=cache, say=said.append))
        return nets[-1]

    (result,) = runner.run(stream, {"progressive": make}, runner.Training(epochs=2, evaluations_per_task=1))
    return result, nets[0], said


@pytest.mark.usefixtures("one_thread")
def test_with_cached_features_a_progressive_network_learns_the_same(small):
    stream = streams.split(small, batch_size=100)
    (plain, net, silent), (cached, other, said) = (progressive(stream, cache) for cache in (False, True))
    for task, line in zip(stream.tasks[1:], said, strict=True):
        images = len(task.targets)
        nbytes = images * task.index * 2 * 400 * 4
        assert line == f"earlier columns' features for {images} images of task {task.name}: {nbytes} bytes"
    assert silent == []
    torch.testing.assert_close(cached.matrix.values, plain.matrix.values, equal_nan=True)
    torch.testing.assert_close(dict(other.named_parameters()), dict(net.named_parameters()), rtol=0, atol=1e-6)
    assert other.features(torch.arange(3)) is None  # the last task has ended


def test_features_that_do_not_fit_are_not_cached(small, monkeypatch):
    stream = streams.split(small, num_tasks=2, batch_size=500)
    monkeypatch.setattr(memory, "_free", lambda device: 99)
    result, _, (line,) = progressive(stream, cache=True)
    assert line.endswith("bytes are asked for, 99 are free")
    assert "; not cached: cached features must fit cpu: " in line
    assert result.matrix.num_learned == 2


def test_the_optimizer_keeps_the_state_of_what_stays(small):
    class Growing:
        """Adds a parameter in the second task, and freezes one."""

        def __init__(self, model):
            self.model, self.calls = model, 0

        def begin_task(self, task):
            if task.index == 1:
                self.model.extra = torch.nn.Parameter(torch.ones(3))
                self.model.heads[0].requires_grad_(False)

        def add_penalty_grad_(self):
            if hasattr(self.model, "extra"):
                self.model.extra.grad = torch.ones(3)

    stream = streams.split(small, num_tasks=2, batch_size=500)
    learner = runner._Learner(
        "growing",
        stream,
        model := MultiHeadMLP(784, [5, 5], [3]),
        Growing(model),
        runner.Training(epochs=1),
        runner._Clock(8, None),
    )
    first = model.shared[1].weight
    learner.learn()
    steps = {
        name: learner._optimizer.state[p]["step"].item() for name, p in model.named_parameters() if p.requires_grad
    }
    batches = len(stream.tasks[0].train_batches), len(stream.tasks[1].train_batches)
    assert learner._optimizer.state[first]["step"] == sum(batches)
    assert steps["extra"] == batches[1]
    assert "heads.0.weight" not in steps


def test_methods_see_the_same_start_and_data_and_runs_repeat(small):
    stream = streams.split(small, num_tasks=2)
    methods = {"one": lambda model: None, "two": lambda model: None}
    state = torch.random.get_rng_state()
    results = runner.run(stream, methods, runner.Training(epochs=2, seed=3))
    assert torch.equal(state, torch.random.get_rng_state())
    again = runner.run(stream, {"one": methods["one"]}, runner.Training(epochs=2, seed=3))
    other = runner.run(stream, {"one": methods["one"]}, runner.Training(epochs=2, seed=4))
    for result in [*results[1:], *again]:
        assert torch.equal(result.matrix.values, results[0].matrix.values)
    assert results[0].curve == again[0].curve
    assert not torch.equal(other[0].matrix.values, results[0].matrix.values)


def test_iterations_are_steps_through_as_many_epochs_as_they_take(small):
    stream = streams.split(small, batch_size=250)  # two batches an epoch
    method, seen = Recorder(), []
    training = runner.Training(epochs=50, iterations=5, evaluations_per_task=5)
    (result,) = runner.run(stream, {"recorder": lambda model: method}, training, progress=seen.append)
    assert method.calls.count("after_step") == 25
    assert [(p.task.index, p.epoch, p.num_epochs) for p in seen if p.epoch_ended] == [
        (task, epoch, 3) for task in range(5) for epoch in (1, 2, 3)
    ]
    assert seen[-1].fraction == 1.0
    assert [at for at, _ in result.curve] == pytest.approx([k / 5 for k in range(1, 26)])
    two_epochs, four_steps = (
        runner.run(stream, {"m": lambda model: None}, runner.Training(**length))[0]
        for length in ({"epochs": 2}, {"iterations": 4})
    )
    assert torch.equal(two_epochs.matrix.values, four_steps.matrix.values)


def test_a_penalty_is_added_to_the_loss(small):
    class Pull:
        def __init__(self, model):
            self.weight = model.shared[1].weight

        def penalty(self):
            return 1e4 * self.weight.square().sum()

    norms = {}

    def keep(name, make):
        def factory(model):
            norms[name] = model.shared[1].weight
            return make(model)

        return factory

    methods = {"plain": keep("plain", lambda model: None), "pull": keep("pull", Pull)}
    runner.run(streams.split(small, num_tasks=1), methods, runner.Training(epochs=3))
    assert norms["pull"].norm() < 0.9 * norms["plain"].norm()


def test_curves_end_in_the_rows_of_the_matrix(small):
    stream = streams.split(small, batch_size=100)
    (result,) = runner.run(stream, {"finetune": lambda model: None}, runner.Training(epochs=2, evaluations_per_task=4))
    points = [at for at, _ in result.curve]
    assert points == sorted(set(points))
    assert [math.ceil(at) for at in points] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    ends = torch.tensor([row for at, row in result.curve if at == int(at)], dtype=torch.float64)
    assert torch.equal(ends, result.matrix.values)
    assert result.num_parameters == 785 * 400 + 401 * 400 + 5 * 401 * 2


@pytest.mark.parametrize("setting", ["domain", "class"])
def test_other_settings(small, setting):
    stream = streams.split(small, setting=setting)
    (result,) = runner.run(stream, {"finetune": lambda model: None}, runner.Training(epochs=10))
    last = result.matrix.values[-1]
    assert last[-1] > 0.7  # the last task is known
    if setting == "class":
        assert last[:-1].max() < 0.25  # all before it is forgotten: every image is said to be of the last classes
        assert result.matrix.values[0, 1:].isnan().all()


@pytest.mark.parametrize("setting", ["task", "class"])
def test_what_is_replayed_is_kept(small, setting):
    torch.set_num_threads(1)
    stream = streams.split(small, num_tasks=2, setting=setting, batch_size=100, all_outputs=True)
    methods = {
        "replay": lambda model: limpet.Replay(200),
        "der": lambda model: limpet.DarkReplay(model, 200, batch_size=100),
        "hybrid": lambda model: limpet.Hybrid([limpet.Replay(200), limpet.EWC(model, 10.0)]),
    }
    for result in runner.run(stream, methods, runner.Training(epochs=6, evaluations_per_task=1)):
        assert result.matrix.values[-1].min() > 0.65, result.method
        assert result.matrix.values[0, 0] > 0.85, result.method


def test_progress_and_seconds(small):
    stream = streams.split(small, num_tasks=2)
    seen = []
    (result,) = runner.run(stream, {"m": lambda model: None}, runner.Training(epochs=2), progress=seen.append)
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert seen[-1].fraction == 1.0
    assert seen[-1].seconds_left == 0.0
    assert [(p.task.index, p.epoch) for p in seen if p.epoch_ended] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(p.loss > 0 and p.seconds_left >= 0 for p in seen)
    assert result.training_seconds > 0
    assert result.evaluation_seconds > 0
    assert result.consolidation_seconds == 0
    assert result.num_parameters == 785 * 400 + 401 * 400 + 2 * 401 * 5


def test_a_loss_that_is_not_finite_stops_the_run(small):
    class Broken:
        def __init__(self, model):
            self.model = model

        def penalty(self):
            return sum(p.sum() for p in self.model.parameters()) * math.nan

    stream = streams.split(small, num_tasks=2)
    with pytest.raises(RuntimeError, match="loss must be finite, got nan in task 1"):
        runner.run(stream, {"broken": Broken}, runner.Training(epochs=2))
    with pytest.raises(ValueError, match="methods must name at least one"):
        runner.run(stream, {})
    with pytest.raises(ValueError, match=r"learning_rate must be above 0, got -0\.1"):
        runner.Training(learning_rate=-0.1)


def test_report(small, tmp_path):
    stream = streams.split(small, num_tasks=2, setting="class")
    training = runner.Training(epochs=1)
    results = runner.run(stream, {"finetune": lambda model: None}, training)
    folder = tmp_path / "deep" / "report"
    report.write_report(folder, stream, training, results, {"seed": 0})
    names = {
        "report.md",
        "results.json",
        "average-accuracy.png",
        "parameters-and-seconds.png",
        "accuracy-matrix-finetune.png",
        "accuracy-curves-finetune.png",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "accuracy-matrix-finetune.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "results.json").read_text())
    method = numbers["methods"]["finetune"]
    assert method["average_accuracy"] == results[0].matrix.average_accuracy()
    assert method["accuracy_matrix"][0][1] is None
    assert numbers["arguments"] == {"seed": 0}
    assert numbers["environment"]["versions"]["torch"] == torch.__version__
    text = (folder / "report.md").read_text()
    assert "class-incremental" in text
    assert f"{results[0].matrix.average_accuracy():.4f}" in text


def test_an_interrupted_report_leaves_the_old_one(small, tmp_path, monkeypatch):
    stream = streams.split(small, num_tasks=2)
    results = runner.run(stream, {"finetune": lambda model: None}, runner.Training(epochs=1))
    report.write_report(tmp_path / "report", stream, runner.Training(), results)
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    monkeypatch.setattr("limpet.scenarios.plots.accuracy_curves", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path / "report", stream, runner.Training(), results)
    assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "limpet.cli", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_run_command(tmp_path):
    done = run_cli("run", "--epochs", "1", "--report", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    assert "finetune: task 1/5 (0/1), epoch 1/1, loss" in done.stdout
    assert "summary" in done.stdout
    assert "BWT" in done.stdout
    assert set(json.loads((tmp_path / "r" / "results.json").read_text())["methods"]) == {"finetune", "ewc"}


def test_info_command(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert limpet.__version__ in text
    assert "instruction set" in text
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["core"]["instruction_set"] in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--dataset", "mnist"], 1, "data_dir must name the folder"),
        (["run", "--dataset", "mnist", "--data", "nowhere"], 1, "no train-images-idx3-ubyte"),
        (["run", "--device", "cuda:99"], 1, "--device must name a device that answers, got 'cuda:99'"),
        (["run", "--epochs", "0"], 1, "epochs must be at least 1, got 0"),
        (["run", "--strength", "-1"], 1, "strength must be finite and at least 0, got -1.0"),
        (["run", "--methods", "ewc,magic"], 2, f"expected some of {','.join(cli.METHODS)}, each once, got 'ewc,magic'"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_arguments(arguments, code, message):
    done = run_cli(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_interrupted_run_leaves_no_report(tmp_path):
    command = [sys.executable, "-u", "-m", "limpet.cli", "run", "--epochs", "500", "--report", str(tmp_path / "r")]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background would not
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        assert "epoch 1/500" in process.stdout.readline()  # it is at work
        for _ in range(4):  # as a person would: torch may lose one that arrives while it loads a part of itself
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=20)
                break
    assert process.returncode == 130
    assert errors.strip() == "limpet: interrupted; no report was written"
    assert not (tmp_path / "r").exists()
