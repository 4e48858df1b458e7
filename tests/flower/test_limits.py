"""What a message may hold is known before it is read: bytes, names of metrics, their ranges."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

import client_app
from fedkd_flwr.algorithms import ALGORITHMS
from fedkd_flwr.flower.carriage import carry
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.limits import Limits
from fedkd_flwr.flower.records import Instruction, Reply
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from tests.conftest import Run, small
from tests.flower.test_client import TRAINING
from tests.flower.test_exchange import client, rows_of, trains_in

MEBIBYTE = 1 << 20
LINEAGE = bytes(32)


@pytest.fixture(scope="module")
def built() -> Runtime:
    return runtime_of(small())


@pytest.fixture(scope="module")
def limits(built: Runtime) -> Limits:
    return built.limits


def reply(**groups: dict[str, float]) -> Reply:
    return Reply(1, 1, 0, LINEAGE, 5, 5, b"payload", **groups)


def read(said: Reply, limits: Limits) -> Reply:
    return Reply.from_records(said.to_records(), LINEAGE, limits)


# Scores


@pytest.mark.parametrize("group", ["shared", "private", "ensemble"])
@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"accuracy": 2.5e29}, r"'accuracy' must be in \[0, 1\], got 2\.5e\+29"),
        ({"macro_f1": -0.1}, r"'macro_f1' must be in \[0, 1\]"),
        ({"loss": -1.0}, "'loss' must be in"),
        ({"loss": 1e20}, "'loss' must be in"),
        ({f"invented_{n}": 0.5 for n in range(60)}, "'invented_0' has no name that is known"),
        ({"train_loss": 0.5}, "no name that is known"),
    ],
)
def test_invented_scores_make_the_reply_malformed(
    group: str, metrics: dict[str, float], reason: str, limits: Limits
) -> None:
    with pytest.raises(MessageError, match=reason) as caught:
        read(reply(**{group: metrics}), limits)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("metrics", [{"train_loss": 1e29}, {"accuracy": 0.5}, {"min_divisor": -1.0}])
def test_invented_losses_of_training_do_too(metrics: dict[str, float], limits: Limits) -> None:
    with pytest.raises(MessageError):
        read(reply(train=metrics), limits)


def test_a_mean_of_ones_may_be_a_rounding_above_one(limits: Limits) -> None:
    assert read(reply(shared={"accuracy": 1 + 2e-16, "loss": 0.0}), limits).shared["accuracy"] > 1


def test_no_more_seconds_are_booked_than_a_round_may_take(limits: Limits) -> None:
    said = read(reply(seconds={"client_train": 9e6, "encode": 0.5}), limits)
    assert said.seconds == {"client_train": limits.seconds, "encode": 0.5}


def test_a_client_whose_model_has_diverged_loses_that_score_alone(limits: Limits) -> None:
    honest = reply(shared={"accuracy": 0.5, "loss": float("inf")}, private={"accuracy": 0.1, "loss": 1e12})
    told = honest.within(limits)
    assert (told.shared, told.private) == ({"accuracy": 0.5}, {"accuracy": 0.1})
    assert replace(told, shared={}, private={}) == replace(honest, shared={}, private={})
    assert read(told, limits) == told


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"frd", "mixfrd"}))
def test_what_honest_clients_report_is_declared(name: str) -> None:
    extra = {"lora_kd": ("task.public={num_examples: 64}", "algorithm.num_asked=8")}.get(name, ())
    built = runtime_of(small(f"algorithm.name={name}", *extra))
    half, data = built.algorithm.client, built.task.client_data(0)
    scores = half.evaluate(built.initial, half.initial_private(data), data)
    for metrics in scores.values():
        assert built.limits.tellable("s", metrics) == metrics
    assert built.task.metrics.keys() >= {name for metrics in scores.values() for name in metrics}


def test_one_client_of_invented_scores_costs_its_reply_and_nobody_else(run: Run) -> None:
    def app(message: Message, context: Context) -> Message:
        said = client_app.app(message, context)
        if trains_in(message, 1) and client(context) == 0:
            said.content["metrics"]["s.accuracy"] = 2.5e29  # type: ignore[index]
        if trains_in(message, 1) and client(context) == 1:
            said.content["metrics"].update({f"p.invented_{n}": 0.5 for n in range(60)})  # type: ignore[union-attr]
        return said

    rounds = rows_of(run("num_rounds=2", "num_clients=4", app=app), "round")
    assert {item["client"]: item["kind"] for item in rounds[1]["rejected"]} == dict.fromkeys(
        ("00000", "00001"), "malformed"
    )
    assert rounds[1]["clients"] == ["00002", "00003"]
    for scope in ("shared_local", "private_local"):
        assert 0 <= rounds[1]["metrics"][scope]["accuracy"] <= 1
        assert not any(name.startswith("invented") for name in rounds[1]["metrics"][scope])


# Bytes


def npy(header: bytes, rest: bytes = b"") -> RecordDict:
    data = (b"\x93NUMPY\x01\x00v\x00" + header).ljust(127, b" ") + b"\n" + rest
    return RecordDict({"arrays": ArrayRecord({"payload": Array("uint8", (1,), "numpy.ndarray", data)})})


def upload(change: Callable[[RecordDict], object]) -> RecordDict:
    content = reply().to_records()
    content.pop("arrays", None)
    content.pop("small", None)
    change(content)
    return content


def test_a_longer_upload_is_refused_before_anything_of_its_size_is_allocated(limits: Limits) -> None:
    content = upload(lambda content: carry(content, bytes(32 * MEBIBYTE)))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match=f"at most {limits.upload_bytes} bytes, got {32 * MEBIBYTE}") as caught:
            Reply.from_records(content, LINEAGE, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.kind == "payload"
    assert peak < MEBIBYTE


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (134217728,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (4,), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2), }",
        b"[" * 100,
    ],
)
def test_an_array_is_no_larger_than_its_bytes_whatever_it_claims(header: bytes) -> None:
    content = upload(lambda content: content.update(npy(header, bytes(4))))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="payload must"):
            Reply.from_records(content, LINEAGE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEBIBYTE


def instruction(**what: object) -> RecordDict:
    return Instruction(TRAINING, 1, 1, 1, LINEAGE, 0.0, 0, 0, **what).to_records()  # type: ignore[arg-type]


@pytest.mark.parametrize("what", [{"payloads": (b"x", bytes(MEBIBYTE))}, {"snapshot": bytes(MEBIBYTE)}])
def test_a_client_refuses_longer_broadcasts_and_snapshots(what: dict[str, object], limits: Limits) -> None:
    content = RecordDict(instruction(**({"payloads": (b"x",)} if "payloads" in what else {"snapshot": b"x"})))
    assert Instruction.from_records(content, limits).payload_bytes == 1
    version = {"version": 2} if "payloads" in what else {}
    content = Instruction(**{**vars_of(Instruction.from_records(content)), **version, **what}).to_records()  # type: ignore[arg-type]
    with pytest.raises(MessageError, match=f"at most ({limits.broadcast_bytes}|{limits.snapshot_bytes}) bytes"):
        Instruction.from_records(content, limits)


def vars_of(one: Instruction) -> dict[str, object]:
    return {name: getattr(one, name) for name in Instruction.__dataclass_fields__}


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"frd", "mixfrd", "local_only"}))
def test_the_codecs_of_every_algorithm_bound_their_payloads(name: str) -> None:
    extra = {"lora_kd": ("task.public={num_examples: 64}", "algorithm.num_asked=8")}.get(name, ())
    wires = runtime_of(small(f"algorithm.name={name}", *extra)).wires
    assert wires is not None
    for codec in (wires.uplink, wires.downlink):
        if codec.most_bytes > 64 * MEBIBYTE:
            continue  # a stack of all clients' adapters
        payload = bytes(codec.most_bytes + 1)
        with pytest.raises(ValueError, match=r"must|too many|starts with"):
            codec.decode(payload, codec.initial_state())


def test_all_flags_and_numbers_of_a_proxy_memory_fit_its_bound() -> None:
    from fedkd_flwr.algorithms.proxy_memory import POLICIES, VISITED, ProxyMemoryCodec

    rng = np.random.default_rng(0)
    for count in (2, 3, 40, 1000):
        codec = ProxyMemoryCodec(count, 3, 8)
        for density in (0.0, 0.1, 0.38, 0.5, 0.62, 1.0):
            visited = (rng.random(count) < density).astype(np.float32)
            policies = np.full((count, 3), 1 / 3, np.float32) * visited[:, None]
            payload, _ = codec.encode({POLICIES: policies, VISITED: visited}, {}, progress=0.0, seed=0)
            assert len(payload) <= codec.most_bytes
        with pytest.raises(ValueError, match="at most"):
            codec.decode(bytes(codec.most_bytes + 1), {})
