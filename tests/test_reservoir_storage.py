"""Where a buffer's rows lie: files that survive a killed process, page-locked memory."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ReservoirBuffer
from limpet.buffers import mapped


def rows(start, count):
    """Items that say their numbers in every byte that is compared."""
    numbers = torch.arange(start, start + count)
    return {"x": numbers.view(-1, 1, 1).expand(-1, 3, 5).float(), "y": (numbers, (numbers % 2).bool()), "none": numbers.new_empty(count, 0)}


def filled(batches, capacity=20, seed=3, **where):
    buffer, total = ReservoirBuffer(capacity, seed=seed, **where), 0
    for count in batches:
        buffer.add(rows(total, count))
        total += count
    return buffer


def assert_equal(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(map(torch.equal, mine.pop("fields"), theirs.pop("fields")))
    assert torch.equal(mine.pop("items"), theirs.pop("items"))
    assert mine == theirs


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 40))
def test_files_hold_what_memory_holds(tmp_path_factory, batches, capacity):
    path = tmp_path_factory.mktemp("buffer") / "new"
    buffer, expected = filled(batches, capacity, storage="mmap", path=path), filled(batches, capacity)
    assert_equal(buffer, expected)
    del buffer
    opened = ReservoirBuffer.open(path)
    assert_equal(opened, expected)
    for one in (opened, expected):
        one.add(rows(sum(batches), 33))
    assert_equal(opened, expected)
    assert [int(item["y"][0]) for item in opened] == expected.items.tolist()
    assert torch.equal(opened.sample(1)["x"], expected.sample(1)["x"])
    assert torch.equal(opened.sample_into(rows(0, 9))["x"], expected.sample_into(rows(0, 9))["x"])


def test_a_crash_at_any_line_leaves_the_batch_whole_or_not_at_all(tmp_path):
    """A copy of the folder after each line that an `add` runs is what a process killed there leaves."""
    buffer = filled([13], storage="mmap", path=tmp_path / "now")
    copies = []

    def at_each_line(frame, event, argument):
        if "buffers" not in frame.f_code.co_filename:
            return None
        if event == "line":
            copies.append(tmp_path / str(len(copies)))
            shutil.copytree(tmp_path / "now", copies[-1])
        return at_each_line

    previous = sys.gettrace()
    sys.settrace(at_each_line)
    try:
        buffer.add(rows(13, 40))  # free slots, and overwritten ones
    finally:
        sys.settrace(previous)
    before, after = filled([13]), filled([13, 40])
    assert_equal(buffer, after)
    seen, redone = [], 0
    for path in copies:
        state = torch.from_file(str(path / "2" / "state"), size=4, dtype=torch.int64)
        if state[2]:  # rows may be torn where the journal counts
            redone += 1
            slots = torch.from_file(str(path / "2" / "journal"), size=int(state[2]), dtype=torch.int64)
            torch.from_file(str(path / "2" / "rows.1"), shared=True, size=20 * 15).view(20, 15)[slots, 4:] = torch.nan
        opened = ReservoirBuffer.open(path)
        assert_equal(opened, before if opened.seen == 13 else after)
        seen.append(opened.seen)
    assert seen == sorted(seen)
    assert {*seen} == {13, 53}
    assert redone > 3


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_buffer(tmp_path):
    program = """
    import os, random, signal, sys, torch
    from itertools import accumulate
    from limpet import ReservoirBuffer
    torch.set_num_threads(1)
    SIZES = [random.Random(0).randrange(1, 90) for _ in range(800)]
    BOUNDS = [0, *accumulate(SIZES)]
    def rows(first, last):
        numbers = torch.arange(first, last)
        return numbers.unsqueeze(1).expand(-1, 500), numbers
    def go_on(buffer, report):
        for k in range(BOUNDS.index(buffer.seen), len(SIZES)):
            buffer.add(rows(BOUNDS[k], BOUNDS[k + 1]))
            report()
    ReservoirBuffer(64, seed=5, storage="mmap", path=sys.argv[1])
    kills, chance = 0, random.Random(1)
    while True:
        buffer = ReservoirBuffer.open(sys.argv[1])
        assert buffer.seen in BOUNDS, buffer.seen
        for x, number in buffer:
            assert (x == number).all(), (x, number)
        if buffer.seen == BOUNDS[-1]:
            break
        del buffer
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            go_on(ReservoirBuffer.open(sys.argv[1]), lambda: os.write(writer, b"+"))
            os._exit(0)
        os.close(writer)
        for _ in range(chance.randrange(1, 40)):
            os.read(reader, 1)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(reader)
    whole = ReservoirBuffer(64, seed=5)
    go_on(whole, lambda: None)
    assert torch.equal(whole.items, buffer.items)
    assert torch.equal(torch.stack([y for _, y in whole]), torch.stack([y for _, y in buffer]))
    print(kills)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "buffer")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 5
