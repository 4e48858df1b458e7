"""Stacked adapters: the mean of products, any rank, and what they cost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn
from transformers import ViTForImageClassification

from fedkd_flwr.algorithms.adapter_stack import (
    HEAD,
    HEADER_BYTES,
    A,
    AdapterCodec,
    AdapterStack,
    B,
    ProductLength,
    products,
)
from fedkd_flwr.algorithms.base import Algorithm
from fedkd_flwr.algorithms.flora import FloraOptions, SharedWeights
from fedkd_flwr.algorithms.lora import AdaptedModels, LoraOptions
from fedkd_flwr.core.arrays import Array, Arrays, TensorSpec
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from tests.algorithms.conftest import FIRST, LOCAL, SEED, same
from tests.conftest import Run, small

MATRICES, HEAD_SPEC, ALPHA = {"one": (5, 7), "two": (3, 4)}, (TensorSpec("bias", (2,)),), 6.0
FLORA = "algorithm={name: flora, lora: {rank: 2}, ranks: [1, 2, 4], local: {num_epochs: 1, batch_size: 128}}"


def adapters(rank: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {HEAD + "bias": rng.normal(size=2).astype(np.float32)}
    for name, (rows, columns) in MATRICES.items():
        found[A + name] = rng.normal(size=(rank, columns)).astype(np.float32)
        found[B + name] = rng.normal(size=(rows, rank)).astype(np.float32)
    return found


def build(task: Task, **options: object) -> Algorithm:
    return FloraOptions.model_validate({"lora": {"rank": 2}, "local": LOCAL, **options}).build(task, SEED)


@pytest.mark.parametrize("weighting", ["uniform", "num_examples"])
def test_the_stacks_product_is_the_mean_of_the_products(weighting: str) -> None:
    uploads, counts = [adapters(rank, seed) for seed, rank in enumerate((1, 2, 4))], [10, 30, 60]
    stack = AdapterStack(ALPHA, weighting)  # type: ignore[arg-type]
    stack.begin(1)
    for upload, count in zip(uploads, counts, strict=True):
        stack.add(upload, count, None)
    stacked = stack.result()
    assert stacked is not None
    shares = np.array(counts) / 100 if weighting == "num_examples" else np.full(3, 1 / 3)
    for name in MATRICES:
        by_hand = sum(
            share * ALPHA / len(u[A + name]) * u[B + name].astype(float) @ u[A + name].astype(float)
            for share, u in zip(shares, uploads, strict=True)
        )
        np.testing.assert_allclose(products(stacked)[name], by_hand, rtol=1e-5, atol=1e-6)
        assert stacked[A + name].shape[0] == stacked[B + name].shape[1] == 1 + 2 + 4
    mean = np.average([upload[HEAD + "bias"] for upload in uploads], axis=0, weights=shares)
    np.testing.assert_allclose(stacked[HEAD + "bias"], mean, rtol=1e-5)


def test_the_product_of_means_is_another_matrix() -> None:
    uploads = [adapters(2, seed) for seed in range(3)]
    stack = AdapterStack(2.0, "uniform")
    stack.begin(1)
    for upload in uploads:
        stack.add(upload, 1, None)
    stacked = stack.result()
    assert stacked is not None
    a, b = (np.mean([u[part + "one"] for u in uploads], axis=0) for part in (A, B))
    assert np.abs(products(stacked)["one"] - b @ a).max() > 0.1


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("float16", 2)])
@pytest.mark.parametrize("rank", [1, 3])
def test_bytes_are_those_of_the_rank(precision: str, width: int, rank: int) -> None:
    codec = AdapterCodec(MATRICES, HEAD_SPEC, precision, 3)  # type: ignore[arg-type]
    upload = adapters(rank, 0)
    payload, _ = codec.encode(upload, {}, progress=0.0, seed=0)
    assert len(payload) == HEADER_BYTES + width * (rank * (5 + 7 + 3 + 4) + 2)
    decoded, _ = codec.decode(payload, {})
    assert decoded.keys() == upload.keys()
    for name, value in upload.items():
        np.testing.assert_allclose(decoded[name], value, rtol=0 if width == 4 else 1e-3, atol=0 if width == 4 else 1e-4)


def test_payloads_that_are_none_are_refused() -> None:
    codec = AdapterCodec(MATRICES, HEAD_SPEC, "float32", 3)
    payload, _ = codec.encode(adapters(2, 0), {}, progress=0.0, seed=0)
    beyond, _ = AdapterCodec(MATRICES, HEAD_SPEC, "float32", 9).encode(adapters(4, 0), {}, progress=0.0, seed=0)
    infinite = payload[:-4] + np.array([np.inf], "<f4").tobytes()
    without_rank = payload[:5] + bytes(4) + payload[9:]
    for wrong in (payload[:-1], payload + b"\0", b"", b"XXX" + payload[3:], beyond, infinite, without_rank):
        with pytest.raises(ValueError):
            codec.decode(wrong, {})


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_an_upload_is_as_long_as_what_it_adds_to_the_weights(rank: int) -> None:
    upload, length = adapters(rank, rank), ProductLength(ALPHA)
    stack = AdapterStack(ALPHA, "uniform")
    stack.begin(1)
    stack.add(upload, 1, None)
    stacked = stack.result()
    assert stacked is not None
    added = [*products(stacked).values(), stacked[HEAD + "bias"]]
    expected = np.sqrt(sum(np.square(value.astype(float)).sum() for value in added))
    assert length.norm(upload) == pytest.approx(expected, rel=1e-5)
    shortened = length.scaled(upload, 0.25)
    assert length.norm(shortened) == pytest.approx(0.25 * expected, rel=1e-5)
    for name in MATRICES:
        product = shortened[B + name] @ shortened[A + name]
        np.testing.assert_allclose(product, 0.25 * upload[B + name] @ upload[A + name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shortened[HEAD + "bias"], 0.25 * upload[HEAD + "bias"])


def test_a_high_rank_is_believed_and_a_long_product_is_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flora = "algorithm={name: flora, lora: {rank: 2}, ranks: [1, 1, 16], local: {num_epochs: 1, batch_size: 128}}"

    def rejected(run_dir: Path) -> set[tuple[str, str]]:
        rows = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "round"]
        return {(rejection["client"], rejection["kind"]) for row in rows for rejection in row["rejected"]}

    assert rejected(run(flora, "num_rounds=2")) == set()
    honest = AdapterCodec.encode

    def encode(codec: AdapterCodec, update: Arrays, *rest: Any, **how: Any) -> Any:
        rank = next(len(value) for name, value in update.items() if name.startswith(A))
        factor = 100 if rank == 16 else 1
        longer = {name: value * factor if name.startswith(B) else value for name, value in update.items()}
        return honest(codec, longer, *rest, **how)

    monkeypatch.setattr(AdapterCodec, "encode", encode)
    assert rejected(run(flora, "num_rounds=2", "seed=2")) == {("00002", "norm")}


def test_statistics_that_training_would_move_are_refused() -> None:
    class Normalised(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)

    options = FloraOptions(lora=LoraOptions(rank=2, target_modules=("body",), trained_modules=("head",)))
    adapted = AdaptedModels((Normalised(),), options.lora, None, 0)
    with pytest.raises(ValueError, match=r"flora averages no statistics of a model such as 'norm\.running_mean'"):
        SharedWeights(None, adapted, options)  # type: ignore[arg-type]


def test_a_client_sends_adapters_of_its_rank_and_keeps_nothing(task: Task) -> None:
    algorithm = build(task, ranks=[1, 3])
    for client, rank in ((0, 1), (1, 3)):
        trained = algorithm.client.train(algorithm.shared.initial(), {}, task.client_data(client), FIRST)
        assert trained.upload is not None
        assert {value.shape[0] for name, value in trained.upload.items() if name.startswith(A)} == {rank}
        assert any(value.any() for name, value in trained.upload.items() if name.startswith(B))
        assert trained.private == {}


def test_clients_of_other_ranks_in_one_process_do_not_disturb_each_other(task: Task) -> None:
    algorithm, alone = build(task, ranks=[1, 3]), build(task, ranks=[1, 3])
    shared = algorithm.shared.initial()
    first = algorithm.client.train(shared, {}, task.client_data(0), FIRST).upload
    assert first is not None
    stack = AdapterStack(16.0, "uniform")
    stack.begin(1)
    stack.add(first, 1, None)
    moved = algorithm.shared.apply(shared, stack.result() or {})
    algorithm.client.train(moved, {}, task.client_data(0), FIRST)
    algorithm.server.evaluate(moved, task.test_data())
    ours = algorithm.client.train(shared, {}, task.client_data(1), FIRST).upload
    theirs = alone.client.train(shared, {}, task.client_data(1), FIRST).upload
    assert ours is not None and theirs is not None
    assert same(ours, theirs)


def test_a_version_says_what_the_trained_client_said(task: Task) -> None:
    """With one client the product that is added is what its adapters did."""
    algorithm, data = build(task), task.client_data(0)
    shared = algorithm.shared.initial()
    upload = algorithm.client.train(shared, {}, data, FIRST).upload
    assert upload is not None
    module = algorithm.client._shared.module_of(data)  # type: ignore[attr-defined]
    examples = task.test_data()
    trained = task.predict(module, examples).log_probabilities
    stack = AdapterStack(16.0, "uniform")
    stack.begin(1)
    stack.add(upload, 1, None)
    moved = algorithm.shared.apply(shared, stack.result() or {})
    loaded = algorithm.client._shared.load(moved, module)  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.stack(task.predict(loaded, examples).log_probabilities), np.stack(trained), atol=1e-4)


def test_a_run_of_three_ranks_moves_up_what_each_has_and_down_the_sum(run: Run) -> None:
    run_dir = run(FLORA, "num_rounds=2")
    messages = [
        row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "message" and row["purpose"] == "train"
    ]
    of_layers, head = 2 * 2 * (16 + 16), 16 * 10 + 10  # query and value of two layers, for each rank
    up = sorted({row["payload_bytes"] for row in messages if row["direction"] == "uplink"})
    assert up == [HEADER_BYTES + 4 * (rank * of_layers + head) for rank in (1, 2, 4)]
    down = {row["payload_bytes"] for row in messages if row["direction"] == "downlink" and row["round"] == 2}
    assert down == {HEADER_BYTES + 4 * (7 * of_layers + head)}
    loaded = ViTForImageClassification.from_pretrained(run_dir / "student")
    assert loaded.state_dict().keys() == small().build_task().build_models(0).teacher.state_dict().keys()


def test_the_same_run_twice_ends_with_the_same_model(run: Run) -> None:
    first, second = (load_file(run(FLORA, "num_rounds=2") / "student" / "model.safetensors") for _ in range(2))
    assert same(first, second)


def test_privacy_and_other_aggregators_are_refused() -> None:
    from fedkd_flwr.experiment import ConfigError

    for override in ("server.aggregator.name=fedmedian", "privacy={clip_norm: 1, noise_multiplier: 1}"):
        experiment = small(FLORA, "compressor.name=identity", override)
        with pytest.raises(ConfigError, match=r"(server\.aggregator|privacy): must be .* with flora"):
            experiment.build_algorithm(experiment.build_task())
