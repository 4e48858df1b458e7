import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import client_app
from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.experiment import parse
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.tasks.news_recommendation import NewsRecommendation, impression_scores
from fedkd_flwr.tasks.recommender import NewsRecommender, load_recommender
from tests.tasks.conftest import BEGIN, END, SPECIAL, everything, state, write_tokenizer
from tests.tasks.news_data import (
    NUM_USERS,
    TINY,
    USER,
    WORDS,
    Build,
    builder,
    held,
    impression,
    planted,
    rows_of,
    split,
    write_lists,
)

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lists(tmp_path_factory.mktemp("news"), *split(planted()))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(tmp_path_factory.mktemp("tokenizer"))


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def task(stored: Path, build: Build) -> NewsRecommendation:
    return build(stored)


@pytest.fixture
def model(task: NewsRecommendation) -> nn.Module:
    student = task.build_models(0).student
    assert isinstance(student, NewsRecommender)
    nn.init.normal_(student.heads.unknown_user)
    return student.eval()


def test_a_user_is_one_clients_and_all_training_impressions_are_someones(stored: Path, build: Build) -> None:
    task = build(stored, partition=USER)
    news, train, test = split(planted())
    clients = [task.client_data(client) for client in range(3)]
    numbers = {row["news_id"]: number for number, row in enumerate(news)}
    for kind, all_rows in (("train", train), ("test", test)):
        users = {json.dumps([numbers[n] for n in row["history"]]): row["user_id"] for row in all_rows}
        of_client = [{users[json.dumps(row[0])] for row in rows_of(getattr(data, kind))} for data in clients]
        assert sum(map(len, of_client)) == NUM_USERS and set.union(*of_client) == set(users.values())
        assert sum(len(rows_of(getattr(data, kind))) for data in clients) == len(all_rows)


@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "size"}], ids=str)
def test_other_partitions_hold_rows_out(partition: object, stored: Path, build: Build) -> None:
    clients = [build(stored, partition=partition).client_data(client) for client in range(3)]
    assert all(len(data.train) and len(data.test) for data in clients)
    assert sum(len(data.train) + len(data.test) for data in clients) == len(split(planted())[1])


def test_the_report_counts_impressions(stored: Path, build: Build) -> None:
    report = build(stored, 4, partition=USER).data_report()
    assert report.label_names == ("impressions",)
    assert report.label_counts == ((8,),) * 4 and report.notes == ()


def test_padding_changes_no_score(task: NewsRecommendation, model: NewsRecommender) -> None:
    batch = dict(everything(task.test_data()))
    longer = dict(batch)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("token_type_ids", 0)):
        if name in batch:
            longer[name] = nn.functional.pad(batch[name], (0, 5), value=fill)
    for name in ("history", "history_mask"):
        longer[name] = nn.functional.pad(batch[name], (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(model(longer)[0], model(batch)[0], atol=1e-6, rtol=1e-5)


def test_scores_of_a_batch_and_of_whole_impressions_agree(task: NewsRecommendation, model: NewsRecommender) -> None:
    examples = held(task.test_data())
    whole = impression_scores(model, examples)
    batch = everything(examples)
    out = task.forward(model, batch, hidden_states=False, attentions=False)
    # Five were shown with one click, so an example has them all, in another order.
    for row, logits, place in zip(range(len(whole)), out.logits, out.labels, strict=True):
        np.testing.assert_allclose(np.sort(whole[row]), np.sort(logits.detach().numpy()), rtol=1e-4, atol=1e-6)
        clicked = whole[row][examples.labels[row] == 1]
        np.testing.assert_allclose(clicked, [logits[place].item()], rtol=1e-4, atol=1e-6)


def test_of_who_read_nothing_what_most_click_is_assumed(tmp_path: Path, build: Build) -> None:
    news, train, test = split(planted())
    nobody = [{**row, "history": []} for row in test]
    task = build(write_lists(tmp_path, news, train, nobody))
    model = task.build_models(0).student
    for batch in (everything(task.test_data()), next(iter(task.test_data().batches(1)))):
        model.zero_grad()
        out = task.forward(model, batch, hidden_states=False, attentions=False)
        assert torch.equal(out.logits, torch.zeros_like(out.logits))  # where nothing is learned yet
        nn.functional.cross_entropy(out.logits, out.labels).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert isinstance(model, NewsRecommender) and model.heads.unknown_user.grad is not None
        assert model.heads.unknown_user.grad.abs().sum() > 0
    assert score_of(task, model, task.test_data())["auc"] == pytest.approx(0.5)


def test_what_stands_in_a_gap_does_not_get_into_a_mean(model: NewsRecommender) -> None:
    states, mask = torch.randn(3, 4, 16), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    clean = model.heads.articles(states, mask)
    dirty = states.clone()
    dirty[~mask] = float("nan")
    assert torch.equal(model.heads.articles(dirty, mask), clean)
    assert torch.equal(model.heads.over_pieces(states, mask)[2], torch.zeros(16))


def test_scores_are_scikit_learns_and_those_of_the_formulas(tmp_path: Path, build: Build) -> None:
    news, train, _ = split(planted())
    rng = np.random.default_rng(1)
    test = [
        impression("U0", ["N1"], [(f"N{n}", int(i < 1 + row % 3)) for i, n in enumerate(rng.permutation(60)[:20])])
        for row in range(12)
    ]
    task = build(write_lists(tmp_path, news, train, test))
    model, examples = task.build_models(3).teacher, held(task.test_data())
    scores = impression_scores(model, examples)
    labels = [examples.labels[row] for row in range(len(scores))]
    # Titles may repeat, and then scores tie; the formulas below want an order.
    assert all(len(np.unique(of_one)) == len(of_one) for of_one in scores)
    expected: dict[str, list[float]] = {"auc": [], "mrr": [], "ndcg_5": [], "ndcg_10": [], "loss": []}
    for y, s in zip(labels, scores, strict=True):
        ranked = y[np.argsort(-s)]
        expected["auc"].append(float(roc_auc_score(y, s)))
        expected["mrr"].append(sum(label / (rank + 1) for rank, label in enumerate(ranked)) / y.sum())
        for k in (5, 10):
            best = sum(1 / np.log2(rank + 2) for rank in range(min(k, y.sum())))
            found = sum(label / np.log2(rank + 2) for rank, label in enumerate(ranked[:k]))
            assert found / best == pytest.approx(ndcg_score([y], [s], k=k))
            expected[f"ndcg_{k}"].append(found / best)
        expected["loss"] += (np.log(np.exp(s).sum()) - s[y == 1]).tolist()
    found = score_of(task, model, examples)
    assert list(found) == list(expected)
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()}, rel=1e-6)


def test_a_model_that_prefers_nothing_scores_as_chance(task: NewsRecommendation, model: NewsRecommender) -> None:
    nn.init.zeros_(model.heads.projection.weight)
    nn.init.zeros_(model.heads.projection.bias)
    found = score_of(task, model, task.test_data())
    chance = {"auc": 0.5, "mrr": np.mean(1 / np.arange(1, 6)), "loss": np.log(5)}
    assert {name: found[name] for name in chance} == pytest.approx(chance)
    nn.init.constant_(model.heads.projection.bias, float("nan"))
    diverged = score_of(task, model, task.test_data())
    assert np.isnan(diverged["loss"]) and diverged["auc"] == 0.5


def test_a_candidate_that_is_ruled_out_is_last_and_the_others_keep_their_places(
    task: NewsRecommendation, model: nn.Module
) -> None:
    examples = task.test_data()
    predicted = task.predict(model, examples)
    last = [np.where(of_one == of_one.min(), -np.inf, of_one) for of_one in predicted.log_probabilities]
    expected = task.score(predicted, examples)
    found = task.score(replace(predicted, log_probabilities=last), examples)
    assert expected["auc"] != 0.5
    assert found == expected | {"loss": found["loss"]}


def test_the_student_begins_as_the_first_layers_of_its_teacher_with_its_heads(
    stored: Path, tmp_path: Path, build: Build
) -> None:
    torch.manual_seed(5)
    BertModel(BertConfig(**{k: v for k, v in TINY.items() if k != "model_type"})).save_pretrained(tmp_path / "bert")
    source = {"source": str(tmp_path / "bert")}
    other = [{"clients": [1], "model": {"config": {**TINY, "hidden_size": 8}}}]
    task = build(stored, teacher=source, freeze_embeddings=True)
    models = task.build_models(0)
    teacher, student = state(models.teacher), state(models.student)
    assert all(torch.equal(teacher[name], value) for name, value in student.items())
    trainable = {name for name, parameter in models.student.named_parameters() if parameter.requires_grad}
    assert not any("embeddings" in name or "pooler" in name for name in trainable)
    assert {"heads.projection.weight", "encoder.encoder.layer.0.output.dense.weight"} <= trainable
    assert all(torch.equal(value, state(task.build_models(0).teacher)[name]) for name, value in teacher.items())
    several = build(stored, teacher=source, other_teachers=other)
    assert [several.client_data(client).teacher for client in range(3)] == [0, 1, 0]
    (narrow,) = several.build_models(0).other_teachers
    assert np.isfinite(score_of(several, narrow, several.test_data())["loss"])


def test_hidden_states_and_attention_maps_are_the_articles(task: NewsRecommendation) -> None:
    models = task.build_models(0)
    for batch in (next(iter(task.test_data().batches(4, 0))), task.example_batch()):
        out = task.forward(models.teacher, batch, hidden_states=True, attentions=True)
        articles, tokens = batch["input_ids"].shape
        assert out.logits.shape == (len(batch["labels"]), 5)
        assert out.hidden_states and [tuple(s.shape) for s in out.hidden_states] == [(articles, tokens, 16)] * 3
        assert out.attentions and [tuple(a.shape) for a in out.attentions] == [(articles, 2, tokens, tokens)] * 2
        assert out.token_mask is not None and torch.equal(out.token_mask, batch["attention_mask"])
        assert len(next(iter(batch.values()))) == len(batch["labels"])


def test_an_export_scores_the_same(task: NewsRecommendation, model: NewsRecommender, tmp_path: Path) -> None:
    task.export(model, tmp_path)
    loaded = load_recommender(tmp_path)
    assert score_of(task, loaded, task.test_data()) == score_of(task, model, task.test_data())
    encoder = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, state(encoder)[name]) for name, value in state(model.encoder).items())
    assert AutoTokenizer.from_pretrained(tmp_path)("t0w0")["input_ids"] == [BEGIN, len(SPECIAL), END]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedkd"])
def test_a_planted_taste_is_learned(algorithm: str, tmp_path: Path) -> None:
    folder = write_lists(tmp_path / "data", *split(planted(120, 360, num_users=12)))
    write_tokenizer(tmp_path / "tokenizer", WORDS)
    optimizer = "{name: adamw, learning_rate: 0.01}"
    of = (
        f"optimizer: {optimizer}"
        if algorithm == "fedavg"
        else (f"student_optimizer: {optimizer}\n  teacher_optimizer: {optimizer}")
    )
    experiment = parse(
        f"""
name: planted
num_clients: 3
num_rounds: 3
task:
  name: news_recommendation
  data: {folder}
  tokenizer: {tmp_path}/tokenizer
  teacher: {{config: {json.dumps(TINY)}}}
  student: {{name: layers, num_layers: 1}}
  news_dim: 16
  attention_dim: 16
  partition: {{name: natural, column: user_id, grouped: true}}
algorithm:
  name: {algorithm}
  local: {{num_epochs: 2, batch_size: 16}}
  {of}
""",
        (),
    )
    directory = run_in_process(experiment, client_app.app, tmp_path / "run")
    summary = read_summary(directory)
    assert summary is not None and summary["status"] == "completed"
    assert summary["metrics"]["shared_global"]["auc"] > 0.8


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
            "has an encoder and a decoder",
        ),
        ({"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}, "reads no text"),
    ],
    ids=["t5", "vit"],
)
def test_a_model_must_be_an_encoder_of_texts(config: object, what: str, stored: Path, build: Build) -> None:
    task = build(stored, teacher={"config": config}, student={"name": "transformers", "config": TINY})
    message = refusal(lambda: task.build_models(0))
    assert message.startswith("task.teacher: must be an encoder of texts such as BERT, a ") and message.endswith(what)
