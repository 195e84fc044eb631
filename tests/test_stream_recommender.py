"""The example that learns from Kafka, on librdkafka's mock broker: the real client and protocol, on the loopback."""

import re
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import limpet

kafka = pytest.importorskip("confluent_kafka")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import stream_recommender as example  # noqa: E402
from stream_kafka import Reader, Writer  # noqa: E402
from stream_world import PRODUCTS, USERS, World  # noqa: E402

ITEMS = 6000
SMALL = ["--items", str(ITEMS), "--every", "1024", "--capacity", "500"]
LIMITS = (USERS, PRODUCTS)


class StopAfter(threading.Event):
    """Set once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def run(*arguments, stop=None):
    return example.run(example.parse([*SMALL, *map(str, arguments)]), stop or threading.Event())


def rows_of(world):
    messages = b"".join(world.message(number) for number in range(world.messages))
    return torch.frombuffer(bytearray(messages), dtype=torch.int32).view(-1, 2)


def broker(messages):
    """A mock broker that holds these messages."""
    writer = Writer(lambda number: messages[number], len(messages), "interactions", None, 10)
    writer.write(len(messages))
    writer.flush()
    return writer


def read_all(reader, count):
    rows = [reader.read()]
    while sum(map(len, rows)) < count:
        rows.append(reader.read())
    return torch.cat(rows)


def assert_same_state(one, other):
    """Tensors and numbers in any nesting, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same_state(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def states(learners):
    return {
        name: {part: value.state_dict() for part, value in learner.parts().items()}
        for name, learner in learners.items()
    }


def test_the_whole_stream_is_learned_once_and_in_order(tmp_path, capsys):
    progress, learners = run("--mock", "--compare", "--plot", tmp_path / "stream.svg")
    replay = next(iter(learners.values())).replay
    assert progress.seen == ITEMS
    assert [seen for seen, _ in progress.curve] == [1024, 2048, 3072, 4096, 5120, ITEMS]
    shares = [share for _, accuracies in progress.curve for pair in accuracies.values() for share in pair]
    assert len(shares) == 6 * 2 * 2
    assert all(0.0 < share < 1.0 for share in shares)

    user, product = rows_of(World(ITEMS, 0)).T
    plain = limpet.ReservoirBuffer(500, seed=0)
    plain.add((user, product))
    assert torch.equal(plain.items, replay.buffer.items)
    assert_same_state(plain.state_dict()["fields"], replay.buffer.state_dict()["fields"])
    assert (tmp_path / "stream.svg").stat().st_size < 100_000
    assert re.search(r"6,000 items +[\d,]+ items/s", capsys.readouterr().out)


def test_the_buffer_can_be_filled_without_training():
    before = example.Learner(0, None).model.state_dict()
    progress, learners = run("--mock", "--observe-only", "--capacity", ITEMS)
    (learner,) = learners.values()
    assert not progress.curve
    assert_same_state(before, learner.model.state_dict())
    user, product = learner.replay.buffer.state_dict()["fields"]
    assert torch.equal(torch.stack([user, product], 1), rows_of(World(ITEMS, 0)))


def test_interactions_do_not_depend_on_how_messages_are_cut():
    rows = rows_of(World(3000, 1))
    cuts = np.sort(np.random.default_rng(0).integers(0, 3001, 40)).tolist()  # some messages are empty
    messages = [rows[a:b].numpy().tobytes() for a, b in zip([0, *cuts], [*cuts, 3000], strict=True)]
    with_broker = broker(messages)
    reader = Reader(with_broker.bootstrap, "interactions", {}, LIMITS, 10)
    assert torch.equal(read_all(reader, 3000), rows)
    assert len(reader.read(wait=0.02)) == 0
    assert reader.offsets == {0: 41}
    reader.consumer.close()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    _, whole = run("--mock")
    progress, _ = run("--mock", "--resume", tmp_path, stop=StopAfter(16))
    assert 0 < progress.seen < ITEMS
    assert len(progress.pending) > 0
    progress, resumed = run("--mock", "--resume", tmp_path)
    assert progress.seen == ITEMS
    assert_same_state(states(whole), states(resumed))


def test_written_read_in_two_parts_and_committed(tmp_path, capsys):
    server = broker([])
    topic = ["--bootstrap", server.bootstrap, "--topic", "other"]
    run(*topic, "--produce")
    assert "2 messages written to other" in capsys.readouterr().out
    run(*topic, "--resume", tmp_path, stop=StopAfter(10))
    progress, learners = run(*topic, "--resume", tmp_path)
    _, whole = run(*topic)
    assert_same_state(states(whole), states(learners))
    client = kafka.Consumer({"bootstrap.servers": server.bootstrap, "group.id": "limpet-other", "log_level": 2})
    (committed,) = client.committed([kafka.TopicPartition("other", 0)], timeout=10)
    assert {0: committed.offset} == progress.offsets == {0: 2}
    client.close()


def test_an_interrupt_saves_and_ends(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        return 0.5, 0.5

    monkeypatch.setattr(World, "accuracy", interrupt)
    assert example.main([*SMALL, "--mock", "--resume", str(tmp_path)]) == 130
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["seen"] == 1024
    assert signal.getsignal(signal.SIGINT) is before
    assert "1,024 items" in capsys.readouterr().out


@pytest.mark.parametrize("role", [[], ["--produce"]])
def test_brokers_that_cannot_be_reached(role, capsys):
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        assert example.main([*SMALL, "--bootstrap", address, "--timeout", "0.3", *role]) == 1
    assert f"no Kafka broker answered at {address} within 0.3 s" in capsys.readouterr().err


def test_brokers_that_go_away():
    server = broker([b"\0" * 8])
    reader = Reader(server.bootstrap, "interactions", {}, LIMITS, 0.2)
    assert len(read_all(reader, 1)) == 1
    del server
    with pytest.raises(ConnectionError, match="no Kafka broker answered"):
        read_all(reader, 1)
    reader.consumer.close()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"seven b", r"interactions\[0\]@1: 7 bytes are no whole number of interactions"),
        (np.int32([3, 4, 2000, 5]).tobytes(), r"below \[2000, 1000\], got \[2000, 5\]"),
        (np.int32([3, -4]).tobytes(), r"below \[2000, 1000\], got \[3, -4\]"),
    ],
)
def test_messages_that_hold_something_else(message, error):
    server = broker([b"\0" * 8, message])
    reader = Reader(server.bootstrap, "interactions", {}, LIMITS, 10)
    with pytest.raises(ValueError, match=error):
        read_all(reader, 3)
    reader.consumer.close()


def test_a_reader_that_lagged_behind():
    server = broker([bytes(900_000)] * 8)  # more than a mock broker keeps
    reader = Reader(server.bootstrap, "interactions", {0: 0}, LIMITS, 10)
    with pytest.raises(RuntimeError, match=r"no longer holds the messages that come next \({0: 0}\)"):
        read_all(reader, 1)
    reader.consumer.close()


def test_a_state_of_another_run_or_none_is_refused(tmp_path, capsys):
    run("--mock", "--resume", tmp_path, stop=StopAfter(3))
    assert example.main([*SMALL, "--mock", "--resume", str(tmp_path), "--seed", "1"]) == 1
    assert "--seed was 0" in capsys.readouterr().err
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert example.main([*SMALL, "--mock", "--resume", str(tmp_path)]) == 1
    assert "is no saved state, or not whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--mock", "--bootstrap", "x"], ["--mock", "--produce"], ["--mock", "--batch", "0"]]
)
def test_arguments_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert "usage" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_buffer_keeps_old_behaviour_and_new_is_learned(seed):
    arguments = ["--mock", "--compare", "--items", 2**19, "--capacity", 20_000, "--seed", seed, "--every", 2**16]
    progress, _ = run(*arguments)
    (old, new), (old_without, new_without) = progress.curve[-1][1].values()
    assert old > 0.75 > 0.3 > old_without
    assert min(new, new_without) > 0.95
