from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value

from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.impressions import Ragged
from tests.tasks.conftest import everything
from tests.tasks.news_data import (
    Build,
    builder,
    held,
    impression,
    planted,
    rows_of,
    split,
    words,
    write_lists,
)

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lists(tmp_path_factory.mktemp("news"), *split(planted()))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(tmp_path_factory.mktemp("tokenizer"))


def pieces_of(batch: Batch, place: int) -> tuple[int, ...]:
    mask = batch["attention_mask"][place].bool()
    return tuple(batch["input_ids"][place][mask].tolist())


def shown(batch: Batch) -> list[tuple[tuple[int, ...], frozenset[tuple[int, ...]], int]]:
    """For each example the clicked article, the others, and the place of the click."""
    found = []
    for places, label in zip(batch["candidates"].tolist(), batch["labels"].tolist(), strict=True):
        texts = [pieces_of(batch, place) for place in places]
        found.append((texts.pop(label), frozenset(texts), label))
    return found


def test_negatives_are_of_the_same_impression_and_the_click_stands_anywhere(tmp_path: Path, build: Build) -> None:
    titles = [" ".join(f"t{digit}w{place}" for place, digit in enumerate(np.base_repr(n, 4))) for n in range(60)]
    news, train, test = split(planted())
    news = [{**row, "title": title} for row, title in zip(news, titles, strict=True)]
    two_clicks = impression("U0", ["N1"], [(f"N{n}", int(n < 2)) for n in range(10)])
    task = build(write_lists(tmp_path, news, [*train, two_clicks], test), num_clients=1, client_test_fraction=0.01)
    examples = held(task.client_data(0).train)
    by_words = {tuple(words(task, [n])[0]): n for n in range(60)}
    assert len(by_words) == 60
    rows = [(set(names), dict(zip(names, labels, strict=True))) for _, names, labels in rows_of(examples)]
    clicks = sorted((row, name) for row, (_, labels) in enumerate(rows) for name, label in labels.items() if label)
    places: set[int] = set()
    drawn: dict[tuple[int, int], set[frozenset[int]]] = {click: set() for click in clicks}
    for seed in range(4):
        seen = []
        for batch in examples.batches(7, seed):
            assert batch["candidates"].shape[1] == 5
            for text, other_texts, place in shown(batch):
                click, others = by_words[text], frozenset(by_words[other] for other in other_texts)
                row = next(row for row, (names, _) in enumerate(rows) if {click, *others} <= names)
                assert rows[row][1][click] == 1 and not any(rows[row][1][other] for other in others)
                seen.append((row, click))
                drawn[row, click].add(others)
                places.add(place)
        assert sorted(seen) == clicks and len(seen) == len(examples)
    assert places == set(range(5))
    assert max(map(len, drawn.values())) > 1  # of the eight without a click that are one impression's


def test_batches_follow_their_seed(stored: Path, build: Build) -> None:
    examples = build(stored, 1).client_data(0).train

    def drawn(seed: int | None) -> list[Any]:
        return [shown(batch) for batch in examples.batches(5, seed)]

    assert drawn(1) == drawn(1) and drawn(None) == drawn(None)
    assert drawn(1) != drawn(2)
    assert [len(batch["labels"]) for batch in examples.batches(5, 1)][:-1] == [5] * (-(-len(examples) // 5) - 1)


def test_few_negatives_come_again_evenly(tmp_path: Path, build: Build) -> None:
    news, _, test = split(planted())
    rows = [impression("U0", [], [("N1", 1), ("N2", 0), ("N3", 0)])] * 4
    task = build(write_lists(tmp_path, news, rows, test), 1, npratio=5)
    for batch in task.client_data(0).train.batches(1, 0):
        counts = np.bincount(batch["candidates"][0])
        assert sorted(counts.tolist()) == [1, 2, 3]
        assert counts[batch["candidates"][0, batch["labels"][0]]] == 1


def test_a_batch_holds_an_article_once(stored: Path, build: Build) -> None:
    batch = everything(build(stored, 1).client_data(0).train)
    used = set(batch["candidates"].flatten().tolist()) | set(batch["history"][batch["history_mask"].bool()].tolist())
    assert used == set(range(len(batch["input_ids"]))) and len(used) <= 60


def test_rows_of_any_length_are_what_lists_of_lists_are(tmp_path: Path) -> None:
    lists = [[3, 1], [], [5], [2, 2, 7, 9], []]
    table = Dataset.from_dict({"x": lists}, Features({"x": Sequence(Value("int32"))}))
    for rows in ([0, 1, 2, 3, 4], [3, 0], [1], []):
        some = Ragged.read(table.select(rows), "x")
        expected = [lists[row] for row in rows]
        assert [some[row].tolist() for row in range(len(some))] == expected
        assert some.lengths.tolist() == [len(row) for row in expected]
        odd = some.where(some.values % 2 == 1)
        assert [odd[row].tolist() for row in range(len(odd))] == [[v for v in row if v % 2] for row in expected]
        longest = max([1, *map(len, expected)])
        everyone = np.arange(len(some))[::-1]
        padded = [row + [-1] * (longest - len(row)) for row in reversed(expected)]
        assert some.padded(everyone, -1).tolist() == padded
