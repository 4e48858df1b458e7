"""Public examples: held out of the training split or of another table, in one order, without labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedkd_flwr.core.protocols import PublicExamples
from fedkd_flwr.tasks.base import TableTask
from fedkd_flwr.tasks.public import PublicOptions
from tests.tasks import image_data
from tests.tasks.conftest import write_bert, write_splits
from tests.tasks.test_text_classification import ROWS, TEST, TEXTS
from tests.tasks.test_text_classification import build as build_texts
from tests.tasks.test_text_classification import refusal as refusal_of_texts

pytestmark = pytest.mark.usefixtures("offline")

OTHER = {"sentence": ["so it was very good .", "drug harm", "aspirin did help", ""], "label": [9, 9, 9, 9]}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    write_bert(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return write_splits(tmp_path / "data", ROWS, TEST)


@pytest.fixture
def other(tmp_path: Path) -> str:
    return write_splits(tmp_path / "other", OTHER, OTHER)


def public_of(task: TableTask) -> PublicExamples:
    public = task.public_examples()
    assert public is not None
    return public


def inputs_of(public: PublicExamples, positions: list[int], name: str) -> dict[int, Any]:
    """Input of each position, whatever the order."""
    found = {}
    for batch in public.select(positions).batches(3, seed=0):
        for label, values in zip(batch["labels"].tolist(), batch[name], strict=True):
            found[label] = values
    return found


def test_without_the_option_there_are_none(texts: str, bert: Path) -> None:
    assert build_texts(texts, bert).public_examples() is None


def test_labels_are_positions(texts: str, bert: Path) -> None:
    public = public_of(build_texts(texts, bert, public={"num_examples": 12}))
    whole = inputs_of(public, list(range(12)), "input_ids")
    some = inputs_of(public, [7, 2], "input_ids")
    assert set(some) == {2, 7}
    for position, ids in some.items():
        length = min(len(ids), len(whole[position]))
        assert ids[:length].tolist() == whole[position][:length].tolist()


def test_held_out_rows_are_no_clients(texts: str, bert: Path) -> None:
    task = build_texts(texts, bert, public={"num_examples": 12})
    sizes = [len(task.client_data(c).train) + len(task.client_data(c).test) for c in range(3)]
    assert sum(sizes) == len(TEXTS) - 12
    assert len(public_of(task)) == 12


def test_texts_of_another_table_lose_their_labels_and_their_empty_rows(texts: str, other: str, bert: Path) -> None:
    task = build_texts(texts, bert, public={"source": other, "text": "sentence"})
    assert len(public_of(task)) == 3
    assert sum(len(task.client_data(c).train) + len(task.client_data(c).test) for c in range(3)) == len(TEXTS)
    drawn = build_texts(texts, bert, public={"source": other, "text": "sentence", "num_examples": 2})
    assert len(public_of(drawn)) == 2


def test_lists_of_words_are_texts(texts: str, other: str, bert: Path, tmp_path: Path) -> None:
    words = {"tokens": [text.split() for text in OTHER["sentence"]]}
    split = write_splits(tmp_path / "words", words, words)
    of_words = public_of(build_texts(texts, bert, public={"source": split, "text": "tokens"}))
    of_texts = public_of(build_texts(texts, bert, public={"source": other, "text": "sentence"}))
    assert len(of_words) == 3
    assert of_words.digest() == of_texts.digest()


def test_the_digest_is_of_the_inputs(texts: str, other: str, bert: Path, tmp_path: Path) -> None:
    changed = write_splits(
        tmp_path / "changed", OTHER | {"sentence": ["so it was bad .", *OTHER["sentence"][1:]]}, OTHER
    )
    relabelled = write_splits(tmp_path / "relabelled", OTHER | {"label": [1, 2, 3, 4]}, OTHER)
    digests = [
        public_of(build_texts(texts, bert, public={"source": source, "text": "sentence"})).digest()
        for source in (other, other, changed, relabelled)
    ]
    assert digests[0] == digests[1] == digests[3] != digests[2]


def test_images_of_another_folder(tmp_path: Path) -> None:
    folder = image_data.write_both(tmp_path / "images")
    image_data.write(tmp_path / "more", "train", image_data.rows(6, first=100))
    public = public_of(image_data.build(folder, public={"source": str(tmp_path / "more")}))
    assert len(public) == 6
    assert sorted(inputs_of(public, [4, 0], "pixel_values")) == [0, 4]


def test_images_held_out(tmp_path: Path) -> None:
    task = image_data.build(image_data.write_both(tmp_path / "images"), public={"num_examples": 8})
    sizes = [len(task.client_data(c).train) + len(task.client_data(c).test) for c in range(image_data.NUM_CLIENTS)]
    assert sum(sizes) == image_data.NUM_TRAIN - 8
    assert len(public_of(task)) == 8


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = image_data.write_both(tmp_path / "images")
    image_data.write(tmp_path / "more", "train", image_data.rows(6, side=9))
    assert "task.image_size: images differ in size" in image_data.refusal(
        folder, public={"source": str(tmp_path / "more")}
    )


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ({"text": "body"}, "task.public.text: split 'train' has no column 'body'; columns: sentence, label"),
        ({"text": "label"}, "task.public.text: 'text' of split 'train' holds no texts"),
        ({"text": "sentence", "num_examples": 9}, "task.public.num_examples must be at most 3"),
        ({"text": "sentence", "split": "dev"}, "task.public.source: "),
    ],
)
def test_a_table_that_does_not_fit_is_one_clear_line(
    public: dict[str, Any], message: str, texts: str, other: str, bert: Path
) -> None:
    assert message in refusal_of_texts(texts, bert, public={"source": other, **public})


def test_a_source_that_is_not_there_is_named(texts: str, bert: Path, tmp_path: Path) -> None:
    reason = refusal_of_texts(texts, bert, public={"source": str(tmp_path / "nowhere" / "deep")})
    assert "task.public.source: there is no folder or file" in reason


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ({}, "needs source, or num_examples"),
        ({"num_examples": 5, "split": "test"}, "split needs source"),
    ],
)
def test_options_that_say_too_little_or_too_much(public: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PublicOptions.model_validate(public)


def test_nodes_with_their_own_data_need_a_source_that_all_have(texts: str, bert: Path) -> None:
    own = {"partition": {"name": "own"}, "label_names": ["a", "b", "c"]}
    with pytest.raises(ValidationError, match=r"public\.source is required where nodes bring their own data"):
        build_texts(texts, bert, public={"num_examples": 5}, **own)


def test_the_same_seed_holds_out_the_same_rows(texts: str, bert: Path) -> None:
    digests = [public_of(build_texts(texts, bert, public={"num_examples": 12})).digest() for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(np.unique(list(digests[0]))) > 8
