from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError
from transformers import AutoTokenizer

from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.experiment import ConfigError, parse
from fedkd_flwr.tasks.news_recommendation import NewsRecommendation
from tests.tasks.conftest import BEGIN, END, UNKNOWN, write_tokenizer
from tests.tasks.news_data import (
    USER,
    WORDS,
    Build,
    builder,
    held,
    impression,
    mind,
    planted,
    rows_of,
    split,
    words,
    write_csv,
    write_json,
    write_lists,
    write_mind,
    write_strings,
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


def read_words(task: NewsRecommendation, examples: object) -> list[tuple[object, ...]]:
    """Impressions with the words of every article in the place of its number."""
    rows = rows_of(examples)
    return [(words(task, history), words(task, shown), labels) for history, shown, labels in rows]


@pytest.mark.parametrize("write", [write_mind, write_strings, write_csv, write_json])
def test_every_format_gives_the_same_task(write: Any, stored: Path, tmp_path: Path, build: Build) -> None:
    data = write(tmp_path / "data", *split(planted()))
    ours, lists = (build(source, partition=USER) for source in (data, stored))
    assert read_words(ours, ours.test_data()) == read_words(lists, lists.test_data())
    for client in range(3):
        mine, theirs = (task.client_data(client) for task in (ours, lists))
        assert read_words(ours, mine.train) == read_words(lists, theirs.train)
        assert read_words(ours, mine.test) == read_words(lists, theirs.test)
    assert ours.data_report() == lists.data_report()


def test_files_of_mind_have_no_quotes_and_no_missing_values(tmp_path: Path, build: Build) -> None:
    news, train, test = split(planted())
    for row, title in zip(news, ('t0w0 "t0w1', "NA", "null", "None"), strict=False):
        row["title"] = title
    task = build(write_mind(tmp_path, news, train, test))
    assert len(held(task.test_data()).articles) == 2 * len(news) - 10  # both files, to the last line
    assert task.data_report().notes == ()


def test_the_first_of_articles_with_one_id_is_read(tmp_path: Path, build: Build) -> None:
    news, train, test = split(planted())
    write_lists(tmp_path, news, train, test)
    Dataset.from_list([{**row, "title": "t0w0"} for row in news]).to_parquet(tmp_path / "later.parquet")
    files = ["news.parquet", "later.parquet"]
    once, again, reverse = (
        build({"source": str(tmp_path), "news_files": chosen}) for chosen in (files[:1], files, files[::-1])
    )
    assert read_words(once, once.test_data()) == read_words(again, again.test_data())
    assert read_words(once, once.test_data()) != read_words(reverse, reverse.test_data())


def test_a_history_keeps_its_newest_articles(stored: Path, build: Build) -> None:
    whole, cut = (build(stored, max_history=most).test_data() for most in (50, 2))
    assert [row[0][-2:] for row in rows_of(whole)] == [row[0] for row in rows_of(cut)]
    assert any(len(row[0]) > 2 for row in rows_of(whole))


def test_an_abstract_follows_the_title_where_it_is_asked_for(stored: Path, build: Build) -> None:
    short, long = (build(stored, use_abstract=use) for use in (False, True))
    (title,), (both,) = words(short, [0]), words(long, [0])
    assert both == [*title, title[1], title[-1]]  # the abstract is the title's first word


def test_rows_that_can_not_be_used_are_counted(tmp_path: Path, build: Build) -> None:
    news, train, test = split(planted())
    good = [("N1", 1), ("N2", 0)]
    bad = [
        impression("U0", ["N1", "gone"], good),
        impression("U0", ["N1"], [("N1", 1), ("gone", 0)]),
        impression("U0", ["N1"], [("N1", 0), ("N2", 0)]),
        impression("U0", ["N1"], [("N1", 1), ("N2", 1)]),
        {"user_id": "U0", "history": ["N1"], "candidates": [], "labels": []},
        {"user_id": "U0", "history": ["N1"], "candidates": ["N1", "N2"], "labels": [1]},
        impression("U0", ["N1"], [("N1", 1), ("N2", 0), ("N3", 2)]),
    ]
    news[0]["title"], news[1]["title"] = " ", None
    task = build(write_lists(tmp_path, news, [*train, *bad, impression("U0", [], good)], [*test, bad[0]]))
    file = "'train.parquet'"
    first, num_train, num_test = len(train), len(train) + len(bad) + 1, len(test) + 1
    assert task.data_report().notes == (
        "news: 2 of 60 articles have no title (the first is 'N0'); read without it",
        f"split 'train': 7 of {num_train} rows are left out: "
        f"1 has no candidates (the first is row {first + 4} of {file}), "
        f"1 has another number of labels than candidates (the first is row {first + 5} of {file}), "
        f"1 has a label other than 0 and 1 (the first is row {first + 6} of {file}), "
        f"1 has no click (the first is row {first + 2} of {file}), "
        f"1 has clicks only (the first is row {first + 3} of {file}), "
        f"2 name an article that no news file has (the first is row {first} of {file})",
        f"split 'test': 1 of {num_test} rows is left out: 1 names an article that no news file has "
        f"(the first is row {len(test)} of 'test.parquet')",
    )
    clients = [task.client_data(client) for client in range(3)]
    assert sum(len(data.train) + len(data.test) for data in clients) == first + 1
    assert words(task, [0]) == [[BEGIN, END]]


def test_an_article_without_any_piece_can_be_read(tmp_path: Path, build: Build) -> None:
    """Not every tokenizer adds marks to a text."""
    news, train, test = split(planted())
    news = [{**row, "title": ""} for row in news]
    write_tokenizer(tmp_path / "tokenizer", WORDS)
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    plain.backend_tokenizer.post_processor = None
    plain.save_pretrained(tmp_path / "tokenizer")
    task = build(write_lists(tmp_path / "data", news, train, test), tokenizer=str(tmp_path / "tokenizer"))
    assert words(task, [0]) == [[UNKNOWN]]
    assert score_of(task, task.build_models(0).student, task.test_data())["auc"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["dirichlet", "pathological"])
def test_partitions_by_label_are_refused(name: str, stored: Path) -> None:
    text = f"""
name: x
num_clients: 2
num_rounds: 1
task:
  name: news_recommendation
  data: {stored}
  teacher: {{config: {{model_type: bert}}}}
  partition: {{name: {name}}}
algorithm: {{name: fedavg}}
"""
    with pytest.raises(ConfigError) as caught:
        parse(text, ())
    assert str(caught.value) == f"task.partition.name: must be one of 'iid', 'size', 'natural', 'own', got {name!r}"


def test_what_is_wrong_with_the_data_is_said(stored: Path, tmp_path: Path, build: Build) -> None:
    source = {"source": str(stored)}
    assert refusal(lambda: build({**source, "news_files": ["gone.parquet"]})) == (
        f"task.data.news_files: {str(stored)!r} holds no file 'gone.parquet' but news.parquet, test.parquet, "
        "train.parquet; name one by its path within that folder"
    )
    assert refusal(lambda: build({**source, "test_file": "gone.tsv"})).startswith("task.data.test_file: ")
    assert refusal(lambda: build({**source, "columns": {"candidates": "shown"}})) == (
        "task.data.columns.candidates: split 'train' has no column 'shown', and no column 'impressions' of MIND's "
        "impressions; columns: user_id, history, candidates, labels"
    )
    for key in ("history", "labels"):
        assert refusal(lambda key=key: build({**source, "columns": {key: "x"}})).startswith(
            f"task.data.columns.{key}: "
        )
    for key in ("title", "news_id"):
        assert refusal(lambda key=key: build({**source, "columns": {key: "x"}})).startswith(
            f"task.data.columns.{key}: split 'news' has no column 'x'"
        )
    assert "8" in refusal(lambda: build(stored, 9, partition=USER))
    with pytest.raises(ValidationError, match="must be the folder or the data set"):
        build(stored / "news.parquet")
    news, train, test = split(planted())
    unlabelled = [{**mind(row), "impressions": " ".join(row["candidates"])} for row in test]
    write_lists(tmp_path, news, [mind(row) for row in train], unlabelled)
    assert refusal(lambda: build(tmp_path)) == (
        f"task.data: no row of split 'test' can be used: {len(test)} have another number of labels than candidates "
        "(the first is row 0 of 'test.parquet')"
    )
