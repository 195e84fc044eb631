"""Where a buffer's rows lie: files that survive a killed process, page-locked memory."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ReservoirBuffer


def rows(start, count):
    """Items that say their numbers in every byte that is compared."""
    numbers = torch.arange(start, start + count)
    return {
        "x": numbers.view(-1, 1, 1).expand(-1, 3, 5).float(),
        "y": (numbers, (numbers % 2).bool()),
        "none": numbers.new_empty(count, 0),
    }


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


def copies_at_each_line(call, path):
    """Copies of the folder before each line that a call runs, one of each state: what a process killed there leaves."""
    copies, last = [], None

    def at_this_line():
        return {entry: entry.is_file() and entry.read_bytes() for entry in path.rglob("*")}

    def at_each_line(frame, event, argument):
        nonlocal last
        if "limpet/buffers/" not in frame.f_code.co_filename or "structure.py" in frame.f_code.co_filename:
            return None
        if event == "line" and (now := at_this_line()) != last:
            last = now
            copies.append(path.with_name(f"copy {len(copies)}"))
            shutil.copytree(path, copies[-1])
        return at_each_line

    previous = sys.gettrace()
    sys.settrace(at_each_line)
    try:
        call()
    finally:
        sys.settrace(previous)
    return copies


def test_a_crash_at_any_line_leaves_the_batch_whole_or_not_at_all(tmp_path):
    buffer = filled([13], storage="mmap", path=tmp_path / "now")
    copies = copies_at_each_line(lambda: buffer.add(rows(13, 40)), tmp_path / "now")
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


@pytest.mark.parametrize("change", ["shrink", "grow", "merge", "load", "begin"])
def test_a_crash_at_any_line_leaves_the_old_buffer_or_the_new_one(tmp_path, change):
    here = filled([18] if change != "begin" else [], storage="mmap", path=tmp_path / "now")
    expected = filled([18] if change != "begin" else [])
    other = filled([90], seed=4)

    def changed(buffer):
        {
            "shrink": lambda: buffer.resize(5),
            "grow": lambda: buffer.resize(90),
            "merge": lambda: buffer.merge(other),
            "load": lambda: buffer.load_state_dict(other.state_dict()),
            "begin": lambda: buffer.add(rows(0, 0)),
        }[change]()

    copies = copies_at_each_line(lambda: changed(here), tmp_path / "now")
    before = expected.state_dict()
    changed(expected)
    assert_equal(here, expected)
    assert here.storage == "mmap"
    kinds = set()
    for path in copies:
        opened = ReservoirBuffer.open(path)
        old = opened.capacity == before["capacity"] and opened.seen == before["seen"] and change != "begin"
        if old:
            assert torch.equal(opened.items, before["items"])
        elif change != "begin" or opened._structure is not None:
            assert_equal(opened, expected)
        kinds.add((opened.capacity, opened.seen, opened._structure is None))
    assert len(kinds) == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.uint8, torch.float64])
def test_dtypes(tmp_path, dtype):
    x = torch.randint(2, (30, 3)).to(dtype)
    buffer = ReservoirBuffer(7, storage="mmap", path=tmp_path)
    buffer.add(x[:11])
    buffer.add(x[11:])
    del buffer
    opened = ReservoirBuffer.open(tmp_path)
    assert torch.equal(torch.stack(list(opened)), x[opened.items])


def test_saved_flushed_and_loaded(tmp_path):
    buffer = filled([30], storage="mmap", path=tmp_path / "files")
    buffer.flush()
    buffer.save(tmp_path / "saved")
    loaded = ReservoirBuffer.load(tmp_path / "saved")
    assert loaded.storage == "device"
    assert_equal(loaded, buffer)
    buffer.load_state_dict(ReservoirBuffer(6, seed=1).state_dict())
    assert (len(buffer), buffer.capacity, len(ReservoirBuffer(6).items)) == (0, 6, 0)
    buffer.add(torch.arange(9))
    del buffer
    assert ReservoirBuffer.open(tmp_path / "files").seen == 9


def test_later_changes_of_a_batch_do_not_reach_the_files(tmp_path):
    x = torch.zeros(4, 2, requires_grad=True)
    buffer = ReservoirBuffer(4, storage="mmap", path=tmp_path)
    buffer.add(x)
    with torch.no_grad():
        x.fill_(1)
    assert (torch.stack(list(buffer)) == 0).all()
    assert not buffer.sample(2).requires_grad


@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_torchs_default_device_does_not_matter(tmp_path, storage):
    first, second = torch.arange(30), torch.arange(30, 50)
    where = {"storage": "mmap", "path": tmp_path} if storage == "mmap" else {}
    with torch.device("meta"):
        buffer = ReservoirBuffer(20, **where)
        buffer.add(first)
        other = ReservoirBuffer(20, seed=1)
        other.add(second)
        if storage == "mmap":
            del buffer
            buffer = ReservoirBuffer.open(tmp_path)
        buffer.merge(other)
        buffer.resize(15)
        mixed = buffer.sample_into(second)
    assert mixed[:20].tolist() == second.tolist()
    assert set(mixed[20:].tolist()) <= set(buffer.items.tolist())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "buffer.json").write_text("{"), "Expecting"),
        (lambda path: (path / "buffer.json").write_text("[]"), "list indices"),
        (lambda path: edit(path, format="another"), "its format is 'another'"),
        (lambda path: edit(path, capacity=21), "has 160 bytes instead of 168"),
        (lambda path: edit(path, rows=[["float99", []]]), "float99"),
        (lambda path: (path / "2" / "rows.1").write_bytes(b"1"), "rows.1 has 1 bytes"),
        (lambda path: (path / "2" / "rows.2").unlink(), "No such file"),
        (lambda path: (path / "2" / "state").write_bytes(b"\xff" * 32), "its state is damaged"),
        (lambda path: (path / "2" / "state").write_bytes(bytes([*[0] * 16, 9, *[0] * 15])), "its journal is cut"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, words):
    filled([20, 4], storage="mmap", path=tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"path must be the whole folder of a buffer.*{words}"):
        ReservoirBuffer.open(tmp_path)


def edit(path, **changes):
    header = json.loads((path / "buffer.json").read_text())
    (path / "buffer.json").write_text(json.dumps({**header, **changes}))


def test_folders_that_are_refused(tmp_path):
    buffer = filled([3], storage="mmap", path=tmp_path / "taken")
    with pytest.raises(RuntimeError, match="no other buffer has open"):
        ReservoirBuffer.open(tmp_path / "taken")
    with pytest.raises(ValueError, match="with a buffer in it: open"):
        ReservoirBuffer(3, storage="mmap", path=tmp_path / "taken")
    with pytest.raises(ValueError, match="with 'taken' in it"):
        ReservoirBuffer(3, storage="mmap", path=tmp_path)
    with pytest.raises(FileNotFoundError):
        ReservoirBuffer.open(tmp_path / "none")
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(buffer)
    with pytest.raises(RuntimeError, match="stays on the CPU: move the samples to meta"):
        buffer.to("meta")
    assert buffer.to("cpu") is buffer
    assert_equal(buffer, filled([3]))


def test_a_capacity_that_no_disk_holds(tmp_path):
    buffer = ReservoirBuffer(2**50, storage="mmap", path=tmp_path)
    with pytest.raises(ValueError, match=rf"capacity must fit {tmp_path}: \d+ bytes are asked for, \d+ are free"):
        buffer.add(torch.zeros(1, 100))
    assert (buffer.seen, len(buffer)) == (0, 0)
    del buffer
    assert ReservoirBuffer.open(tmp_path).seen == 0


def test_batches_unlike_the_first_leave_the_files_alone(tmp_path):
    buffer = filled([30], storage="mmap", path=tmp_path)
    with pytest.raises(TypeError, match=r"torch\.float32 in field 0"):
        buffer.add({**rows(30, 4), "x": torch.zeros(4, 3, 5).double()})
    pair = namedtuple("Pair", ["x", "y"])(torch.zeros(2), torch.zeros(2))
    other = ReservoirBuffer(3, storage="mmap", path=tmp_path / "other")
    with pytest.raises(TypeError, match="tuples, lists and dicts to be saved"):
        other.add(pair)
    assert len(other) == 0
    del buffer
    assert_equal(ReservoirBuffer.open(tmp_path), filled([30]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"storage": "disk"}, ValueError, "storage must be one of 'device', 'pinned', 'mmap', got str 'disk'"),
        ({"storage": "mmap"}, ValueError, "path must be given with storage='mmap'"),
        ({"path": "somewhere"}, ValueError, "path must be given with storage='mmap' and with no other"),
        ({"storage": "mmap", "path": "somewhere", "device": "cuda"}, ValueError, "device must be the CPU or None"),
    ],
)
def test_refused_settings(arguments, error, words):
    with pytest.raises(error, match=words):
        ReservoirBuffer(3, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device locks pages")
def test_page_locked_memory_needs_a_device():
    with pytest.raises(RuntimeError, match="storage='pinned' needs a CUDA device"):
        ReservoirBuffer(3, storage="pinned")


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_buffer(tmp_path):
    program = """
    import os, random, signal, sys, torch
    from itertools import accumulate
    from limpet import ReservoirBuffer
    torch.set_num_threads(1)
    SIZES = [random.Random(0).randrange(1, 90) for _ in range(400)]
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
        assert (buffer.items < buffer.seen).all()
        if len(buffer):
            x, number = (torch.stack(field) for field in zip(*buffer))
            assert torch.equal(number, buffer.items) and (x == number.unsqueeze(1)).all(), (x, number)
        if buffer.seen == BOUNDS[-1]:
            break
        del buffer
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            go_on(ReservoirBuffer.open(sys.argv[1]), lambda: os.write(writer, b"+"))
            os._exit(0)
        os.close(writer)
        for _ in range(chance.randrange(1, 30)):
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
