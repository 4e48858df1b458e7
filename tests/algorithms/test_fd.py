"""Federated distillation: what is gathered, what it weighs, and what a client learns from the others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

import client_app
from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.fd import FdOptions
from fedkd_flwr.algorithms.label_outputs import (
    OUTPUTS,
    ROUND,
    WEIGHTS,
    LabelOutputs,
    LabelOutputsCodec,
    LabelOutputsMean,
    without,
)
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.losses import soft_cross_entropy
from fedkd_flwr.core.protocols import Batch, ClientData, Outputs, Task
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from tests.algorithms.conftest import LOCAL, ONE_STEP, SEED, SGD, Without, digits, same, under
from tests.conftest import Run, small

OPTIONS = FdOptions(local=LOCAL, optimizer=SGD, gamma=0.5)
THREE_CLIENTS = [  # each row is what a client says of a label; None where it has no example of it
    ([0.7, 0.2, 0.1], [0.1, 0.8, 0.1], None),
    ([0.5, 0.4, 0.1], None, None),
    ([0.3, 0.3, 0.4], [0.3, 0.4, 0.3], [0.0, 0.0, 1.0]),
]


def said(rows: Any, weights: list[float] | None = None) -> dict[str, Array]:
    outputs = np.array([row or [0.0] * 3 for row in rows], np.float32)
    present = [float(row is not None) for row in rows]
    return {OUTPUTS: outputs, WEIGHTS: np.array(weights or present, np.float32)}


def mean_of(uploads: list[dict[str, Array]], rule: LabelOutputsMean | None = None, num_examples: int = 1) -> Arrays:
    rule = rule or LabelOutputsMean()
    rule.begin(1)
    for upload in uploads:
        rule.add(upload, num_examples, None)
    result = rule.result()
    assert result is not None
    return result


def test_the_regulariser_is_what_float64_says() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(4), 6)
    weights = np.array([1, 0, 1, 1, 0, 1.0])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -((targets * log_p).sum(1) * weights).mean()
    found = soft_cross_entropy(*(torch.tensor(value, dtype=torch.float32) for value in (logits, targets, weights)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_regularisers_gradient_leads_to_the_target_distribution() -> None:
    """It is (softmax - target) / batch. A library in use compares logits with probabilities, and leads elsewhere."""
    logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    target = torch.tensor([[0.2, 0.5, 0.3]])
    soft_cross_entropy(logits, target, torch.ones(1)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target)
    for _ in range(500):
        logits.grad = None
        soft_cross_entropy(logits, target, torch.ones(1)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits -= logits.grad
    torch.testing.assert_close(logits.detach().softmax(-1), target, atol=1e-4, rtol=0)


def test_the_mean_without_one_client_by_hand_with_labels_that_some_lack() -> None:
    uploads = [said(rows) for rows in THREE_CLIENTS]
    means = mean_of(uploads)
    np.testing.assert_allclose(means[OUTPUTS][1], [0.2, 0.6, 0.2], atol=1e-6)
    assert means[WEIGHTS].tolist() == [3, 2, 1]
    rows, others = without(means, uploads[0])
    np.testing.assert_allclose(rows, [[0.4, 0.35, 0.25], [0.3, 0.4, 0.3], [0, 0, 1]], atol=1e-6)
    assert others.all()
    rows, others = without(means, uploads[2])  # nobody else has the third label
    np.testing.assert_allclose(rows, [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0, 0, 0]], atol=1e-6)
    assert others.tolist() == [True, True, False]
    rows, _ = without(means, None)  # whose reply did not arrive has no share in the mean
    np.testing.assert_allclose(rows[0], [0.5, 0.3, 0.2], atol=1e-6)


def test_counts_weigh_clients_by_their_examples_of_a_label() -> None:
    uploads = [said(THREE_CLIENTS[0], [30, 10, 0]), said(THREE_CLIENTS[1], [10, 0, 0])]
    means = mean_of(uploads, LabelOutputsMean("counts"), 40)
    np.testing.assert_allclose(means[OUTPUTS][0], [0.65, 0.25, 0.1], atol=1e-6)
    rows, others = without(means, uploads[0])
    np.testing.assert_allclose(rows[0], [0.5, 0.4, 0.1], atol=1e-5)
    assert others.tolist() == [True, False, False]


def test_nobody_weighs_more_than_its_examples_do() -> None:
    with pytest.raises(ValueError, match="must weigh 1 where all clients count alike, got 1024"):
        mean_of([said(THREE_CLIENTS[0], [1024, 1, 0])])
    honest = said(THREE_CLIENTS[0], [50, 10, 0])
    assert mean_of([honest], LabelOutputsMean("counts", num_epochs=2), 30)[WEIGHTS].tolist() == [50, 10, 0]
    with pytest.raises(ValueError, match="30 examples weigh at most 30 together, got 60"):
        mean_of([honest], LabelOutputsMean("counts", num_epochs=1), 30)


def test_one_client_that_claims_too_much_costs_its_reply_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LabelOutputsCodec.encode

    def encode(codec: LabelOutputsCodec, update: Arrays, *rest: Any, **how: Any) -> Any:
        heavy = {**update, WEIGHTS: update[WEIGHTS] * (2**32 - 512)} if update[WEIGHTS][3] == 0 else update
        return honest(codec, heavy, *rest, **how)

    monkeypatch.setattr(LabelOutputsCodec, "encode", encode)
    # Client 2 alone has no three.
    run_dir = run("algorithm.name=fd", "task.partition={name: pathological, classes_per_client: 9}", "num_rounds=2")
    rows = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "round" and row["round"] > 0]
    lacking = {rejection["client"] for row in rows for rejection in row["rejected"]}
    assert all(not row["skipped"] for row in rows) and "server" not in lacking
    assert len(lacking) >= 1


@pytest.mark.parametrize("ratio", [1, 100, 5000])
def test_what_others_say_is_found_beside_a_client_that_has_nearly_all_examples(ratio: int) -> None:
    rng = np.random.default_rng(ratio)
    own, other = (said(rng.dirichlet(np.ones(3), 3).tolist(), [weight] * 3) for weight in (ratio * 10.0, 10.0))
    means = mean_of([own, other], LabelOutputsMean("counts"), 3 * ratio * 10)
    wires = FdOptions(weighting="counts").build(digits(), SEED).shared.wires(lambda spec, direction: None)  # type: ignore[arg-type, return-value]
    assert wires is not None
    down = type(wires.downlink)(3, wires.downlink._dtype.name, with_round=True)  # type: ignore[attr-defined, call-arg]
    arrived = down.as_decoded({**means, ROUND: np.ones(1, np.float32)})  # type: ignore[attr-defined]
    rows, others = without(arrived, own)
    assert others.all()
    assert np.abs(rows - other[OUTPUTS]).sum(1).max() / 2 < 1e-6 + 2e-7 * ratio


def test_one_step_is_that_of_the_papers_loss(task: Task, data: ClientData) -> None:
    """Against autograd on the equation itself, in float64 where it is ours: phi(F, y) + gamma phi(F, G[y])."""
    gamma, learning_rate = 0.7, 0.05
    options = FdOptions(model="student", gamma=gamma, local=ONE_STEP, optimizer=SGD)
    algorithm = options.build(task, SEED)
    rng = np.random.default_rng(0)
    said_of = rng.dirichlet(np.ones(10), 10).astype(np.float32)
    weights = np.array([3.0, 3, 0, 3, 3, 3, 0, 3, 3, 3], np.float32)  # nobody has twos or sixes
    shared = {OUTPUTS: said_of * (weights > 0)[:, None], WEIGHTS: weights, ROUND: np.ones(1, np.float32)}
    private = algorithm.client.initial_private(data)
    found = algorithm.client.train(shared, private, data, Assignment(0.5, 6, server_round=2))

    module = task.build_models(SEED).student
    [batch] = data.train.batches(len(data.train))
    logits = task.forward(module, batch, hidden_states=False, attentions=False).logits.double()
    labels = batch["labels"]
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    targets = torch.from_numpy(shared[OUTPUTS]).double()[labels]
    loss = -log_p[torch.arange(len(labels)), labels].mean() - gamma * (targets * log_p).sum(1).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        expected = (parameter - learning_rate * parameter.grad).detach().numpy()
        np.testing.assert_allclose(under("model/", found.private)[name], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("counted", "shared_round", "is_among"),
    [(2, 2, 2), (1, 1, 1), (1, 2, None), (0, 2, None), (0, 1, None), (2, 1, None)],
    ids=["usual", "skipped round", "reply lost", "never", "never, skipped", "other mean"],
)
def test_a_client_takes_out_of_the_mean_just_what_it_had_put_in(
    task: Task, data: ClientData, counted: int, shared_round: int, is_among: int | None
) -> None:
    algorithm = OPTIONS.build(task, SEED)
    initial, private, uploads = algorithm.shared.initial(), algorithm.client.initial_private(data), {}
    for number in (1, 2):
        assignment = Assignment(0.0, number, server_round=number, counted_round=number - 1)
        trained = algorithm.client.train(initial, private, data, assignment)
        assert trained.upload is not None
        private, uploads[number] = trained.private, algorithm.shared.as_sent(trained.upload)  # type: ignore[attr-defined]
    stranger = {OUTPUTS: np.full((10, 10), 0.1, np.float32), WEIGHTS: np.ones(10, np.float32)}
    in_mean = [stranger] if is_among is None else [stranger, dict(uploads[is_among])]
    shared = {**mean_of(in_mean), ROUND: np.array([shared_round], np.float32)}
    now = Assignment(0.5, 3, server_round=3, counted_round=counted)
    rows, others = algorithm.client._targets(shared, private, now)  # type: ignore[attr-defined]
    assert others.all()
    np.testing.assert_allclose(rows, stranger[OUTPUTS], atol=1e-6)


def test_outputs_are_summed_over_batches_by_label() -> None:
    gathered = LabelOutputs(3)
    logits = torch.tensor([[0.0, 0.0, 0.0], [np.log(2.0), 0.0, 0.0], [0.0, np.log(6.0), 0.0]])
    gathered.add(logits[:2], torch.tensor([0, 0]))
    gathered.add(logits[2:], torch.tensor([2]))
    by_presence, by_count = gathered.means("uniform"), gathered.means("counts")
    np.testing.assert_allclose(
        by_presence[OUTPUTS], [[5 / 12, 7 / 24, 7 / 24], [0, 0, 0], [1 / 8, 6 / 8, 1 / 8]], atol=1e-6
    )
    assert by_presence[WEIGHTS].tolist() == [1, 0, 1]
    assert by_count[WEIGHTS].tolist() == [2, 0, 1]


@settings(max_examples=50)
@given(
    rows=npst.arrays(np.float64, (5, 5), elements=st.floats(1e-3, 1.0)),
    weights=npst.arrays(np.int64, 5, elements=st.sampled_from([0, 1, 127, 128, 70_000])),
)
def test_what_is_packed_is_unpacked_and_takes_what_the_formula_says(rows: Array, weights: Array) -> None:
    outputs = np.where(weights[:, None] > 0, rows / rows.sum(1, keepdims=True), 0).astype(np.float32)
    update = {OUTPUTS: outputs, WEIGHTS: weights.astype(np.float32), ROUND: np.array([300], np.float32)}
    codec = LabelOutputsCodec(5, "float16", with_round=True)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    present = weights[weights > 0]
    num_varint_bytes = sum(-(-int(weight).bit_length() // 7) for weight in present)
    assert len(payload) == 2 + 1 + num_varint_bytes + len(present) * 4 * 2  # round, mask, weights, L - 1 float16 a row
    found, _ = codec.decode(payload, {})
    np.testing.assert_allclose(found[OUTPUTS], outputs, atol=2e-3)
    assert found[WEIGHTS].tolist() == weights.tolist() and found[ROUND] == 300
    np.testing.assert_allclose(found[OUTPUTS][weights > 0].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_hostile_payload_is_an_error_or_probabilities(precision: Any) -> None:
    codec = LabelOutputsCodec(10, precision, with_round=False)
    rng = np.random.default_rng(0)
    honest, _ = codec.encode(
        {OUTPUTS: np.full((10, 10), 0.1, np.float32), WEIGHTS: np.ones(10, np.float32)}, {}, progress=0.0, seed=0
    )
    read = 0
    for _ in range(500):
        data = bytearray(honest)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        cut = bytes(data[: rng.integers(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)
        try:
            found, _ = codec.decode(cut, {})
        except ValueError:
            continue
        read += 1
        assert np.isfinite(found[OUTPUTS]).all() and (found[OUTPUTS] >= 0).all()
        assert (found[OUTPUTS].sum(1) <= 1.02).all()
    assert read > 0


def rounds(task: Task, data: ClientData, counted: int) -> tuple[Arrays, Arrays]:
    """What a client is left with after two rounds, the mean of the first being of itself and a stranger."""
    algorithm = OPTIONS.build(task, SEED)
    assert algorithm.make_aggregator is not None
    private = algorithm.client.initial_private(data)
    first = algorithm.client.train(algorithm.shared.initial(), private, data, Assignment(0.0, 5, server_round=1))
    assert first.upload is not None
    stranger = {OUTPUTS: np.full((10, 10), 0.1, np.float32), WEIGHTS: np.ones(10, np.float32)}
    means = mean_of([dict(first.upload), stranger])
    shared = algorithm.server.broadcast(means, algorithm.shared.initial(), Assignment(0.0, 0, server_round=1))
    second = algorithm.client.train(
        shared, first.private, data, Assignment(0.5, 6, server_round=2, counted_round=counted)
    )
    return second.private, shared


def test_a_client_whose_reply_was_lost_takes_nothing_out_of_the_mean(task: Task, data: ClientData) -> None:
    counted, _ = rounds(task, data, counted=1)
    lost, _ = rounds(task, data, counted=0)
    assert not same(under("model/", counted), under("model/", lost))


def test_in_the_first_round_clients_train_as_they_would_alone(task: Task, data: ClientData) -> None:
    first = Assignment(0.0, 5)
    fd = OPTIONS.build(task, SEED)
    alone = LocalOnlyOptions(local=LOCAL, optimizer=SGD).build(task, SEED)
    found = fd.client.train(fd.shared.initial(), fd.client.initial_private(data), data, first)
    expected = alone.client.train({}, alone.client.initial_private(data), data, first)
    for name, value in under("model/", expected.private).items():
        np.testing.assert_allclose(under("model/", found.private)[name], value, atol=1e-6)


def test_a_run_moves_a_few_hundred_bytes_a_round_and_scores_the_clients_own_models(run: Run) -> None:
    run_dir = run("algorithm.name=fd")
    rows = list(read_rows(run_dir / LEDGER_FILE))
    replies = [r for r in rows if r["kind"] == "message" and (r["purpose"], r["direction"]) == ("train", "uplink")]
    assert {row["payload_bytes"] for row in replies} == {2 + 10 + 10 * 9 * 2}
    assert all(row["wire_bytes"] < 1200 for row in replies)
    last = [row for row in rows if row["kind"] == "round"][-1]
    assert last["metrics"]["private_local"] and last["metrics"]["shared_global"] is None


def test_models_that_say_more_than_how_likely_each_class_is_are_refused(task: Task) -> None:
    class OfTokens(Without):
        def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
            out = super().forward(model, batch, hidden_states=hidden_states, attentions=attentions)
            return replace(out, logits=out.logits[:, None, :].expand(-1, 4, -1))

    with pytest.raises(ValueError, match=r"needs one output for each class, got shapes \[\(4, 10\)\]"):
        OPTIONS.build(OfTokens(task), SEED)


def test_a_label_that_no_client_holds_is_refused_before_training(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    report = task.data_report()
    counts = tuple((*of_client[:-1], 0) for of_client in report.label_counts)
    monkeypatch.setattr(task, "data_report", lambda: replace(report, label_counts=counts))
    with pytest.raises(ValueError, match="each label must be held by a client, got none with '9'"):
        OPTIONS.build(task, SEED)


def test_another_aggregator_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"server\.aggregator: must be left out with fd"):
        run("algorithm.name=fd", "server.aggregator.name=fedmedian")


def test_an_interrupted_run_goes_on_to_the_same_models(run: Run, tmp_path: Path) -> None:
    straight, resumed = run("algorithm.name=fd"), tmp_path / "resumed"
    run_in_process(small("algorithm.name=fd", "num_rounds=2"), client_app.app, resumed)
    run_in_process(small("algorithm.name=fd"), client_app.app, resumed, resume=True, force=True)
    # Adam's rate is constant by default, so it does not matter that the first part was to have two rounds.
    scores = [
        [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "final"][-1]["metrics"]
        for run_dir in (straight, resumed)
    ]
    assert scores[0] == scores[1]
