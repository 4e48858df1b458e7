"""The client's end: retries, catching up, refusing what it should not do."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import client_app
from fedkd_flwr.algorithms.base import Assignment, Trained
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.protocols import ClientData
from fedkd_flwr.core.snapshot import pack_snapshot
from fedkd_flwr.flower.errors import NodeError, StateError
from fedkd_flwr.flower.guard import unplaced, without_places
from fedkd_flwr.flower.lineage import next_lineage
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.records import EVALUATE, HELLO, TRAIN, Hello, HelloReply, Instruction, Reply
from fedkd_flwr.flower.reference import Reference, snapshot_arrays
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.store import ClientStore
from tests.conftest import small

TRAINING = "00112233aabbccdd"


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.fixture
def built() -> Runtime:
    return runtime_of(small())


@pytest.fixture
def context(tmp_path: Path) -> Context:
    config = {"config-text": small().to_yaml(), "state-dir": str(tmp_path)}
    return Context(1, 1000, {"partition-id": 1}, RecordDict(), config)


def send(instruction: Instruction, context: Context) -> Message:
    return client_app.app(Message(instruction.to_records(), 1000, TRAIN), context)


def first(built: Runtime, **changes: object) -> Instruction:
    values: dict[str, object] = {
        "training_id": TRAINING,
        "server_round": 1,
        "attempt": 1,
        "version": 0,
        "lineage": built.lineage,
        "progress": 0.0,
        "counted_round": 0,
        "base_version": 0,
    }
    return Instruction(**(values | changes))  # type: ignore[arg-type]


def moved(built: Runtime, scale: float) -> tuple[Reference, bytes]:
    """A reference one version on, and the payload that led there."""
    assert built.wires is not None
    reference = Reference(built.algorithm.shared, built.wires.downlink, built.initial, built.lineage)
    update = {t.name: np.full(t.shape, scale, np.float32) for t in built.wires.downlink.spec}
    reference.advance(update, progress=0.0, seed=0)
    return reference, reference.delivery(0).payloads[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/srv/clinic  7/My data", "no table in '/srv/clinic  7/My data'"),
        ("/srv/a\\b", "no table in '/srv/a\\\\b'"),
        ("/srv/clinic7/data", "can't be read: /srv/clinic7/da"),
        ("/srv/clinic7", "PermissionError: [Errno 13] Permission denied: '/home/dr-smith/.cache'"),
    ],
)
def test_no_reason_names_a_place_on_the_node(path: str, text: str) -> None:
    said = without_places(text, {path: "data-path"})
    assert not any(word in said for word in ("srv", "clinic", "a\\b", "smith"))


def test_hello_names_the_client_its_version_and_its_examples(built: Runtime, context: Context) -> None:
    message = Message(Hello(TRAINING, built.lineage).to_records(), 1000, HELLO)
    reply = HelloReply.from_records(client_app.app(message, context).content)
    assert (reply.client_key, reply.version, reply.lineage) == ("00001", 0, built.lineage)
    assert reply.num_examples == len(built.task.client_data(1).train)


def test_hello_says_when_version_0_could_not_be_built_alike(context: Context) -> None:
    message = Message(Hello(TRAINING, bytes(32)).to_records(), 1000, HELLO)
    assert HelloReply.from_records(client_app.app(message, context).content).version is None


def test_the_same_work_asked_twice_is_answered_from_disk(built: Runtime, context: Context, tmp_path: Path) -> None:
    once = Reply.from_records(send(first(built), context).content, built.lineage)
    store = ClientStore(tmp_path, TRAINING, "00001")
    before = store.load()
    again = Reply.from_records(send(first(built, attempt=2), context).content, built.lineage)
    after = store.load()
    assert before is not None and after is not None
    assert after.generation == before.generation
    assert again.attempt == 2
    assert replace(again, attempt=1) == once
    assert again.shared and again.private and again.ensemble and again.train


def test_a_payload_that_the_client_has_is_not_applied_again(built: Runtime, context: Context, tmp_path: Path) -> None:
    reference, payload = moved(built, 0.5)
    asked = first(built, server_round=2, version=1, lineage=reference.lineage, payloads=(payload,))
    send(asked, context)
    send(first(built, server_round=3, version=1, lineage=reference.lineage, payloads=(payload,)), context)
    state = ClientStore(tmp_path, TRAINING, "00001").load()
    assert state is not None
    assert state.version == 1
    assert all(np.array_equal(state.shared[name], value) for name, value in reference.shared.items())


def test_a_snapshot_replaces_whatever_the_client_holds(built: Runtime, context: Context, tmp_path: Path) -> None:
    reference, _ = moved(built, 0.25)
    snapshot = pack_snapshot(snapshot_arrays(reference.shared, {}))
    asked = first(built, server_round=9, version=7, lineage=reference.lineage, base_version=7, snapshot=snapshot)
    send(asked, context)
    state = ClientStore(tmp_path, TRAINING, "00001").load()
    assert state is not None
    assert (state.version, state.lineage) == (7, reference.lineage)
    assert all(np.array_equal(state.shared[name], value) for name, value in reference.shared.items())


def test_a_version_out_of_reach_is_refused_before_training(built: Runtime, context: Context, tmp_path: Path) -> None:
    _, payload = moved(built, 0.5)
    with pytest.raises(StateError, match="holds version 0, can't reach 5 from 4"):
        send(first(built, version=5, base_version=4, payloads=(payload,)), context)
    assert ClientStore(tmp_path, TRAINING, "00001").load() is None


def test_another_lineage_is_refused(built: Runtime, context: Context) -> None:
    _, payload = moved(built, 0.5)
    wrong = next_lineage(built.lineage, b"other bytes")
    with pytest.raises(StateError, match="their updates differ"):
        send(first(built, version=1, lineage=wrong, payloads=(payload,)), context)


def test_a_restarted_client_goes_on_with_its_teacher(built: Runtime, context: Context, tmp_path: Path) -> None:
    send(first(built), context)
    trained = ClientStore(tmp_path, TRAINING, "00001").load()
    assert trained is not None
    # A new Flower context is what a restarted node has; the disk is what it had.
    fresh = Context(2, 77, context.node_config, RecordDict(), context.run_config)
    send(first(built, server_round=2, counted_round=1), fresh)
    state = ClientStore(tmp_path, TRAINING, "00001").load()
    assert state is not None
    assert int(state.private["num_rounds_trained"]) == 2


@pytest.mark.parametrize(
    ("number", "place"), [(1, (0.0, 1 / 3)), (2, (1 / 3, 2 / 3)), (3, (2 / 3, 1.0)), (5, (1.0, 1.0))]
)
def test_a_client_is_told_which_part_of_the_run_a_round_is(
    number: int, place: tuple[float, float], built: Runtime, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Assignment] = []
    half = built.algorithm.client
    train = half.train

    def recorded(shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        seen.append(assignment)
        return train(shared, private, data, assignment)

    monkeypatch.setattr(half, "train", recorded)
    send(first(built, server_round=number), context)
    assert [(assignment.begin, assignment.end) for assignment in seen] == [place]


@pytest.mark.parametrize("when", ["hello", "train", "evaluate", "export"])
@pytest.mark.parametrize("kind", [OSError, RuntimeError, KeyError, StateError])
def test_no_error_of_any_message_names_a_place_on_the_node(
    when: str, kind: type[Exception], built: Runtime, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"{context.run_config['state-dir']}/0011/00001/private_model/model.safetensors"
    error = OSError(28, "No space left on device", where) if kind is OSError else kind(f"no room at {where}")

    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    target = built.algorithm.client if when == "export" else ClientStore
    method = {"hello": "load", "train": "load", "evaluate": "commit", "export": "export_private"}[when]
    monkeypatch.setattr(target, method, fail)
    message = {
        "hello": Message(Hello(TRAINING, built.lineage).to_records(), 1000, HELLO),
        "train": Message(first(built).to_records(), 1000, TRAIN),
    }.get(when, Message(first(built, server_round=4).to_records(), 1000, EVALUATE))
    with pytest.raises(Exception, match="state-dir") as caught:
        client_app.app(message, context)
    chain: list[BaseException | None] = [caught.value, caught.value.__cause__]
    assert not any(str(context.run_config["state-dir"]) in str(link) for link in chain)
    assert not any(name in str(caught.value) for name in ("/tmp", f"{Path.home()}/"))
    assert isinstance(caught.value, StateError if kind is StateError else NodeError)


def test_paths_of_the_experiment_itself_are_no_secret(context: Context) -> None:
    context.run_config["config-text"] = "task: {source: /srv/shared/texts}"
    with pytest.raises(NodeError) as caught, unplaced(context):
        raise OSError("'/srv/shared/texts' is not at '/data/clinic 7/texts' or /mnt/x")
    assert str(caught.value) == "OSError: '/srv/shared/texts' is not at '(a path) 7/texts' or (a path)"
