"""Mixtures: made, packed, gathered, undone; and the model that the server makes of outputs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import client_app
from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.label_outputs import OUTPUTS, WEIGHTS, LabelOutputsCodec
from fedkd_flwr.algorithms.loop import OptimizerOptions
from fedkd_flwr.algorithms.mixfld import ConversionOptions, Mix2FldOptions, MixFldOptions, Samples
from fedkd_flwr.algorithms.mixtures import (
    DEVICE,
    MAJOR,
    MINOR,
    SEEDS,
    GatheredSeeds,
    Mixtures,
    SeededOutputsCodec,
    crossed,
    mixed,
    unmixed,
)
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.arrays import Array, digest
from fedkd_flwr.core.protocols import ClientData, Task
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.forecast import forecast
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from tests.algorithms.conftest import FIRST, LOCAL, SEED, same
from tests.conftest import Run, small

MIXFLD = MixFldOptions(model="student", local=LOCAL, num_seeds=12, conversion=ConversionOptions(num_steps=5))


def codec(num_seeds: int = 4) -> SeededOutputsCodec:
    return SeededOutputsCodec(LabelOutputsCodec(3, "float16", with_round=False), num_seeds, (1, 2, 2), 3)


def upload(mixtures: Mixtures | None, num_seeds: int = 4) -> dict[str, Array]:
    outputs = {OUTPUTS: np.full((3, 3), 1 / 3, np.float32), WEIGHTS: np.ones(3, np.float32)}
    return outputs | codec(num_seeds).arrays(mixtures)


def all_unmixed(mixtures: Mixtures, device: Array, lam: float) -> tuple[Array, Array]:
    pairs = crossed(mixtures, device)
    return unmixed(mixtures, pairs, lam, np.arange(2 * len(pairs)))


@given(lam=st.floats(0.01, 0.49), seed=st.integers(0, 99))
def test_two_crossed_mixtures_give_back_hard_labels_and_neither_clients_example(lam: float, seed: int) -> None:
    """In algebra: labels mix as inputs do, so inputs that are one-hot labels must come out as hard labels."""
    labels = np.eye(3, dtype=np.float32)
    made = np.stack([lam * labels[0] + (1 - lam) * labels[2], lam * labels[2] + (1 - lam) * labels[0]])
    mixtures = Mixtures(made, np.array([0, 2]), np.array([2, 0]))
    inputs, hard = all_unmixed(mixtures, np.array([0, 1]), lam)
    assert hard.tolist() == [0, 2]
    np.testing.assert_allclose(inputs, labels[hard], atol=1e-3)


def test_inverse_mixing_of_two_clients_examples_by_hand() -> None:
    lam, (a, b, c, d) = 0.2, np.arange(4.0) * 10  # a, d have label 0; b, c have label 1
    mixtures = Mixtures(
        np.array([[lam * a + 0.8 * b], [lam * c + 0.8 * d]], np.float32), np.array([0, 1]), np.array([1, 0])
    )
    inputs, hard = all_unmixed(mixtures, np.array([0, 1]), lam)
    h = np.array([lam / (2 * lam - 1), (lam - 1) / (2 * lam - 1)])
    np.testing.assert_allclose(h, [-1 / 3, 4 / 3])
    np.testing.assert_allclose(inputs[:, 0], h * (0.2 * a + 0.8 * b) + (1 - h) * (0.2 * c + 0.8 * d), rtol=1e-6)
    assert hard.tolist() == [0, 1]


def test_mixtures_of_one_client_and_of_other_labels_are_not_combined() -> None:
    mixtures = Mixtures(np.ones((3, 2), np.float32), np.array([0, 1, 1]), np.array([1, 0, 2]))
    assert crossed(mixtures, np.array([5, 5, 6])).shape == (0, 2)
    assert crossed(mixtures, np.array([5, 4, 5])).tolist() == [[0, 1]]


@given(labels=st.lists(st.permutations([0, 1, 2]), min_size=1, max_size=25), seed=st.integers(0, 9))
def test_every_crossed_pair_of_two_clients_is_found_once(labels: list[list[int]], seed: int) -> None:
    minor, major = (np.array([pair[place] for pair in labels]) for place in (0, 1))
    device = np.random.default_rng(seed).integers(0, 3, len(labels))
    expected = [
        [one, other]
        for one in range(len(labels))
        for other in range(one + 1, len(labels))
        if minor[one] == major[other] and major[one] == minor[other] and device[one] != device[other]
    ]
    assert crossed(Mixtures(np.zeros((len(labels), 1)), minor, major), device).tolist() == expected


def test_mixtures_are_of_two_labels_and_weighed_as_asked() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    inputs = np.stack([labels, 10.0**labels], axis=1).astype(np.float32)
    made = mixed(inputs, labels, 50, 0.3, seed=1)
    assert (made.minor != made.major).all()
    np.testing.assert_allclose(made.inputs[:, 1], 0.3 * 10.0**made.minor + 0.7 * 10.0**made.major, rtol=1e-5)
    assert len({(minor, major) for minor, major in zip(made.minor, made.major, strict=True)}) == 6


def test_whoever_has_one_label_sends_no_mixture() -> None:
    assert len(mixed(np.ones((4, 2), np.float32), np.zeros(4, np.int64), 5, 0.2, seed=0).minor) == 0


@pytest.mark.parametrize("lam", [0.5, 0.0, 0.7, -0.1])
def test_a_weight_that_can_not_be_undone_is_refused(lam: float) -> None:
    with pytest.raises(ValidationError, match="mixing"):
        Mix2FldOptions(mixing=lam)


def test_a_payload_takes_a_byte_for_each_number_of_a_mixture_and_nothing_where_there_is_none() -> None:
    outputs_bytes = 1 + 3 + 3 * 2 * 2
    mixtures = Mixtures(
        np.random.default_rng(0).random((3, 1, 2, 2)).astype(np.float32), np.array([0, 1, 2]), np.array([1, 2, 0])
    )
    with_some, _ = codec().encode(upload(mixtures), {}, progress=0.0, seed=0)
    without_any, _ = codec().encode(upload(None), {}, progress=0.0, seed=0)
    assert len(with_some) == outputs_bytes + 1 + 8 + 3 * (2 + 4)
    assert len(without_any) == outputs_bytes + 1
    assert codec(3).mixtures_bytes == 8 + 3 * (2 + 4)
    found, _ = codec().decode(with_some, {})
    np.testing.assert_allclose(found[SEEDS][:3], mixtures.inputs, atol=1 / 255)
    assert found[MINOR].tolist() == [0, 1, 2, -1] and found[MAJOR].tolist() == [1, 2, 0, -1]


def test_a_hostile_payload_is_an_error_or_finite_numbers() -> None:
    rng = np.random.default_rng(1)
    mixtures = Mixtures(rng.random((3, 1, 2, 2)).astype(np.float32), np.array([0, 1, 2]), np.array([1, 2, 0]))
    honest, _ = codec().encode(upload(mixtures), {}, progress=0.0, seed=0)
    for _ in range(500):
        data = bytearray(honest)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        cut = bytes(data[: rng.integers(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)
        try:
            found, _ = codec().decode(cut, {})
        except ValueError:
            continue
        assert all(np.isfinite(value).all() for value in found.values())
        assert (found[MINOR] < 3).all() and (found[MAJOR] < 3).all()


@pytest.mark.parametrize("value", [1e6, 3e38, -101.0])
def test_inputs_that_are_not_standardised_are_neither_sent_nor_believed(value: float) -> None:
    inputs = np.zeros((1, 1, 2, 2), np.float32)
    ordinary = Mixtures(inputs, np.array([0]), np.array([1]))
    payload = bytearray(codec().encode(upload(ordinary), {}, progress=0.0, seed=0)[0])
    at = payload.rindex(np.array([0, 1], "<f4").tobytes())  # the scale: the lowest number, and a step
    payload[at : at + 4] = np.array([value], "<f4").tobytes()
    with pytest.raises(ValueError, match="mixtures must be finite and lie within 100 of 0"):
        codec().decode(bytes(payload), {})
    inputs[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"mixed inputs must lie within 100 of 0, got .*; standardise them"):
        codec().encode(upload(ordinary), {}, progress=0.0, seed=0)


def test_mixtures_count_once_the_round_does_and_survive_a_checkpoint() -> None:
    def taken(rule: GatheredSeeds, **uploads: dict[str, Array]) -> Any:
        rule.begin(1)
        for client, each in uploads.items():
            rule.add(each, 1, None, client)
        return rule

    one = Mixtures(np.ones((1, 1, 2, 2), np.float32), np.array([0]), np.array([1]))
    two = Mixtures(2 * np.ones((2, 1, 2, 2), np.float32), np.array([1, 0]), np.array([0, 1]))
    rule = GatheredSeeds()
    taken(rule, b=upload(two))  # skipped: nobody asked for its result
    first = taken(rule, a=upload(one), b=upload(None)).result()
    assert first[DEVICE].tolist() == [0]
    restored = GatheredSeeds()
    restored.restore(rule.state())
    second = taken(restored, b=upload(two)).result()
    assert second[DEVICE].tolist() == [0, 1, 1]
    assert second[SEEDS][:, 0, 0, 0].tolist() == [1, 2, 2]
    before = restored.state()
    taken(restored, c=upload(one)).result()
    restored.restore(before)  # the round was undone
    assert taken(restored, a=upload(None)).result()[DEVICE].tolist() == [0, 1, 1]


def test_a_client_that_sends_mixtures_again_is_still_one_client() -> None:
    """Two sets of one client would be unmixed with each other, down to its very examples."""
    rule = GatheredSeeds()
    for value, client in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        rule.begin(1)
        made = Mixtures(np.full((1, 1, 2, 2), value, np.float32), np.array([0]), np.array([1]))
        rule.add(upload(made), 1, None, client)
        found = rule.result()
    assert found is not None
    assert found[DEVICE].tolist() == [0, 1]
    assert found[SEEDS][:, 0, 0, 0].tolist() == [3, 2]


def test_a_client_sends_the_same_mixtures_until_a_reply_of_it_has_counted(task: Task, data: ClientData) -> None:
    client = MIXFLD.build(task, SEED).client
    shared = MIXFLD.build(task, SEED).shared.initial()
    sent = []
    for number, counted in ((1, 0), (2, 0), (3, 1)):
        assignment = Assignment(0.0, 10 * number, server_round=number, counted_round=counted)
        trained = client.train(shared, {}, data, assignment)
        assert trained.upload is not None
        sent.append(trained.upload)
    assert [int((upload[MAJOR] >= 0).sum()) for upload in sent] == [12, 12, 0]
    assert all((sent[0][name] == sent[1][name]).all() for name in (SEEDS, MINOR, MAJOR))
    assert not same(sent[0], sent[1])  # what the model says has changed
    others = client.train(shared, {}, task.client_data(1), FIRST).upload
    assert others is not None and not (others[SEEDS] == sent[0][SEEDS]).all()


@pytest.mark.parametrize("kind", [MixFldOptions, Mix2FldOptions])
def test_the_server_moves_the_model_towards_what_clients_say(kind: type[MixFldOptions], task: Task) -> None:
    options = kind(
        model="student",
        local=LOCAL,
        num_seeds=40,
        conversion=ConversionOptions(num_steps=60, optimizer=OptimizerOptions(learning_rate=0.01)),
    )
    algorithm = options.build(task, SEED)
    assert algorithm.make_aggregator is not None
    rule, shared = algorithm.make_aggregator(), algorithm.shared.initial()
    rule.begin(1)
    for client in range(3):
        trained = algorithm.client.train(shared, {}, task.client_data(client), FIRST)
        assert trained.upload is not None
        rule.add(trained.upload, 1, None, str(client))
    result = rule.result()
    assert result is not None
    broadcast = algorithm.server.broadcast(result, shared, Assignment(0.0, 3))
    before, after = (
        algorithm.server.evaluate(model, task.test_data())
        for model in (shared, algorithm.shared.apply(shared, broadcast))
    )
    assert before is not None and after is not None
    assert after["accuracy"] > before["accuracy"] + 0.05


def test_the_server_learns_towards_labels_and_beta_times_what_clients_say(task: Task) -> None:
    """One step against autograd on the equation itself."""
    beta, learning_rate, lam = 0.8, 0.05, 0.2
    conversion = ConversionOptions(
        num_steps=1,
        batch_size=1000,
        beta=beta,
        optimizer=OptimizerOptions(name="sgd", learning_rate=learning_rate),
    )
    options = MixFldOptions(model="student", local=LOCAL, num_seeds=1, mixing=lam, conversion=conversion)
    algorithm = options.build(task, SEED)
    rng = np.random.default_rng(0)
    outputs = rng.dirichlet(np.ones(10), 10).astype(np.float32)
    batch = next(iter(task.client_data(0).train.batches(1)))
    aggregate = {
        OUTPUTS: outputs,
        SEEDS: batch["pixel_values"].numpy(),
        MINOR: np.array([3.0], np.float32),
        MAJOR: np.array([7.0], np.float32),
        DEVICE: np.zeros(1, np.float32),
    }
    found = algorithm.server.broadcast(aggregate, algorithm.shared.initial(), Assignment(0.0, 3))

    module = task.build_models(SEED).student
    inputs = {"pixel_values": batch["pixel_values"], "labels": torch.tensor([7])}
    log_p = task.forward(module, inputs, hidden_states=False, attentions=False).logits.double().log_softmax(-1)[0]
    said = lam * outputs[3] + (1 - lam) * outputs[7]
    loss = -(lam * log_p[3] + (1 - lam) * log_p[7]) - beta * (torch.from_numpy(said).double() * log_p).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(found[name], -learning_rate * parameter.grad.numpy(), atol=2e-6)


def test_what_is_unmixed_is_made_when_it_is_drawn() -> None:
    """A thousand mixtures have half a million pairs, more than fits where inputs are images."""
    rng = np.random.default_rng(0)
    minor = rng.integers(0, 2, 1000)
    mixtures = Mixtures(rng.random((1000, 4)).astype(np.float32), minor, 1 - minor)
    pairs = crossed(mixtures, np.arange(1000) // 100)
    samples = Samples(mixtures, pairs, 0.2, 2)
    assert len(samples) == 2 * len(pairs) > 200_000
    inputs, labels = samples.of(np.array([0, 1, len(samples) - 1]))
    assert inputs.shape == (3, 4) and labels.sum(dim=1).tolist() == [1, 1, 1]
    assert labels[0].argmax() != labels[1].argmax()


@pytest.mark.parametrize("held", [[[1, 1, 0], [0, 1, 1]], [[5, 5, 5]]], ids=["one in common", "one client"])
def test_mix2fld_needs_two_clients_with_two_labels_in_common(
    held: list[list[int]], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = replace(task.data_report(), label_names=("a", "b", "c"), label_counts=tuple(map(tuple, held)))
    monkeypatch.setattr(task, "data_report", lambda: report)
    monkeypatch.setattr("fedkd_flwr.algorithms.fd.num_classes_of", lambda *_: 3)
    MIXFLD.build(task, SEED)
    with pytest.raises(ValueError, match=r"algorithm\.name: mix2fld unmixes .* got no two clients with two labels"):
        Mix2FldOptions(model="student").build(task, SEED)


def test_what_goes_down_goes_through_the_users_codec_and_what_goes_up_does_not(task: Task) -> None:
    wires = MIXFLD.build(task, SEED).shared.wires(lambda spec, direction: IdentityOptions().build(spec))
    assert wires is not None
    assert type(wires.uplink).__name__ == "SeededOutputsCodec"
    assert {tensor.name for tensor in wires.downlink.spec} >= {"classifier.weight"}


def test_words_can_not_be_mixed(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.zeros(1, dtype=torch.int64)}
    monkeypatch.setattr(task, "example_batch", lambda: words)
    with pytest.raises(ValueError, match="only images can be mixed"):
        MIXFLD.build(task, SEED)


def test_the_ledger_notes_what_left_the_clients(run: Run) -> None:
    run_dir = run("algorithm={name: mix2fld, num_seeds: 30, mixing: 0.1}", "num_rounds=1")
    [start] = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "start"]
    assert any(
        "30 mixtures of two of its own examples, 0.1 of one and 0.9 of the other" in note for note in start["notes"]
    )
    assert any("1920 bytes" in note for note in start["notes"])


def test_mixtures_are_forecast_once_not_in_every_round() -> None:
    changes = ("algorithm={name: mixfld, num_seeds: 30}", "compressor={name: identity}")
    one, many = (forecast(small(*changes, f"num_rounds={number}")) for number in (1, 10))
    assert one.uplink_bytes == many.uplink_bytes < one.first_bytes == 8 + 30 * (64 + 2)
    assert "a client's first reply has 2.0 kB more" in many.describe()

    def total(text: str) -> float:
        found = re.search(r"([\d.]+) MB in", text)
        assert found
        return float(found[1])

    a_round = (many.uplink_bytes + many.downlink_bytes) * many.num_clients / 1e6
    assert total(many.describe()) == pytest.approx(10 * a_round + many.num_clients * many.first_bytes / 1e6, abs=0.06)


def test_a_run_that_is_resumed_ends_with_the_same_model(run: Run, tmp_path: Path) -> None:
    changes = ("algorithm={name: mixfld, num_seeds: 10}", "compressor={name: identity}")
    straight, resumed = run(*changes), tmp_path / "resumed"
    run_in_process(small(*changes, "num_rounds=2"), client_app.app, resumed)
    run_in_process(small(*changes), client_app.app, resumed, resume=True, force=True)
    models = [Checkpoints(run_dir, 2).latest() for run_dir in (straight, resumed)]
    assert models[0] is not None and models[1] is not None
    assert digest(models[0].parts["reference"].arrays) == digest(models[1].parts["reference"].arrays)
