"""The exchange, end to end in this process."""

import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message
from transformers import ViTForImageClassification

import client_app
from fedkd_flwr.compressors.payload import HEADER_BYTES
from fedkd_flwr.core.arrays import num_elements
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.snapshot import snapshot_bytes
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.local_grid import LocalGrid
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import Run, small
from tests.payloads import change_payload, put_array, remove_payload

STUDENT = Path("student") / "model.safetensors"


def rows_of(run_dir: Path, kind: str) -> list[Row]:
    return [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == kind]


def exported_model(run_dir: Path) -> dict[str, Any]:
    return read_arrays(ViTForImageClassification.from_pretrained(run_dir / "student"))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that a repetition must repeat."""
    return {
        "metrics": [(row["round"], row["metrics"]) for row in rows_of(run_dir, "round") + rows_of(run_dir, "final")],
        "student": (run_dir / STUDENT).read_bytes(),
        # Sorted: the order in which clients finish is nobody's to promise.
        "messages": sorted(
            (m["round"], m["node"], m["direction"], m["purpose"], m["payload_bytes"], m["wire_bytes"])
            for m in rows_of(run_dir, "message")
        ),
    }


def misbehaving(act: Callable[[Message, Context], None]) -> Callable[[Message, Context], Message]:
    """The client app, with something done before each training message."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            act(message, context)
        return client_app.app(message, context)

    return app


def trains_in(message: Message, server_round: int) -> bool:
    return message.metadata.message_type == "train" and message.content["config"]["server-round"] == server_round


def client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def test_same_seed_gives_same_metrics_student_and_bytes(run: Run) -> None:
    assert outcome(run()) == outcome(run())


def test_other_seed_gives_another_student(run: Run) -> None:
    assert outcome(run())["student"] != outcome(run("seed=2"))["student"]


@pytest.mark.parametrize("compressor", ["svd", "identity"])
def test_server_and_clients_hold_the_same_student(run: Run, compressor: str) -> None:
    run_dir = run(f"compressor.name={compressor}")
    training_id = rows_of(run_dir, "start")[0]["training_id"]
    student = exported_model(run_dir)
    for key in ("00000", "00001", "00002"):
        state = ClientStore(run_dir / "state", training_id, key).load()
        assert state is not None
        assert state.version == 3
        assert all(np.array_equal(state.shared[name], value) for name, value in student.items())


def test_every_client_gets_each_payload_once(run: Run) -> None:
    run_dir = run()
    sizes = [row["payload_bytes"] for row in rows_of(run_dir, "round")][1:]
    for key in ("00000", "00001", "00002"):
        received = [
            m["payload_bytes"]
            for m in rows_of(run_dir, "message")
            if m["node"] == key and m["direction"] == "downlink" and m["payload_bytes"]
        ]
        assert received == sizes


def test_message_overhead_beyond_the_payload_is_at_most_2800_bytes(run: Run) -> None:
    run_dir = run()
    trained = [m for m in rows_of(run_dir, "message") if m["purpose"] == "train" and m["round"] > 1]
    assert trained
    per_client_and_round: dict[tuple[int, str], int] = {}
    for m in trained:
        key = (m["round"], m["node"])
        per_client_and_round[key] = per_client_and_round.get(key, 0) + m["wire_bytes"] - m["payload_bytes"]
    assert max(per_client_and_round.values()) <= 2800


def test_partial_participation_catches_up_in_the_fewest_bytes(run: Run) -> None:
    run_dir = run("num_clients=4", "num_rounds=6", "server.fraction_train=0.5", "server.min_replies=2")
    assert read_summary(run_dir)["status"] == "completed"  # type: ignore[index]
    assert all(len(row["clients"]) == 2 for row in rows_of(run_dir, "round")[1:])
    sizes = [row["payload_bytes"] for row in rows_of(run_dir, "round")]
    whole = snapshot_bytes(exported_model(run_dir))
    held = dict.fromkeys(("00000", "00001", "00002", "00003"), 0)
    for m in rows_of(run_dir, "message"):
        if m["direction"] == "downlink" and m["purpose"] != "hello":
            version = m["round"] - 1
            chain = sum(sizes[held[m["node"]] + 1 : version + 1])
            assert m["payload_bytes"] == min(chain, whole)
            held[m["node"]] = version


def test_a_client_that_raises_costs_only_its_reply(run: Run) -> None:
    def fail(message: Message, context: Context) -> None:
        if client(context) == 1 and message.content["config"]["server-round"] == 2:
            raise RuntimeError("disk on fire")

    run_dir = run(app=misbehaving(fail))
    rounds = rows_of(run_dir, "round")
    assert rounds[2]["rejected"] == [{"client": "00001", "kind": "error", "reason": "RuntimeError: disk on fire"}]
    assert rounds[2]["clients"] == ["00000", "00002"]
    assert rounds[3]["clients"] == ["00000", "00001", "00002"]


def test_a_run_whose_clients_all_fail_fails_with_the_first_reason(run: Run, tmp_path: Path) -> None:
    def fail(message: Message, context: Context) -> None:
        raise RuntimeError("no data here")

    with pytest.raises(RunError, match="first reason: RuntimeError: no data here"):
        run(app=misbehaving(fail))
    summary = read_summary(tmp_path / "run0")
    assert summary is not None
    assert summary["status"] == "failed"


def test_a_round_with_too_few_replies_is_skipped_and_recorded(run: Run) -> None:
    def fail(message: Message, context: Context) -> None:
        if client(context) != 0 and message.content["config"]["server-round"] == 2:
            raise RuntimeError("away")

    run_dir = run("server.min_replies=2", app=misbehaving(fail))
    rounds = rows_of(run_dir, "round")
    assert [row["skipped"] for row in rounds] == [False, False, True, False]
    assert [row["version"] for row in rounds] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda reply: _payload(reply, lambda data: data[:-1]), "payload must have"),
        (lambda reply: _payload(reply, lambda data: b"XXX" + data[3:]), "a payload starts with"),
        (lambda reply: _payload(reply, lambda data: data[:-4] + b"\x00\x00\xc0\x7f"), "not finite"),
        (lambda reply: _metric(reply, "checksum", 1), "payload is damaged"),
        (lambda reply: _metric(reply, "num-examples", 10**9), "num-examples was"),
        (lambda reply: _metric(reply, "num-examples", -3), "num-examples must be in [1, "),
        (lambda reply: _metric(reply, "s.accuracy", float("nan")), "must be a finite number"),
        (lambda reply: _metric(reply, "lineage", 5), "another lineage"),
        (lambda reply: _metric(reply, "s.accuracy", 1), "must be a finite number"),
        (lambda reply: _metric(reply, "s.[red]", 1.0), "no name that is known"),
        (lambda reply: _metric(reply, "c.client_train", 1.7e308), "must be a finite number"),
        (lambda reply: _metric(reply, "c.client_train", -1.0), "seconds must be"),
        (lambda reply: _metric(reply, "attempt", 2), "reply is of round 1"),
        (lambda reply: _archive(reply), "must be one array"),
        (lambda reply: _metric(reply, "version", 7), "reply is of round 1, attempt 1, version 7"),
        (lambda reply: reply.content.pop("metrics"), "needs a metric record"),
        (lambda reply: remove_payload(reply.content), "has a payload where"),
    ],
)
def test_a_bad_reply_costs_that_reply_alone(run: Run, tamper: Callable[[Message], object], reason: str) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if trains_in(message, 1) and client(context) == 0:
            tamper(reply)
        return reply

    run_dir = run(app=app)
    rounds = rows_of(run_dir, "round")
    assert [item["client"] for item in rounds[1]["rejected"]] == ["00000"]
    assert rounds[1]["clients"] == ["00001", "00002"]
    assert reason in rounds[1]["rejected"][0]["reason"]
    assert rounds[1]["version"] == 1
    assert rounds[2]["clients"] == ["00000", "00001", "00002"]


def test_one_finite_but_huge_update_is_refused_before_it_moves_the_reference(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if client(context) == 0 and any(trains_in(message, number) for number in (1, 2)):
            _payload(reply, lambda data: data[:numbers] + huge[: len(data) - numbers])
        return reply

    fedavg = ("compressor.name=identity", "algorithm.name=fedavg")
    wires = runtime_of(small(*fedavg)).wires
    assert wires is not None
    numbers = HEADER_BYTES + len(wires.uplink.spec)  # after one form byte for each tensor
    huge = np.full(num_elements(wires.uplink.spec), 3.4e38, "<f4").tobytes()
    # A third of it fits float32, and leads to a model whose outputs do not.
    run_dir = run(*fedavg, "num_rounds=3", "server.validation.max_norm_ratio=null", app=app)
    rows = rows_of(run_dir, "round")
    assert [row["version"] for row in rows] == [0, 0, 0, 1]
    assert all("on the server's test set is nan" in row["rejected"][0]["reason"] for row in rows[1:3])
    assert all(np.isfinite(value).all() for value in exported_model(run_dir).values())


def test_a_reply_that_comes_late_is_booked_and_its_client_works_again(run: Run) -> None:
    def slow(message: Message, context: Context) -> None:
        if client(context) == 1 and message.content["config"]["server-round"] == 2:
            held.append(context.node_id)

    held: list[int] = []

    class HoldingGrid(LocalGrid):
        """Gives replies of a held node only when they are asked for again, half a second later."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.kept: list[tuple[float, Message]] = []

        def pull_messages(self, message_ids: Any) -> Any:
            wanted = set(message_ids)
            for reply in super().pull_messages(wanted):
                if reply.metadata.src_node_id in held:
                    held.clear()
                    self.kept.append((time.monotonic() + 0.5, reply))
                else:
                    yield reply
            due = [r for at, r in self.kept if at < time.monotonic() and r.metadata.reply_to_message_id in wanted]
            self.kept = [(at, r) for at, r in self.kept if r not in due]
            yield from due

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkd_flwr.flower.in_process.LocalGrid", HoldingGrid)
        run_dir = run("server.round_timeout_seconds=0.3", "num_rounds=8", app=misbehaving(slow))
    rounds = rows_of(run_dir, "round")
    assert any("no reply within" in item["reason"] for item in rounds[2]["rejected"])
    late = [item for row in rounds for item in row["rejected"] if item["kind"] == "late"]
    assert [item["client"] for item in late] == ["00001"]
    assert "00001" in rounds[-1]["clients"]
    replies = [m for m in rows_of(run_dir, "message") if m["node"] == "00001" and m["direction"] == "uplink"]
    assert [m["round"] for m in replies].count(2) == 1


def test_a_client_with_another_lineage_gets_a_snapshot_and_goes_on(run: Run) -> None:
    def corrupt(message: Message, context: Context) -> None:
        if client(context) == 0 and message.content["config"]["server-round"] == 2:
            store = ClientStore(
                Path(str(context.run_config["state-dir"])), str(message.content["config"]["training-id"]), "00000"
            )
            state = store.load()
            assert state is not None
            store.commit(replace(state, lineage=bytes(32)))

    rounds = rows_of(run(app=misbehaving(corrupt)), "round")
    assert [item["client"] for item in rounds[2]["rejected"]] == ["00000"]
    assert rounds[3]["clients"] == ["00000", "00001", "00002"]


def test_a_dropped_reply_leaves_server_and_client_together(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if trains_in(message, 1) and client(context) == 2:
            raise ConnectionError("reply lost")  # after the client trained and committed
        return reply

    test_rounds = rows_of(run(app=app), "round")
    assert test_rounds[2]["clients"] == ["00000", "00001", "00002"]
    assert not test_rounds[2]["rejected"]


def test_local_only_moves_no_payload_and_has_no_shared_model(run: Run) -> None:
    run_dir = run("algorithm.name=local_only")
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["metrics"]["shared_global"] is None
    assert summary["metrics"]["shared_local"] is None
    assert summary["metrics"]["private_local"]["accuracy"] > 0
    assert sum(m["payload_bytes"] for m in rows_of(run_dir, "message")) == 0


def test_num_examples_weighting_changes_the_aggregate_of_unequal_clients(run: Run) -> None:
    skewed = ("task.partition.name=dirichlet", "algorithm.name=fedavg", "num_rounds=1")
    uniform = outcome(run(*skewed, "server.aggregator.weighting=uniform"))
    weighted = outcome(run(*skewed, "server.aggregator.weighting=num_examples"))
    assert uniform["student"] != weighted["student"]
    assert outcome(run(*skewed))["student"] == weighted["student"]


def test_every_client_exports_what_it_predicts_with_at_the_end(run: Run) -> None:
    run_dir = run()
    for name in ("teacher", "student"):
        assert len(list((run_dir / "state").glob(f"*/*/private_model/{name}/model.safetensors"))) == 3


def test_both_models_together_are_scored_on_the_clients_own_data(run: Run) -> None:
    run_dir = run("num_rounds=1")
    summary = read_summary(run_dir)
    assert summary is not None
    of_both, of_student = (summary["metrics"][scope] for scope in ("ensemble_local", "shared_local"))
    assert of_both.keys() == of_student.keys() and of_both != of_student
    assert summary["spread"]["ensemble_local"].keys() == of_both.keys()
    assert rows_of(run_dir, "round")[-1]["metrics"]["ensemble_local"] is not None


def _payload(reply: Message, change: Callable[[bytes], bytes]) -> None:
    change_payload(reply.content, change)


def _archive(reply: Message) -> None:
    buffer = BytesIO()
    np.savez(buffer, payload=np.zeros(3, np.uint8))
    array = Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=buffer.getvalue())
    put_array(reply.content, ArrayRecord({"payload": array}))


def _metric(reply: Message, key: str, value: float) -> None:
    reply.content["metrics"][key] = value  # type: ignore[index]
