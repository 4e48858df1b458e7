"""Small sets of news with impressions in every format, the news task over them, and what tests look at."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fedkd_flwr.tasks.impressions import ImpressionExamples
from fedkd_flwr.tasks.news_recommendation import NewsRecommendation, NewsRecommendationOptions
from tests.tasks.conftest import SPECIAL, write_tokenizer

NUM_TOPICS, WORDS_OF_TOPIC, TITLE = 4, 6, 4
NUM_USERS = 8
WORDS = [f"t{topic}w{word}" for topic in range(NUM_TOPICS) for word in range(WORDS_OF_TOPIC)]
USER = {"name": "natural", "column": "user_id", "grouped": True}
TINY = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": len(SPECIAL) + len(WORDS),
}
LAYER = {"name": "layers", "num_layers": 1}

Row = dict[str, Any]
Build = Callable[..., NewsRecommendation]


def impression(user: str, history: Iterable[str], shown: Iterable[tuple[str, int]]) -> Row:
    candidates, labels = zip(*shown, strict=True)
    return {"user_id": user, "history": list(history), "candidates": list(candidates), "labels": list(labels)}


def planted(num_news: int = 60, num_impressions: int = 48, num_users: int = NUM_USERS, seed: int = 0) -> list[Row]:
    """News first, then impressions: users have read one topic and click it, whatever else is shown."""
    rng = np.random.default_rng(seed)
    news = []
    for number in range(num_news):
        words = [f"t{number % NUM_TOPICS}w{word}" for word in rng.integers(0, WORDS_OF_TOPIC, TITLE)]
        news.append({"news_id": f"N{number}", "title": " ".join(words), "abstract": words[0]})
    rows = []
    for number in range(num_impressions):
        user = number % num_users
        topic = user % NUM_TOPICS
        liked, others = ([n for n in range(num_news) if (n % NUM_TOPICS == topic) is same] for same in (True, False))
        clicked, *read = rng.choice(liked, 4, replace=False)
        shown = [(f"N{clicked}", 1)] + [(f"N{other}", 0) for other in rng.choice(others, 4, replace=False)]
        rows.append(impression(f"U{user}", [f"N{n}" for n in read], [shown[i] for i in rng.permutation(5)]))
    return [*news, *rows]


def split(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """News, and impressions to train and to test on: of every user the last third."""
    news, shown = ([row for row in rows if ("news_id" in row) is is_news] for is_news in (True, False))
    num_train = len(shown) * 2 // 3
    return news, shown[:num_train], shown[num_train:]


def mind(row: Row) -> Row:
    pairs = zip(row["candidates"], row["labels"], strict=True)
    shown = " ".join(f"{name}-{label}" for name, label in pairs)
    return {
        "impression_id": "1",
        "user_id": row["user_id"],
        "time": "11/11/2019 9:05:58 AM",
        "history": " ".join(row["history"]),
        "impressions": shown,
    }


def write_lists(folder: Path, news: list[Row], train: list[Row], test: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("news", news), ("train", train), ("test", test)):
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def write_tsv(path: Path, rows: Iterable[Iterable[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def write_mind(folder: Path, news: list[Row], train: list[Row], test: list[Row]) -> dict[str, Any]:
    """MIND's own files. The two parts name some articles twice, as they do there."""
    for name, some, rows in (("train", news[:-5], train), ("dev", news[5:], test)):
        of_news = ([row["news_id"], "c", "s", row["title"], row["abstract"], "u", "[]", "[]"] for row in some)
        write_tsv(folder / name / "news.tsv", of_news)
        write_tsv(folder / name / "behaviors.tsv", (mind(row).values() for row in rows))
    return {
        "source": str(folder),
        "news_files": ["train/news.tsv", "dev/news.tsv"],
        "train_file": "train/behaviors.tsv",
        "test_file": "dev/behaviors.tsv",
    }


def write_strings(folder: Path, news: list[Row], train: list[Row], test: list[Row]) -> dict[str, Any]:
    """MIND's columns in Parquet."""
    write_lists(folder, news, [mind(row) for row in train], [mind(row) for row in test])
    return {"source": str(folder)}


def write_csv(folder: Path, news: list[Row], train: list[Row], test: list[Row]) -> dict[str, Any]:
    folder.mkdir()
    for name, rows in (("news", news), ("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    return {"source": str(folder), "news_files": ["news.csv"], "train_file": "train.csv", "test_file": "test.csv"}


def write_json(folder: Path, news: list[Row], train: list[Row], test: list[Row]) -> dict[str, Any]:
    folder.mkdir()
    for name, rows in (("news", news), ("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"news_files": ["news.jsonl"], "train_file": "train.jsonl", "test_file": "test.jsonl"}
    return {"source": str(folder), **files}


def builder(folder: Path) -> Build:
    """Builds the task of some data, with options changed; the folder is for a tokenizer to which a word is a piece."""
    assert write_tokenizer(folder, WORDS) == TINY["vocab_size"]

    def build(data: object, num_clients: int = 3, seed: int = 0, **changes: object) -> NewsRecommendation:
        chosen: dict[str, object] = {
            "data": str(data) if isinstance(data, Path) else data,
            "tokenizer": str(folder),
            "teacher": {"config": TINY},
            "student": LAYER,
            "news_dim": 8,
            "attention_dim": 8,
            **changes,
        }
        return NewsRecommendationOptions.model_validate(chosen).build(num_clients, seed)

    return build


def held(examples: object) -> ImpressionExamples:
    assert isinstance(examples, ImpressionExamples)
    return examples


def rows_of(examples: object) -> list[tuple[list[int], ...]]:
    of = held(examples)
    tables = (of.histories, of.candidates, of.labels)
    return [tuple(table[row].tolist() for table in tables) for row in range(len(of.labels))]


def words(task: NewsRecommendation, articles: Iterable[int]) -> list[list[int]]:
    batch = held(task.test_data()).articles.batch(np.array(list(articles), np.int64))
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
