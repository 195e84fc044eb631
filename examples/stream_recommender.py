"""Learn what users like from interactions in Kafka, and keep it when the stream changes: see docs/stream.md.

python examples/stream_recommender.py --mock --compare --plot stream.svg          # a mock broker in this process
python examples/stream_recommender.py --bootstrap localhost:9092 --produce        # or: write the stream to Kafka,
python examples/stream_recommender.py --bootstrap localhost:9092 --resume state   # and learn from it

Reading and writing Kafka is in stream_kafka.py, the stream itself in stream_world.py.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from stream_kafka import BYTES, Reader, Writer
from stream_world import GROUPS, PRODUCTS, USERS, World
from torch import Tensor, nn
from torch.nn import functional as F

import limpet

KEPT = ("topic", "items", "seed", "batch", "capacity", "fraction", "compare", "observe_only")  # when a run is resumed


class TwoTower(nn.Module):
    """A user and a product match if their vectors point the same way."""

    def __init__(self, width: int = 64, temperature: float = 0.1) -> None:
        super().__init__()
        self.user_tower, self.product_tower = (
            nn.Sequential(nn.Embedding(n, width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for n in (USERS, PRODUCTS)
        )
        for tower in (self.user_tower, self.product_tower):
            nn.init.normal_(tower[0].weight, std=0.1)
        self.temperature = temperature

    def users(self, index: Tensor) -> Tensor:  # int [n] -> [n, width]
        return F.normalize(self.user_tower(index), dim=1)

    def products(self, index: Tensor) -> Tensor:  # int [n] -> [n, width]
        return F.normalize(self.product_tower(index), dim=1)

    def forward(self, user: Tensor, product: Tensor) -> Tensor:  # int [n] each
        """The loss: find each user's own product among a hundred or two of the batch (in-batch softmax)."""
        users, products = self.users(user), self.products(product)
        others = slice(None, None, max(1, len(user) // 128))
        own = (users * products).sum(1, keepdim=True)
        scores = torch.cat([own, users @ products[others].T], dim=1) / self.temperature
        same = F.pad(product[:, None] == product[others], (1, 0))  # the own product again is no wrong answer
        return F.cross_entropy(scores.masked_fill(same, -torch.inf), torch.zeros_like(user, dtype=torch.long))


class Learner:
    """A model that is trained on a stream, with or without a buffer."""

    def __init__(self, seed: int, replay: limpet.Replay | None, *, train: bool = True) -> None:
        torch.manual_seed(seed)
        self.model, self.replay, self.train = TwoTower(), replay, train
        self.optimizer = limpet.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.0)

    def learn(self, user: Tensor, product: Tensor) -> None:  # int32 [n] each
        if self.train:
            mixed = self.replay.mix(user, product) if self.replay is not None else (user, product)
            loss = self.model(*mixed)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.replay is not None:
            self.replay.observe(user, product)

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:  # [USERS, width], [PRODUCTS, width]
        return self.model.users(torch.arange(USERS)), self.model.products(torch.arange(PRODUCTS))

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "replay": self.replay}
        return {name: part for name, part in parts.items() if part is not None}


@dataclass
class Progress:
    """How far a run has come. Saved together with the learners, it makes every interaction count exactly once."""

    seen: int = 0  # interactions learned from
    offsets: dict[int, int] = field(default_factory=dict)  # of each partition: the message to be read next
    pending: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int32))  # read, not learned from
    curve: list[tuple[int, dict[str, tuple[float, float]]]] = field(default_factory=list)  # accuracies on the way


class Meter:
    """One line that says where a run is and how fast: in place on a terminal, now and then in a log."""

    def __init__(self, seen: int) -> None:
        self.first = self.seen = seen
        self.start = self.time = time.perf_counter()
        self.live = sys.stdout.isatty()

    def show(self, seen: int, accuracies: dict[str, tuple[float, float]], *, last: bool = False) -> None:
        now = time.perf_counter()
        if not last and now - self.time < (0.2 if self.live else 2.0):
            return
        since, start = (self.first, self.start) if last else (self.seen, self.time)
        speed = (seen - since) / max(now - start, 1e-9)
        text = "".join(f"   {name}: old {old:.3f}, new {new:.3f}" for name, (old, new) in accuracies.items())
        print(
            f"{seen:13,} items  {speed:11,.0f} items/s{text}", end="\r" if self.live and not last else "\n", flush=True
        )
        self.seen, self.time = seen, now


def learn(
    learners: dict[str, Learner],
    reader: Reader,
    progress: Progress,
    *,
    items: int,
    batch: int,
    feed: Callable[[], None] = lambda: None,
    checkpoint: Callable[[], None] = lambda: None,
    every: int = 0,
    evaluate: Callable[[Learner], tuple[float, float]],
    stop: threading.Event,
) -> None:
    """Read and learn until ``items`` were seen or ``stop`` is set.

    Batches are cut at multiples of ``batch``, wherever messages end, so that a resumed run goes on as if it had not
    been stopped.
    """
    meter = Meter(progress.seen)
    accuracies = progress.curve[-1][1] if progress.curve else {}
    while progress.seen < items and not stop.is_set():
        feed()
        progress.pending = torch.cat([progress.pending, reader.read()])
        while (count := min(batch, items - progress.seen)) and count <= len(progress.pending) and not stop.is_set():
            user, product = progress.pending[:count].T
            for learner in learners.values():
                learner.learn(user, product)
            progress.pending = progress.pending[count:]
            before, progress.seen = progress.seen, progress.seen + count
            if every and (before // every < progress.seen // every or progress.seen == items):
                accuracies = {name: evaluate(learner) for name, learner in learners.items()}
                progress.curve.append((progress.seen, accuracies))
                checkpoint()
            meter.show(progress.seen, accuracies)
    meter.show(progress.seen, accuracies, last=True)
    checkpoint()


def save(folder: Path, settings: dict[str, Any], progress: Progress, learners: dict[str, Learner]) -> None:
    """One file for all, written beside and renamed: model, buffer and offsets always belong together."""
    state = {
        "settings": settings,
        "progress": {**vars(progress), "pending": progress.pending.clone()},
        "learners": {
            name: {part: value.state_dict() for part, value in learner.parts().items()}
            for name, learner in learners.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".state.pt.tmp"
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / "state.pt")


def load(folder: Path, settings: dict[str, Any], learners: dict[str, Learner]) -> Progress:
    """Take over what was saved, if anything was."""
    path = folder / "state.pt"
    if not path.exists():
        return Progress()
    try:
        state = torch.load(path, weights_only=True)
        saved = state["settings"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--resume: {path} is no saved state, or not whole: {error}") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} was {saved.get(name)} in {path}, got {value}")
    for name, learner in learners.items():
        for part, value in learner.parts().items():
            value.load_state_dict(state["learners"][name][part])
    return Progress(**state["progress"])


def draw(path: Path, progress: Progress, items: int) -> None:
    """Accuracy on old and on new products over the stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for which, (title, axes) in enumerate(zip(("old behaviour", "new behaviour"), panels, strict=True)):
        for name, color in zip(progress.curve[0][1], ("#0072B2", "#D55E00"), strict=False):
            points = [(seen / 1000, 100 * accuracies[name][which]) for seen, accuracies in progress.curve]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, label=name)
        axes.axvline(items / 2000, color="#999999", linewidth=1, linestyle="--")
        axes.axhline(100 * 2 / GROUPS, color="#bbbbbb", linewidth=1, linestyle=":")
        axes.set(title=title, xlabel="interactions (thousands)", ylim=(0, 103), xlim=(0, items / 1000))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("liked among the first ten (%)")
    panels[0].text(items / 2000, 3, " other products come", color="#777777", fontsize=8)
    panels[0].text(items / 8000, 100 * 2 / GROUPS + 1, "chance", color="#777777", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def run(arguments: argparse.Namespace, stop: threading.Event) -> tuple[Progress, dict[str, Learner]]:
    """Write the stream, or learn from it, or both."""
    torch.set_num_threads(1)  # enough for matrices so small, and Kafka's client has threads of its own
    world = World(arguments.items, arguments.seed)
    writer = None
    if arguments.mock or arguments.produce:
        writer = Writer(world.message, world.messages, arguments.topic, arguments.bootstrap, arguments.timeout)
    if arguments.produce and writer:
        for number in range(world.messages):
            if stop.is_set():
                break
            writer.write(number + 1)
        writer.flush()
        print(f"{writer.written:,} messages written to {arguments.topic}")
        return Progress(), {}

    train = not arguments.observe_only
    replay = limpet.Replay(arguments.capacity, fraction=arguments.fraction, seed=arguments.seed)
    learners = {f"with a buffer of {arguments.capacity:,}": Learner(arguments.seed, replay, train=train)}
    if arguments.compare:
        learners["without"] = Learner(arguments.seed, None, train=train)
    settings = {name: getattr(arguments, name) for name in KEPT}
    progress = load(arguments.resume, settings, learners) if arguments.resume else Progress()

    def feed() -> None:
        if writer:  # 2 MB ahead of the reader, well within what a mock broker keeps
            position = progress.offsets.get(0, 0)
            writer.write(position + 2**21 // (world.per_message * BYTES), since=position)

    def checkpoint() -> None:
        if arguments.resume:
            save(arguments.resume, settings, progress, learners)
            reader.commit()

    feed()
    if writer:
        writer.flush()
    bootstrap = writer.bootstrap if writer else arguments.bootstrap
    reader = Reader(bootstrap, arguments.topic, progress.offsets, (USERS, PRODUCTS), arguments.timeout)
    try:
        learn(
            learners,
            reader,
            progress,
            items=arguments.items,
            batch=arguments.batch,
            feed=feed,
            checkpoint=checkpoint,
            every=arguments.every if train else 0,
            evaluate=lambda learner: world.accuracy(*learner.vectors()),
            stop=stop,
        )
    finally:
        reader.consumer.close()
    if arguments.plot and progress.curve:
        draw(arguments.plot, progress, arguments.items)
    return progress, learners


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn from a stream of interactions in Kafka, with replay.")
    broker = parser.add_mutually_exclusive_group(required=True)
    broker.add_argument("--mock", action="store_true", help="bring a mock broker and write the stream to it")
    broker.add_argument("--bootstrap", metavar="HOST:PORT", help="Kafka brokers")
    parser.add_argument("--produce", action="store_true", help="write the stream to --bootstrap instead of reading it")
    parser.add_argument("--topic", default="interactions")
    parser.add_argument(
        "--items", type=positive, default=2**19, help="interactions in the stream; its middle is the change"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=positive, default=256, help="new interactions in a step")
    parser.add_argument("--capacity", type=int, default=20_000, help="interactions in the buffer")
    parser.add_argument("--fraction", type=float, default=0.2, help="replayed ones' share of a step's batch")
    parser.add_argument("--compare", action="store_true", help="train a second model without the buffer beside it")
    parser.add_argument("--observe-only", action="store_true", help="fill the buffer and train nothing")
    parser.add_argument("--every", type=int, default=2**14, help="interactions between evaluations; 0: none")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="picture of the accuracies")
    parser.add_argument("--resume", metavar="DIR", type=Path, help="save the state there, and go on from it")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds until brokers count as unreachable")
    options = parser.parse_args(arguments)
    if options.produce and options.mock:
        parser.error("--produce needs --bootstrap: a mock broker ends with its process")
    if options.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'limpet[cli]'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(options, stop)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 130 if stop.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
