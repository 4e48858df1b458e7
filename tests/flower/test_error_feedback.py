"""Error feedback through the exchange: nothing that counted is lost, on either end, whatever else is."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

import client_app
from fedkd_flwr.compressors.base import RESIDUAL, WithErrorFeedback
from fedkd_flwr.core.arrays import Array, Arrays, difference
from fedkd_flwr.core.modules import without_prefix
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.records import TRAIN, Instruction
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.store import ClientStore
from tests.conftest import Run, small
from tests.flower.test_exchange import client, rows_of

OVERRIDES = (
    "compressor={name: transform_coding, energy_start: 0.5, energy_end: 0.4}",
    "num_clients=4",
    "server.num_train=3",
    "num_rounds=12",
    "algorithm.name=fedavg",
    "algorithm.model=student",
)
LOST = {(1, 3), (2, 5), (0, 5), (3, 8)}  # client, round


class Sums:
    """Adds up named arrays in float64."""

    def __init__(self) -> None:
        self.values: dict[str, Array] = defaultdict(lambda: np.zeros(()))

    def add(self, arrays: Arrays) -> None:
        for name, value in arrays.items():
            self.values[name] = self.values[name] + value.astype(np.float64)


def assert_equal_to_rounding(one: dict[str, Array], two: dict[str, Array]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], rtol=0, atol=1e-5 * (1e-3 + np.abs(value).max(initial=0)))


def test_what_counted_is_delivered_or_waits_in_a_residual(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Arrays] = []
    trained: dict[tuple[str, int], tuple[Arrays, bytes]] = {}
    broadcast = Sums()
    encode, advance = WithErrorFeedback.encode, Reference.advance

    def recording_encode(self: WithErrorFeedback, update: Arrays, *args: Any, **options: Any) -> tuple[bytes, Arrays]:
        encoded.append(update)
        return encode(self, update, *args, **options)

    def recording_advance(self: Reference, update: Arrays, **options: Any) -> int:
        broadcast.add(update)
        return advance(self, update, **options)

    def app(message: Message, context: Context) -> Message:
        encoded.clear()
        reply = client_app.app(message, context)
        if message.metadata.message_type == TRAIN:
            number = Instruction.from_records(message.content).server_round
            payload = ClientStore(*store_of(context, message)).load().last_reply.payload  # type: ignore[union-attr]
            trained[f"{client(context):05d}", number] = (encoded[0], payload)
            if (client(context), number) in LOST:
                raise ConnectionError("lost")
        return reply

    def store_of(context: Context, message: Message) -> tuple[Path, str, str]:
        training_id = Instruction.from_records(message.content).training_id
        return Path(str(context.run_config["state-dir"])), training_id, f"{client(context):05d}"

    monkeypatch.setattr(WithErrorFeedback, "encode", recording_encode)
    monkeypatch.setattr(Reference, "advance", recording_advance)
    run_dir = run(*OVERRIDES, app=app)

    experiment = small(*OVERRIDES)
    runtime = runtime_of(experiment)
    assert runtime.wires is not None
    codec = runtime.wires.uplink
    training_id = rows_of(run_dir, "start")[0]["training_id"]
    rounds = rows_of(run_dir, "round")
    rejected = {(item["client"], row["round"]) for row in rounds for item in row["rejected"]}
    sampled = {row["round"]: row["sampled"] for row in rounds}
    assert len(rejected) >= 2, json.dumps(sampled)  # some of the lost ones were asked
    assert any(len(names) < 4 for names in sampled.values())
    for key in ("00000", "00001", "00002", "00003"):
        state = ClientStore(run_dir / "state", training_id, key).load()
        assert state is not None
        made, arrived = Sums(), Sums()
        for (name, number), (update, payload) in trained.items():
            if name == key and (key, number) not in rejected:
                made.add(update)
                arrived.add(codec.decode(payload, {})[0])
        arrived.add(without_prefix(RESIDUAL, state.committed))
        assert_equal_to_rounding(made.values, arrived.values)

    checkpoint = Checkpoints(run_dir, keep=1).latest()
    assert checkpoint is not None
    reference = Reference(runtime.algorithm.shared, runtime.wires.downlink, runtime.initial, runtime.lineage)
    reference.restore(checkpoint.parts["reference"])
    applied = Sums()
    applied.add(difference(reference.shared, runtime.initial, codec.spec))
    applied.add(without_prefix(RESIDUAL, reference.saved().arrays | reference._encoder_state))
    assert_equal_to_rounding(broadcast.values, applied.values)
