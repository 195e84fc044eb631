"""A selector says of which task a sample is."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from columns import grown, mlp
from limpet import ProgressiveNetwork
from limpet.scenarios import datasets, streams

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = "abc"
CENTRES = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 3


def samples(task, count=60, seed=1):
    """Three classes of a task, around centres of their own."""
    generator = torch.Generator().manual_seed(seed + TASKS.index(task))
    labels = torch.randint(3, (count,), generator=generator)
    return CENTRES[3 * TASKS.index(task) + labels] + 0.3 * torch.randn(count, 5, generator=generator), labels


def selecting(tasks=TASKS, learned=TASKS, **options):
    net = grown(tasks=tasks, infer="selector", **options)
    net.freeze()
    for task in learned:
        net.learn_selector([samples(task)], task)
    return net


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_samples_of_mixed_tasks_are_answered_by_their_columns(lateral):
    net = selecting(lateral=lateral)
    x = torch.cat([samples(task, seed=9)[0] for task in TASKS])
    want = [task for task in TASKS for _ in range(60)]
    chosen = net.infer_task(x)
    assert sum(a == b for a, b in zip(chosen, want, strict=True)) >= 0.97 * len(want)
    of_task = {task: net(x, task) for task in TASKS}
    assert torch.equal(net(x), torch.stack([of_task[task][n] for n, task in enumerate(chosen)]))
    assert net.infer_task(x[60:120]) == chosen[60:120]


def test_it_is_the_discriminant_of_all_classes():
    """From all deviations at once, in float64; batches make no difference."""
    net = selecting(learned="")
    rows, classes = [], []
    for task in TASKS:
        x, y = samples(task)
        net.learn_selector(list(zip(x.split(7), y.split(7), strict=True)), task)
        _, kept = net.columns[0](x, {})
        rows.append(torch.cat(kept, 1).double())
        classes.append(y + 3 * TASKS.index(task))
    z, c = torch.cat(rows), torch.cat(classes)
    means = torch.stack([z[c == k].mean(0) for k in range(9)])
    n, size = len(z) - 9, z.shape[1]
    s = (z - means[c]).T @ (z - means[c]) / n
    square, trace = (s @ s).trace(), s.trace()
    rho = ((1 - 2 / size) * square + trace**2) / ((n + 1 - 2 / size) * (square - trace**2 / size))
    s = (1 - rho) * s + rho * trace / size * torch.eye(size, dtype=torch.float64)
    score = z @ torch.linalg.inv(s) @ means.T - 0.5 * (means @ torch.linalg.inv(s) * means).sum(1)
    want = score.view(-1, 3, 3).logsumexp(2).argmax(1)
    x = torch.cat([samples(task)[0] for task in TASKS])
    assert net.infer_task(x) == [TASKS[k] for k in want.tolist()]
    order = net.selector.column * 3 + torch.cat([torch.tensor(list(dict.fromkeys(seen(t)))) for t in TASKS])
    want_bias = (-0.5 * (means @ torch.linalg.inv(s) * means).sum(1))[order]
    torch.testing.assert_close(net.selector.bias, want_bias, rtol=1e-5, atol=0)


def seen(task):
    """A task's labels in the order in which batches of seven show them, sorted in each."""
    return [label for part in samples(task)[1].split(7) for label in part.unique().tolist()]


def test_one_sample_of_each_class_chooses_the_nearest():
    net = selecting(learned="")
    for task in TASKS:
        net.learn_selector([(CENTRES[3 * TASKS.index(task) :][:3], torch.arange(3))], task)
    assert net.infer_task(CENTRES) == [task for task in TASKS for _ in range(3)]


def test_saved_loaded_and_learned_on():
    net = selecting(learned="ab")
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    other = ProgressiveNetwork(mlp, infer="selector")
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for one in (net, other):
        one.learn_selector([samples("c")], "c")
    x = torch.cat([samples(task, seed=5)[0] for task in TASKS])
    assert torch.equal(other(x), net(x))
    for name, tensor in net.selector.state_dict().items():
        assert torch.equal(other.selector.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_network_that_is_cast_or_was(dtype):
    net, x = selecting(), torch.cat([samples(task, seed=5)[0] for task in TASKS])
    want = net.infer_task(x)
    cast = ProgressiveNetwork(mlp, infer="selector").to(dtype)
    cast.load_state_dict(net.state_dict())
    for one in (cast, net.to(dtype)):
        assert one.selector.weight.dtype == torch.float64
        found = one.infer_task(x.to(dtype))
        assert sum(a == b for a, b in zip(found, want, strict=True)) >= 0.97 * len(want)
    assert one(x.to(dtype)).dtype == dtype


def test_images():
    def images():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))

    net = grown(images, "ab", infer="selector", lateral_points=["0", "2"], lateral="sum")
    bright, dark = (torch.rand(30, 1, 5, 5) + level for level in (2.0, 0.0))
    for task, x in (("a", bright), ("b", dark)):
        net.learn_selector([(x, torch.zeros(30, dtype=torch.int64))], task)
    assert net.infer_task(torch.cat([dark[:3], bright[:2]])) == ["b", "b", "b", "a", "a"]


def test_split_mnist_without_tasks():
    """Barely trained columns: most images go to their own, where entropy sends a good half astray."""
    stream = streams.split(datasets.load("mnist-subset"))
    net = ProgressiveNetwork(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 2)), infer="selector"
    )
    for task in stream.tasks:
        net.add_column(task.index)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3)
        for x, y in task.train_batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x, task.index), y).backward()
            optimizer.step()
        net.freeze()
        net.learn_selector(task.train_batches, task.index)
    found = [torch.tensor(net.infer_task(x)) == t.index for t in stream.tasks for x, _ in t.test_batches]
    assert torch.cat(found).float().mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda: ([samples("a")], "a"), ValueError, "task must be one that the selector has not learned yet"),
        (lambda: ([samples("b")], "d"), ValueError, "task must be one that has a column"),
        (lambda: ([], "b"), ValueError, "batches must give at least one batch, got none"),
        (lambda: ([samples("b")[0]], "b"), TypeError, "batches must give pairs (inputs, labels)"),
        (lambda: ([(samples("b")[0], torch.zeros(60))], "b"), ValueError, "labels must be integers [60], got a torch"),
        (lambda: ([(samples("b")[0], torch.zeros(3).long())], "b"), ValueError, "labels must be integers [60]"),
        (lambda: ([(samples("b")[0] / 0, samples("b")[1])], "b"), ValueError, "must be finite"),
    ],
)
def test_what_cannot_be_learned_leaves_the_selector(arguments, error, words):
    net = selecting(learned="a")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=re.escape(words)):
        net.learn_selector(*arguments())
    for name, tensor in net.state_dict().items():
        assert not isinstance(tensor, torch.Tensor) or torch.equal(tensor, before[name]), name


def test_too_early():
    net = ProgressiveNetwork(mlp, infer="selector")
    x, y = samples("a")
    with pytest.raises(RuntimeError, match="has not learned"):
        net.infer_task(x)
    net.add_column("a")
    with pytest.raises(RuntimeError, match="first column, which is still being trained"):
        net.learn_selector([(x, y)], "a")
    net.freeze()
    net.add_column("b")
    net.learn_selector([(x, y)], "a")
    with pytest.raises(RuntimeError, match=re.escape("has not learned the tasks of columns [1]: learn_selector")):
        net(x)
    with pytest.raises(RuntimeError, match="infer must be 'selector', it is None"):
        grown(tasks="a").learn_selector([(x, y)], "a")
