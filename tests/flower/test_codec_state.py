"""Codec state on both ends: it moves with replies that count, and with no others."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

import client_app
from fedkd_flwr.compressors.identity import IdentityCodec, IdentityOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.flower import runtime
from fedkd_flwr.flower.store import ClientStore
from tests.conftest import Run
from tests.flower.test_exchange import client, rows_of, trains_in


class CountingCodec(IdentityCodec):
    """Each end counts what it has handled, and the decoder refuses a payload out of step with it."""

    @property
    def most_bytes(self) -> int:
        return super().most_bytes + 1

    def initial_state(self) -> Arrays:
        return {"count": np.array(0)}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        payload, _ = super().encode(update, {}, progress=progress, seed=seed)
        return bytes([int(state["count"])]) + payload, {"count": state["count"] + 1}

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        if payload[0] != int(state["count"]):
            raise ValueError(f"encoder is at {payload[0]}, decoder at {int(state['count'])}")
        update, _ = super().decode(payload[1:], {})
        return update, {"count": state["count"] + 1}


@pytest.fixture(autouse=True)
def counting_codec(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    runtime._built.cache_clear()
    monkeypatch.setattr(IdentityOptions, "build", lambda self, spec: CountingCodec(spec))
    yield
    runtime._built.cache_clear()


def uplink_counts(run_dir: Path, key: str) -> int:
    state = ClientStore(run_dir / "state", rows_of(run_dir, "start")[0]["training_id"], key).load()
    assert state is not None
    return int(state.committed["count"])


def test_a_lost_reply_moves_neither_end(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if trains_in(message, 2) and client(context) == 1:
            raise ConnectionError("lost after the client committed")
        return reply

    run_dir = run("compressor.name=identity", "num_rounds=4", app=app)
    reasons = [item["reason"] for row in rows_of(run_dir, "round") for item in row["rejected"]]
    assert reasons == ["ConnectionError: lost after the client committed"]
    assert [uplink_counts(run_dir, key) for key in ("00000", "00001", "00002")] == [4, 3, 4]


def test_a_skipped_round_moves_neither_end(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        if trains_in(message, 2) and client(context) != 0:
            raise ConnectionError("away")
        return client_app.app(message, context)

    run_dir = run("compressor.name=identity", "num_rounds=4", "server.min_replies=2", app=app)
    assert [row["skipped"] for row in rows_of(run_dir, "round")] == [False, False, True, False, False]
    assert all(item["reason"].endswith("away") for row in rows_of(run_dir, "round") for item in row["rejected"])
    assert [uplink_counts(run_dir, key) for key in ("00000", "00001", "00002")] == [3, 3, 3]


def test_after_a_lost_disk_both_ends_begin_again_together(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        if trains_in(message, 3) and client(context) == 0:
            for path in Path(str(context.run_config["state-dir"])).glob("*/00000/state.safetensors"):
                path.unlink()  # a lost disk: the next instruction finds version 0
        return client_app.app(message, context)

    run_dir = run("compressor.name=identity", "num_rounds=6", "algorithm.name=fedavg", app=app)
    rounds = rows_of(run_dir, "round")
    assert [item["reason"] for item in rounds[3]["rejected"]] == [
        "StateError: has no codec state after its reply of round 2, which the server counted"
    ]
    assert [row["clients"] for row in rounds[4:]] == [["00000", "00001", "00002"]] * 3
    assert not any(row["rejected"] for row in rounds[4:])
