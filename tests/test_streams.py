"""Streams, on images that carry their own label and row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limpet.scenarios.datasets import ImageDataset
from limpet.scenarios.streams import split


def coded_dataset(per_class=7, classes=10):
    """Images whose first pixel is their label and whose second is their row within the class."""
    labels = torch.arange(classes).repeat(per_class)
    images = torch.zeros(len(labels), 3, 3, dtype=torch.uint8)
    images[:, 0, 0] = labels
    images[:, 0, 1] = torch.arange(len(labels)) // classes
    return ImageDataset("coded", images, labels, images.clone(), labels.clone())


def true_labels(x):
    return (x[:, 0, 0, 0] * 255).round().long()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("setting", ["task", "domain", "class"])
def test_targets_and_heads(setting, shuffle):
    stream = split(coded_dataset(), setting=setting, seed=3, shuffle_classes=shuffle)
    order = [label for task in stream.tasks for label in task.classes]
    assert sorted(order) == list(range(10))
    assert (order == list(range(10))) != shuffle
    assert stream.heads == {"task": (2,) * 5, "domain": (2,), "class": (10,)}[setting]
    for task in stream.tasks:
        assert task.head == (task.index if setting == "task" else 0)
        assert task.outputs == (2 * (task.index + 1) if setting == "class" else 2)
        for batches in (task.train_batches, task.test_batches):
            for x, y in batches:
                first = 2 * task.index if setting == "class" else 0
                want = [first + task.classes.index(label) for label in true_labels(x).tolist()]
                assert y.tolist() == want


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
def test_all_outputs_from_the_first_task_on(setting):
    stream = split(coded_dataset(), setting=setting, all_outputs=True)
    assert [task.outputs for task in stream.tasks] == [10 if setting == "class" else 2] * 5
    assert stream.outputs(0, 0) == (0, stream.tasks[0].outputs)


@given(batch_size=st.integers(1, 20), epoch=st.integers(0, 3), seed=st.integers(0, 2**40))
def test_an_epoch_is_every_image_once_and_repeats_itself(batch_size, epoch, seed):
    task = split(coded_dataset(), batch_size=batch_size, seed=seed).tasks[1]
    batches = task.batches(epoch)
    first, again = list(batches), list(batches)
    assert len(first) == len(batches)
    assert batches.num_samples == 14
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    x = torch.cat([x for x, _ in first])
    rows = {(int(a * 255 + 0.5), int(b * 255 + 0.5)) for a, b in x[:, 0, 0, :2].tolist()}
    assert rows == {(label, row) for label in (2, 3) for row in range(7)}


def test_images_are_scaled_and_leave_the_stored_ones_alone():
    stream = split(coded_dataset())
    x, _ = next(iter(stream.tasks[4].train_batches))
    assert x.dtype == torch.float32
    assert x.shape[1:] == (1, 3, 3)
    assert x.max() == pytest.approx(9 / 255)
    assert stream.tasks[4].images.max() == 9


def test_max_samples_takes_the_first_of_the_order():
    task = split(coded_dataset(), batch_size=4).tasks[0]
    some = task.batches(0, max_samples=6)
    whole = torch.cat([x for x, _ in task.batches(0)])
    assert torch.equal(torch.cat([x for x, _ in some]), whole[:6])
    assert some.num_samples == 6


def test_a_class_without_test_images():
    whole = coded_dataset()
    kept = whole.test_labels != 4
    part = ImageDataset(
        "part", whole.train_images, whole.train_labels, whole.test_images[kept], whole.test_labels[kept]
    )
    with pytest.raises(ValueError, match=r"test images of each of the classes \(4, 5\)"):
        split(part)
