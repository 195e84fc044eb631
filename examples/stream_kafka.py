"""Interactions in and out of a Kafka topic: rows of two little-endian int32, any number of them in a message."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from torch import Tensor

BYTES = 8  # of an interaction


class Reader:
    """A topic's interactions, from given offsets on.

    Args:
        bootstrap: brokers, as ``"host:port,host:port"``.
        topic: all its partitions are read, each in its order.
        offsets: of each partition, the message to be read next; the beginning where it says none. Kept up to date.
        limits: users and products must be below these.
        timeout: seconds without any broker until that is an error.
    """

    def __init__(
        self, bootstrap: str, topic: str, offsets: dict[int, int], limits: tuple[int, int], timeout: float
    ) -> None:
        self.bootstrap, self.topic, self.offsets, self.timeout = bootstrap, topic, offsets, timeout
        self.limits = torch.tensor(limits, dtype=torch.int32)
        self.down_since: float | None = None
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"limpet-{topic}",  # offsets are committed for those who watch the lag
                "enable.auto.commit": False,  # but what counts are those saved with the model
                "auto.offset.reset": "error",  # messages that are gone are an error, not skipped in silence
                "fetch.wait.max.ms": 10,  # a mock broker always waits so long
                "error_cb": self._on_error,
                "log_level": 2,  # errors become exceptions here
            }
        )
        partitions = self._metadata().topics[topic].partitions
        if not partitions:
            raise ValueError(f"--topic must be a topic of {bootstrap}, got {topic!r}")
        self.consumer.assign([TopicPartition(topic, p, offsets.get(p, OFFSET_BEGINNING)) for p in partitions])

    def read(self, messages: int = 16, wait: float = 0.1) -> Tensor:  # int32 [n, 2]
        """What is there; nothing, if nothing comes within ``wait`` seconds."""
        values = []
        for message in self.consumer.consume(messages, wait):
            if (error := message.error()) is not None:
                self._raise(error)
            value, place = message.value() or b"", f"{self.topic}[{message.partition()}]@{message.offset()}"
            if len(value) % BYTES:
                raise ValueError(f"message {place}: {len(value)} bytes are no whole number of interactions")
            values.append(value)
            self.offsets[message.partition()] = message.offset() + 1
            self.down_since = None
        if self.down_since is not None and time.monotonic() - self.down_since > self.timeout:
            self._metadata()
            self.down_since = None  # they are back, only nothing is written
        data = bytearray().join(values)
        if not data:
            return torch.empty(0, 2, dtype=torch.int32)
        rows = torch.frombuffer(data, dtype=torch.int32).view(-1, 2)
        wrong = (rows < 0) | (rows >= self.limits)
        if wrong.any():
            pair = rows[wrong.any(1)][0].tolist()
            raise ValueError(
                f"[user, product] must be below {self.limits.tolist()}, got {pair} in {place} or just before"
            )
        return rows

    def commit(self) -> None:
        if self.offsets:
            offsets = [TopicPartition(self.topic, p, offset) for p, offset in self.offsets.items()]
            self.consumer.commit(offsets=offsets, asynchronous=True)

    def _metadata(self) -> Any:
        return _metadata(self.consumer, self.bootstrap, self.topic, self.timeout)

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN and self.down_since is None:
            self.down_since = time.monotonic()

    def _raise(self, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise RuntimeError(
                f"the topic no longer holds the messages that come next ({self.offsets or 'from its beginning'}): the "
                f"reader lagged behind its retention. Start without --resume, or keep messages longer. {error.str()}"
            )
        raise ConnectionError(f"reading {self.topic} from {self.bootstrap}: {error.str()}")


class Writer:
    """Writes messages to one partition, where their order is kept; without a broker it brings a mock one.

    librdkafka's mock broker lives in this process and speaks Kafka's protocol on the loopback. It keeps the last 5 MB.

    Args:
        message: gives the message of a number, counted from 0.
        messages: how many there are.
        topic: where they go.
        bootstrap: brokers; ``None`` for a mock one.
        timeout: seconds until brokers that do not answer are an error; a message may take a minute.
    """

    def __init__(
        self, message: Callable[[int], bytes], messages: int, topic: str, bootstrap: str | None, timeout: float
    ) -> None:
        self.message, self.messages, self.topic = message, messages, topic
        self.written, self.failed = 0, None
        broker: dict[str, Any] = {"bootstrap.servers": bootstrap} if bootstrap else {"test.mock.num.brokers": 1}
        self.producer = Producer(
            {
                **broker,
                "enable.idempotence": True,
                "linger.ms": 0,
                "message.timeout.ms": 60_000,
                "log_level": 2,
            }
        )
        brokers = _metadata(self.producer, bootstrap, None, timeout).brokers.values()
        self.bootstrap = bootstrap or ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def write(self, until: int, since: int = 0) -> None:
        """Write the messages up to this number; those before ``since`` empty: nobody reads them again."""
        while self.written < min(until, self.messages):
            value = self.message(self.written) if self.written >= since else b""
            try:
                self.producer.produce(self.topic, value, partition=0, on_delivery=self._on_delivery)
                self.written += 1
            except BufferError:  # the broker does not keep up
                self.producer.poll(0.1)
            self.producer.poll(0)
            self._check()

    def flush(self) -> None:
        self.producer.flush()  # ends: a message is delivered, or given up after a minute
        self._check()

    def _check(self) -> None:
        if self.failed is not None:
            raise ConnectionError(f"writing {self.topic} to {self.bootstrap}: {self.failed.str()}")

    def _on_delivery(self, error: KafkaError | None, _: Any) -> None:
        self.failed = self.failed or error


def _metadata(client: Any, bootstrap: str | None, topic: str | None, timeout: float) -> Any:
    """What the brokers say of themselves, which also shows that they are there."""
    try:
        return client.list_topics(timeout=timeout) if topic is None else client.list_topics(topic, timeout=timeout)
    except KafkaException as error:
        text = f"no Kafka broker answered at {bootstrap} within {timeout:g} s: {error.args[0].str()}"
        raise ConnectionError(text) from None
