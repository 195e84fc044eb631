"""Data sets and streams of tasks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from limpet.scenarios import datasets, make_subset, streams
from limpet.scenarios.idx import write_idx
from limpet.scenarios.models import MultiHeadMLP

FULL = os.environ.get("LIMPET_DATA")
needs_full = pytest.mark.skipif(not FULL, reason="LIMPET_DATA does not name a folder with mnist/ and fashion-mnist/")


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist-subset")


def test_the_subset_is_even_and_small(digits):
    assert torch.bincount(digits.train_labels).tolist() == [1000] * 10
    assert torch.bincount(digits.test_labels).tolist() == [200] * 10
    shipped = Path(datasets.__file__).parent / "data"
    assert sum(path.stat().st_size for path in shipped.iterdir()) <= 2_500_000
    assert "Yann LeCun" in (shipped / "ATTRIBUTION.md").read_text()
    rows = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(torch.unique(rows, dim=0)) >= 11_990  # disjoint, but for the few images that MNIST itself repeats


@needs_full
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_full_sets(name):
    dataset = datasets.load(name, FULL)
    assert dataset.train_images.shape == (60_000, 28, 28)
    assert dataset.test_images.shape == (10_000, 28, 28)
    assert torch.bincount(dataset.train_labels).min() > 5000


@needs_full
def test_the_subset_can_be_drawn_again(tmp_path):
    make_subset.main([str(Path(FULL) / "mnist"), str(tmp_path)])
    shipped = Path(datasets.__file__).parent / "data"
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (shipped / path.name).read_bytes()


def test_draw_is_even_disjoint_and_seeded():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10, dtype=np.uint8), 30))
    train, test = make_subset.draw(labels, 20, 5, seed=3)
    assert np.bincount(labels[train]).tolist() == [20] * 10
    assert np.bincount(labels[test]).tolist() == [5] * 10
    assert not set(train) & set(test)
    again = make_subset.draw(labels, 20, 5, seed=3)
    other = make_subset.draw(labels, 20, 5, seed=4)
    assert (train == again[0]).all()
    assert (train != other[0]).any()
    with pytest.raises(ValueError, match="class 0 must have 31 rows, got 30"):
        make_subset.draw(labels, 20, 11, seed=0)


def test_files_are_found_plain_and_zipped_here_and_below(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for part, suffix in (("train", ""), ("t10k", ".gz")):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", np.zeros((20, 4, 4), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(20, dtype=np.uint8) % 10)
    for data_dir in (folder, tmp_path):
        assert datasets.load("fashion-mnist", data_dir).test_images.shape == (20, 4, 4)
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"):
        datasets.load("mnist", tmp_path)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8))
    with pytest.raises(ValueError, match="expected labels from 0 to 9, got 19"):
        datasets.load("fashion-mnist", folder)


def test_bad_names():
    with pytest.raises(ValueError, match=r"name must be one of 'mnist-subset', .* got str 'cifar'"):
        datasets.load("cifar")
    with pytest.raises(ValueError, match="data_dir must name the folder that holds the IDX files of 'mnist', got None"):
        datasets.load("mnist")


@pytest.mark.parametrize(
    ("setting", "heads", "targets"),
    [("task", (2,) * 5, {0, 1}), ("domain", (2,), {0, 1}), ("class", (10,), {4, 5})],
)
def test_settings(digits, setting, heads, targets):
    stream = streams.split(digits, setting=setting)
    task = stream.tasks[2]
    assert stream.heads == heads
    assert task.classes == (4, 5)
    assert set(task.targets.tolist()) == targets
    assert len(task.targets) == 2000
    assert task.test_batches.num_samples == 400
    assert list(stream.askable(2)) == ([0, 1, 2] if setting == "class" else [0, 1, 2, 3, 4])
    assert stream.outputs(2, 0) == {"task": (0, 2), "domain": (0, 2), "class": (0, 6)}[setting]


def test_order_depends_on_seed_task_and_epoch_alone(digits):
    one, two = (streams.split(digits, seed=5).tasks[1] for _ in range(2))
    other = streams.split(digits, seed=6).tasks[1]
    first = next(iter(one.batches(3)))[0]
    list(one.batches(0))  # what was drawn before does not matter
    torch.rand(3)
    assert torch.equal(first, next(iter(two.batches(3)))[0])
    assert not torch.equal(first, next(iter(two.batches(4)))[0])
    assert not torch.equal(first, next(iter(other.batches(3)))[0])
    images = torch.cat([x for x, _ in one.batches(1)])
    assert images.dtype == torch.float32
    assert images.shape == (2000, 1, 28, 28)
    assert 0 <= images.min() <= images.max() == 1
    assert one.batches(0, max_samples=300).num_samples == 300


def test_shuffled_classes_are_seeded(digits):
    orders = [[t.classes for t in streams.split(digits, shuffle_classes=True, seed=s).tasks] for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(c for classes in orders[0] for c in classes) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 3}, "num_tasks must divide the 10 classes of mnist-subset, got 3"),
        ({"setting": "online"}, "setting must be one of 'task', 'domain', 'class', got str 'online'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_splits(digits, options, message):
    with pytest.raises(ValueError, match=message):
        streams.split(digits, **options)


def test_heads():
    model = MultiHeadMLP(4, heads=[2, 3], hidden=[5])
    x = torch.randn(7, 2, 2)
    model.select(1, 2)
    assert torch.equal(model(x), model.heads[1](model.shared(x))[:, :2])
    with pytest.raises(ValueError, match=r"heads must be as wide as each other .* got \[2, 3\]"):
        model(x, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="head must be below 2, got 2"):
        model.select(2)
    with pytest.raises(ValueError, match="outputs must be at most 2, the width of head 0, got 3"):
        model.select(0, 3)


def test_rows_with_heads_of_their_own():
    model, x, heads = MultiHeadMLP(4, heads=[2, 2, 2], hidden=[5]), torch.randn(7, 2, 2), torch.arange(7) % 3
    outputs = model(x, heads)
    for row, head in enumerate(heads.tolist()):
        model.select(head)
        torch.testing.assert_close(outputs[row], model(x[row : row + 1])[0])
