"""Ten thousand replies that no honest client would send: each is refused, or harmless; none ends the run."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.records import HelloReply, Reply
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.measure.ledger import Ledger
from tests.conftest import small
from tests.payloads import change_payload, put_array

EACH = 2500
ODD: tuple[Any, ...] = (0, -1, 1, 2**62, -(2**62), 1e308, -1e308, float("nan"), float("inf"), 1e-320, [1, 2], [0.5], [])


@pytest.fixture(scope="module")
def built() -> Runtime:
    return runtime_of(small())


@pytest.fixture(scope="module")
def honest(built: Runtime) -> Reply:
    assert built.wires is not None
    half, data = built.algorithm.client, built.task.client_data(0)
    trained = half.train(built.initial, half.initial_private(data), data, Assignment(0.0, 1))
    assert trained.upload is not None
    payload, _ = built.wires.uplink.encode(trained.upload, {}, progress=0.0, seed=0)
    return Reply(
        1, 1, 0, built.lineage, 50, 9, payload, {"accuracy": 0.5}, {"accuracy": 0.4}, train={"train_loss": 2.0}
    )


class Server:
    """One round of an exchange with one client, again and again."""

    def __init__(self, built: Runtime, directory: Path) -> None:
        self.exchange = Exchange(built, Ledger(directory), "0" * 16, Checkpoints(directory, 1))
        hello = HelloReply("00000", 0, built.lineage, 50, 9, 0, 0, "all")
        self.exchange._roster.admit(7, hello, 0, 0, [7])
        self.asked = Message(RecordDict(), 7, "train")
        self.num_refused = self.num_taken = 0

    def receive(self, content: RecordDict) -> None:
        exchange = self.exchange
        exchange._roster.replied("00000", 0, 0)
        exchange._round = exchange._new_round(1)
        exchange._round.trains = True
        exchange._round.seats = {seat.node_id: seat for seat in exchange._roster.all()}
        reply = Message(content, reply_to=self.asked)
        exchange._asked = {reply.metadata.reply_to_message_id: ("00000", 1)}
        exchange._accept([reply])
        assert exchange._merger is not None
        if exchange._merger.take(exchange._round, exchange._reject):
            self.num_taken += 1
            exchange._merger.counted()
            assert all(np.isfinite(value).all() for value in exchange._merger.result().values())
        else:
            self.num_refused += 1
            assert [rejection.client for rejection in exchange._round.rejected] == ["00000"]


@pytest.fixture
def server(built: Runtime, tmp_path: Path) -> Iterator[Server]:
    with task_identity():
        yield Server(built, tmp_path)


def with_payload(honest: Reply, data: bytes) -> RecordDict:
    content = honest.to_records()
    change_payload(content, lambda _: data)
    return content


def bytes_changed(honest: Reply, rng: random.Random) -> RecordDict:
    """Some bytes of the payload, by a liar who makes the checksum fit; more often in its header."""
    data = bytearray(honest.payload or b"")
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        data[rng.randrange(rng.choice((14, 60, len(data))))] = rng.randrange(256)
    return with_payload(honest, bytes(data))


def length_changed(honest: Reply, rng: random.Random) -> RecordDict:
    data = honest.payload or b""
    where = rng.randrange(len(data))
    cut = data[:where] + data[where + rng.randrange(9) :] if rng.random() < 0.5 else data[:where]
    return with_payload(honest, cut + rng.randbytes(rng.choice((0, 0, 1, 7, 100))))


def values_changed(honest: Reply, rng: random.Random) -> RecordDict:
    """Any number, name or record of it."""
    content = honest.to_records()
    metrics = content["metrics"]
    for _ in range(rng.choice((1, 1, 3))):
        action, key = rng.randrange(6), rng.choice([*metrics, "s.new", "s.[bold]", "x.y", "", "c.encode"])
        if action < 3:
            metrics[key] = rng.choice(ODD)  # type: ignore[index]
        elif action == 3 and key in metrics:
            del metrics[key]  # type: ignore[attr-defined]
        elif action == 4:
            dtype = rng.choice(("uint8", "float32", "object", "<U4", "not a type"))
            array = Array(dtype=dtype, shape=(rng.randrange(5),), stype="numpy.ndarray", data=rng.randbytes(200))
            put_array(content, ArrayRecord({rng.choice(("payload", "other")): array}))
        else:
            content[rng.choice(("arrays", "small", "metrics", "config"))] = MetricRecord({"num-examples": 3})
    return content


def wire_changed(honest: Reply, rng: random.Random) -> RecordDict:
    """The serialised records: what Flower itself does not refuse comes to us."""
    data = bytearray(recorddict_to_proto(honest.to_records()).SerializeToString())
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(rng.choice((300, len(data))))] = rng.randrange(256)
    return recorddict_from_proto(RecordDictProto.FromString(bytes(data)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("change", [bytes_changed, length_changed, values_changed, wire_changed])
def test_mutated_replies_are_refused_or_harmless(
    change: Callable[[Reply, random.Random], RecordDict], server: Server, honest: Reply
) -> None:
    rng = random.Random(change.__name__)
    by_flower = 0
    for _ in range(10):
        server.receive(honest.to_records())  # so that there is a bound on norms
    assert server.num_taken == 10
    while server.num_refused + server.num_taken < EACH:
        try:
            content = change(honest, rng)
        except Exception:  # a form that its own records refuse; it would not reach us
            by_flower += 1
            continue
        server.receive(content)
    assert server.num_refused > EACH // 10
    assert by_flower < 10 * EACH


def test_the_honest_reply_is_taken(server: Server, honest: Reply) -> None:
    server.receive(honest.to_records())
    assert server.num_taken == 1
