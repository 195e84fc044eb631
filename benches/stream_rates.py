"""Items per second of the stream's example, part by part: the table of docs/stream.md.

python benches/stream_rates.py

The mock broker, the writer and the reader are in one process. Messages are made beforehand, so that making them is not
timed, and go through the broker again and again.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

import limpet

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from stream_kafka import BYTES, Reader, Writer
from stream_recommender import Learner, Progress, learn
from stream_world import PRODUCTS, USERS, World

CAPACITY = 20_000
PER_MESSAGE = 4096


def through_kafka(name: str, learner: Learner, *, items: int, batch: int) -> None:
    """Write, read, decode and learn; say how fast, and where the learning thread spent its time."""
    world = World(2**18, 0, PER_MESSAGE)
    messages = [world.message(number) for number in range(world.messages)]
    ahead = 2**21 // (PER_MESSAGE * BYTES)
    writer = Writer(lambda number: messages[number % len(messages)], -(-items // PER_MESSAGE), "rates", None, 10)
    writer.write(ahead)
    writer.flush()
    progress, spent = Progress(), dict.fromkeys(("writing", "reading and decoding", "learning"), 0.0)
    reader = Reader(writer.bootstrap, "rates", progress.offsets, (USERS, PRODUCTS), 10)

    def timed(part, call):
        def timed_call(*arguments):
            start = time.perf_counter()
            result = call(*arguments)
            spent[part] += time.perf_counter() - start
            return result

        return timed_call

    feed = timed("writing", lambda: writer.write(progress.offsets.get(0, 0) + ahead))
    reader.read = timed("reading and decoding", reader.read)
    learner.learn = timed("learning", learner.learn)
    start = time.perf_counter()
    learn({name: learner}, reader, progress, items=items, batch=batch, feed=feed, evaluate=None, stop=threading.Event())
    seconds = time.perf_counter() - start
    reader.consumer.close()
    parts = ", ".join(f"{part} {share / seconds:.0%}" for part, share in spent.items())
    print(f"| {name}, batches of {batch:,} | {items / seconds / 1e6:.3g} | {parts} |", flush=True)


def reservoir_alone(batch: int) -> None:
    """The buffer by itself, from memory."""
    world = World(2**20, 0, 2**20)
    user, product = torch.frombuffer(bytearray(world.message(0)), dtype=torch.int32).view(-1, 2).T
    buffer, count = limpet.ReservoirBuffer(CAPACITY), 0
    start = time.perf_counter()
    while time.perf_counter() < start + 2.0:
        for first in range(0, len(user), batch):
            buffer.add((user[first : first + batch], product[first : first + batch]))
        count += len(user)
    rate = count / (time.perf_counter() - start)
    print(f"| the buffer alone, batches of {batch:,} | {rate / 1e6:.3g} | |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print("| what | million items a second | the learning thread's time |\n|---|---:|---|")
    for batch in (256, 4096, 65536):
        reservoir_alone(batch)
    for batch, items in ((256, 10_000_000), (4096, 40_000_000), (65536, 60_000_000)):
        filler = Learner(0, limpet.Replay(CAPACITY), train=False)
        through_kafka("Kafka to the buffer", filler, items=items, batch=batch)
    for batch, items in ((256, 150_000), (4096, 250_000)):
        for name, replay in (("with replay", limpet.Replay(CAPACITY, fraction=0.2)), ("without", None)):
            through_kafka(f"trained online {name}", Learner(0, replay), items=items, batch=batch)


if __name__ == "__main__":
    main()
