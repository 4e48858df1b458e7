"""Fine-tuning by outputs: the round, the cache, other backbones, and whole runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedkd_flwr.algorithms.base import Algorithm
from fedkd_flwr.algorithms.lora import backbone_digest
from fedkd_flwr.algorithms.lora_kd import LoraKDOptions
from fedkd_flwr.algorithms.soft_labels import HEADER_BYTES, SOFT_LABELS
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.losses import kl_divergence
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.flower import runtime
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.tasks.digits import DigitsOptions
from fedkd_flwr.tasks.partition import IidPartition
from fedkd_flwr.tasks.public import HeldOutOptions, PublicRows
from tests.algorithms.conftest import FIRST, ONE_STEP, SECOND, SEED, Counting, same, under, vit
from tests.algorithms.little import NUM_CLASSES, Little, Net
from tests.conftest import Run, small

NUM_PUBLIC, ASKED = 60, 20
LORA_KD = "algorithm={name: lora_kd, lora: {rank: 2}, num_asked: 20, local: {num_epochs: 1, batch_size: 128}}"
PUBLIC = f"task.public={{num_examples: {NUM_PUBLIC}}}"


class Public(Little):
    """The first words are public, too."""

    def public_examples(self) -> PublicRows:
        return PublicRows(np.arange(16), lambda rows, positions: self._public(rows, positions))

    def _public(self, rows: np.ndarray, positions: np.ndarray):  # type: ignore[no-untyped-def]
        from fedkd_flwr.tasks.base import TensorExamples

        return TensorExamples({"words": self._words[torch.from_numpy(rows)], "labels": torch.from_numpy(positions)})


@pytest.fixture(scope="module")
def public_task() -> Task:
    public = HeldOutOptions(num_examples=NUM_PUBLIC)
    return DigitsOptions(partition=IidPartition(), teacher=vit(2), student=vit(1), public=public).build(10, 0)


def build(task: Task, **options: object) -> Algorithm:
    chosen = {"lora": {"rank": 2}, "num_asked": ASKED, "local": ONE_STEP, **options}
    return LoraKDOptions.model_validate(chosen).build(task, SEED)


def answered(algorithm: Algorithm, shared: Arrays, upload: Arrays) -> Arrays:
    """The next version, if everybody said this."""
    return algorithm.shared.apply(shared, algorithm.server.broadcast(upload, shared, FIRST))


def test_a_client_says_something_of_each_example_that_is_asked(public_task: Task) -> None:
    algorithm, data = build(public_task), public_task.client_data(0)
    trained = algorithm.client.train(algorithm.shared.initial(), algorithm.client.initial_private(data), data, FIRST)
    assert trained.upload is not None
    rows = trained.upload[SOFT_LABELS]
    assert rows.shape == (ASKED, 10)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


def test_nothing_frozen_moves_or_is_kept(public_task: Task) -> None:
    algorithm, data = build(public_task), public_task.client_data(0)
    module = algorithm.client._models.of(data)  # type: ignore[attr-defined]
    before = backbone_digest(module)
    private = algorithm.client.initial_private(data)
    trained = algorithm.client.train(algorithm.shared.initial(), private, data, FIRST)
    assert backbone_digest(module) == before
    kept = [name for name in trained.private if name.startswith("model/")]
    assert kept and all(".lora_" in name or "classifier" in name for name in kept)
    assert not same(private, {name: trained.private[name] for name in private})


def test_a_version_holds_what_was_answered_where_it_was_asked(public_task: Task) -> None:
    algorithm = build(public_task)
    shared = algorithm.shared.initial()
    said = np.random.default_rng(0).dirichlet([1.0] * 10, ASKED).astype(np.float32)
    after = answered(algorithm, shared, {SOFT_LABELS: said})
    assert not shared[SOFT_LABELS].any()
    assert int(after["version"][0]) == 1
    labelled = np.flatnonzero(after[SOFT_LABELS].any(axis=1))
    assert len(labelled) == ASKED
    np.testing.assert_allclose(np.sort(after[SOFT_LABELS][labelled], axis=0), np.sort(said, axis=0), atol=1e-3)


def test_a_known_example_is_not_asked_again(public_task: Task) -> None:
    algorithm, data = build(public_task), public_task.client_data(0)
    shared, uniform = algorithm.shared.initial(), {SOFT_LABELS: np.full((ASKED, 10), 0.1, np.float32)}
    for version in range(1, NUM_PUBLIC // ASKED + 1):
        shared = answered(algorithm, shared, uniform)
        assert np.count_nonzero(shared[SOFT_LABELS].any(axis=1)) == version * ASKED
    assert algorithm.client.train(shared, algorithm.client.initial_private(data), data, FIRST).upload is not None


def test_distilling_moves_a_model_towards_what_is_known(public_task: Task) -> None:
    how = {"num_epochs": 30, "optimizer": {"learning_rate": 0.01}}
    algorithm = build(public_task, server_distillation={**how, "num_replayed": None})
    said = np.eye(10, dtype=np.float32)[np.arange(ASKED) % 10] * 0.9 + 0.01
    shared = answered(algorithm, algorithm.shared.initial(), {SOFT_LABELS: said})
    distiller, server = algorithm.server._distiller, algorithm.server  # type: ignore[attr-defined]
    gaps = []
    for _ in range(2):
        answers = distiller.ask(server._model, algorithm.shared.initial())[SOFT_LABELS]  # type: ignore[attr-defined]
        gaps.append(float(kl_divergence(torch.tensor(answers).log(), torch.tensor(said).log()).mean()))
        server.learn(shared, FIRST)  # type: ignore[attr-defined]
    assert gaps[1] < 0.8 * gaps[0]


def test_what_was_learned_once_is_not_learned_again_unless_replayed(public_task: Task) -> None:
    counting = Counting(public_task)
    counting.public_examples = public_task.public_examples  # type: ignore[attr-defined]
    numbers = {}
    for replayed in (0, 7):
        algorithm = build(counting, distillation={"num_replayed": replayed, "batch_size": 1})
        data = public_task.client_data(0)
        uniform = {SOFT_LABELS: np.full((ASKED, 10), 0.1, np.float32)}
        private, shared = algorithm.client.initial_private(data), algorithm.shared.initial()
        private = algorithm.client.train(shared, private, data, FIRST).private
        shared = answered(algorithm, answered(algorithm, shared, uniform), uniform)
        calls = []
        for assignment in (FIRST, SECOND):
            before = len(counting.calls)
            private = algorithm.client.train(shared, private, data, assignment).private
            calls.append(len(counting.calls) - before)
        numbers[replayed] = calls
    own = 2  # a batch of its own data, a batch that it is asked
    assert numbers[0] == [2 * ASKED + own, own]
    assert numbers[7] == [2 * ASKED + own, 7 + own]


def test_clients_with_other_backbones_and_ranks_say_the_same_kind_of_thing() -> None:
    task = Public(teachers=(Net(), Net(width=6, num_layers=3)))
    algorithm = build(task, num_asked=8, ranks=[1, 3], lora={"target_modules": ["layers.0"]})
    for client in (0, 1):
        data = task.client_data(client)
        trained = algorithm.client.train(
            algorithm.shared.initial(), algorithm.client.initial_private(data), data, FIRST
        )
        assert trained.upload is not None
        assert trained.upload[SOFT_LABELS].shape == (8, NUM_CLASSES)


def test_ranks_are_dealt_in_turn(public_task: Task) -> None:
    algorithm = build(public_task, ranks=[1, 2, 5])
    ranks = [
        next(
            v.shape[0] for n, v in algorithm.client.initial_private(public_task.client_data(c)).items() if "lora_A" in n
        )
        for c in range(4)
    ]
    assert ranks == [1, 2, 5, 1]


def test_no_client_has_a_public_example(public_task: Task) -> None:
    def images(examples: object) -> set[bytes]:
        batches = examples.batches(4096)  # type: ignore[attr-defined]
        return {image.numpy().tobytes() for batch in batches for image in batch["pixel_values"]}

    public = images(public_task.public_examples().select(range(NUM_PUBLIC)))  # type: ignore[attr-defined]
    assert len(public) == NUM_PUBLIC
    for client in range(10):
        data = public_task.client_data(client)
        assert not public & (images(data.train) | images(data.test))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((LORA_KD,), "task.public: required by lora_kd"),
        ((LORA_KD, "task.public={num_examples: 10}"), "algorithm.num_asked must be at most 10, the public examples"),
        ((LORA_KD, "task.public={num_examples: 5000}"), "task.public.num_examples must be at most 1437"),
        ((LORA_KD, PUBLIC, "server.aggregator.name=fedmedian"), "server.aggregator: must be left out with lora_kd"),
        (
            (LORA_KD, PUBLIC, "compressor.name=identity", "privacy={clip_norm: 1, noise_multiplier: 1}"),
            "privacy: must be null with lora_kd",
        ),
        (
            (LORA_KD, PUBLIC, "algorithm.lora.target_modules=[nowhere]"),
            "algorithm.lora.target_modules: a ViTForImageClassification has no linear or convolutional layer 'nowhere'",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(overrides: tuple[str, ...], message: str) -> None:
    experiment = small(*overrides)
    with pytest.raises(Exception, match=message.replace("(", r"\(")) as caught:
        experiment.build_algorithm(experiment.build_task())
    assert "\n" not in str(caught.value)


def test_a_run_moves_the_bytes_of_the_formula_and_both_kinds_of_models_learn(run: Run) -> None:
    run_dir = run(LORA_KD, PUBLIC, "num_rounds=2", "algorithm.uplink=top_k")
    messages = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "message"]
    up = {row["payload_bytes"] for row in messages if row["direction"] == "uplink" and row["purpose"] == "train"}
    assert up == {HEADER_BYTES + ASKED * 4 // 8}
    down = {row["payload_bytes"] for row in messages if row["direction"] == "downlink" and row["round"] == 2}
    assert down == {HEADER_BYTES + ASKED * 10}
    final = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "final"][-1]
    assert final["metrics"]["shared_global"]["accuracy"] > 0
    assert final["metrics"]["private_local"]["accuracy"] > 0
    assert len(list((run_dir / "state").glob("*/*/private_model/model.safetensors"))) == 3


def test_the_losses_and_answers_are_those_of_the_temperature(public_task: Task) -> None:
    """tau^2 KL(said || softmax(z / tau)) and softmax(z / tau), in float64 from the model's own logits."""
    tau = 2.0
    algorithm = build(
        public_task,
        temperature=tau,
        distillation={"num_epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "learning_rate": 1e-9}},
        optimizer={"name": "sgd", "learning_rate": 1e-9},
    )
    data, shared = public_task.client_data(0), algorithm.shared.initial()
    private = algorithm.client.initial_private(data)
    said = np.random.default_rng(0).dirichlet(np.ones(10), ASKED).astype(np.float32)
    known = answered(algorithm, shared, {SOFT_LABELS: said})
    trained = algorithm.client.train(known, private, data, SECOND)

    distiller = algorithm.client._distiller  # type: ignore[attr-defined]
    module = algorithm.client._models.of(data)  # type: ignore[attr-defined]

    def logits_of(version: int) -> np.ndarray:
        positions = distiller._schedule.asked(version)
        public = public_task.public_examples()  # type: ignore[attr-defined]
        found = public_task.predict(module, public.select(positions.tolist()))
        order = {int(label): row for label, row in zip(found.labels, found.log_probabilities, strict=True)}
        return np.stack([order[int(position)] for position in positions]).astype(np.float64)

    def softmax(values: np.ndarray) -> np.ndarray:
        raised = np.exp(values - values.max(1, keepdims=True))
        return np.asarray(raised / raised.sum(1, keepdims=True))

    assert trained.upload is not None
    np.testing.assert_allclose(trained.upload[SOFT_LABELS], softmax(logits_of(1) / tau), atol=1e-5)
    target = said.astype(np.float64)
    expected = tau**2 * (target * (np.log(target) - np.log(softmax(logits_of(0) / tau)))).sum(1).mean()
    assert trained.metrics["distillation_loss"] == pytest.approx(expected, rel=2e-3)  # what is known is float16


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ({"name": "none"}, [0.6, 0.3, 0.1]),
        ({"name": "power", "beta": 2.0}, [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]),
        ({"name": "temperature", "temperature": 0.5}, [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]),
        ({"name": "ds_fl", "temperature": 0.1}, np.exp([6.0, 3.0, 1.0]) / np.exp([6.0, 3.0, 1.0]).sum()),
    ],
)
def test_what_goes_back_is_reduced_as_the_options_say(reduction: dict[str, object], expected: object) -> None:
    lora = {"rank": 2, "target_modules": ["layers.0"]}
    algorithm = build(Public(), num_asked=4, lora=lora, entropy_reduction=reduction)
    aggregate = {SOFT_LABELS: np.tile(np.array([0.6, 0.3, 0.1], np.float32), (4, 1))}
    found = algorithm.server.broadcast(aggregate, algorithm.shared.initial(), FIRST)[SOFT_LABELS]
    np.testing.assert_allclose(found, np.tile(np.asarray(expected), (4, 1)), rtol=1e-5)


def test_clients_count_as_the_option_says(public_task: Task) -> None:
    rows = np.array([[0.8, 0.2], [0.2, 0.8]], np.float32)[:, None, :]
    for weighting, expected in (("uniform", 0.5), ("num_examples", 0.35)):
        algorithm = build(public_task, weighting=weighting)
        assert algorithm.make_aggregator is not None
        rule = algorithm.make_aggregator()
        rule.begin(1)
        for row, number in zip(rows, (10, 30), strict=True):
            rule.add({SOFT_LABELS: row}, number, None)
        result = rule.result()
        assert result is not None
        assert result[SOFT_LABELS][0, 0] == pytest.approx(expected)


def test_logit_adjustment_changes_what_clients_learn(public_task: Task) -> None:
    data = replace(public_task.client_data(0), label_counts=(100, *[1] * 9))
    models = []
    for strength in (0.0, 1.0):
        algorithm = build(public_task, logit_adjustment=strength)
        private = algorithm.client.initial_private(data)
        models.append(algorithm.client.train(algorithm.shared.initial(), private, data, FIRST).private)
    # A class that is common here is to count less: the head's bias for it ends lower.
    bias = [under("model/", model)["classifier.bias"] for model in models]
    assert bias[1][0] - bias[1][1:].mean() < bias[0][0] - bias[0][1:].mean()


def end_of(run_dir: Path) -> tuple[Arrays, object]:
    final = [row for row in read_rows(run_dir / LEDGER_FILE) if row["kind"] == "final"][-1]
    return load_file(run_dir / "student" / "model.safetensors"), final["metrics"]


def test_a_second_run_in_one_process_begins_afresh(run: Run) -> None:
    first, second = (end_of(run(LORA_KD, PUBLIC, "num_rounds=2")) for _ in range(2))
    assert same(first[0], second[0])
    assert first[1] == second[1]


def test_a_run_that_was_interrupted_resumes_to_the_same_models(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client_app

    whole = end_of(run(LORA_KD, PUBLIC))
    experiment, directory = small(LORA_KD, PUBLIC), tmp_path / "broken"
    runtime._built.cache_clear()
    with monkeypatch.context() as patch:
        real = Exchange.configure_train

        def deadly(exchange: Exchange, server_round: int, *arguments: object) -> object:
            if server_round == 3:
                raise KeyboardInterrupt
            return real(exchange, server_round, *arguments)  # type: ignore[arg-type]

        patch.setattr(Exchange, "configure_train", deadly)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(experiment, client_app.app, directory)
    runtime._built.cache_clear()
    run_in_process(experiment, client_app.app, directory, resume=True)
    resumed = end_of(directory)
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_a_node_with_other_public_examples_is_not_taken_in(run: Run) -> None:
    from flwr.app import Context, Message

    import client_app

    def app(message: Message, context: Context) -> Message:
        foundations = message.content.config_records.get("foundations")
        if foundations is not None:
            foundations["public examples"] = bytes(32)
        return client_app.app(message, context)

    with pytest.raises(Exception, match="the public examples must be the same on all nodes: digest") as caught:
        run(LORA_KD, PUBLIC, "server.connect_timeout_seconds=5", app=app)
    assert "\n" not in str(caught.value)
