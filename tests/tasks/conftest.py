"""What tests of tasks look at: models that take no time, tables on disk, and a cache of their own for what is read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from fedkd_flwr.algorithms.base import Algorithm, Assignment, Trained
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.core.protocols import Batch, Examples, Task

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, BEGIN, END = range(4)
# "aspirin" is three pieces, "patients" two, and "zebra" is unknown.
PIECES = (
    "the",
    "a",
    "drug",
    "did",
    "help",
    "harm",
    "of",
    "and",
    "good",
    "bad",
    "so",
    "very",
    "fever",
    "patient",
    "##s",
    "as",
    "##pir",
    "##in",
    ".",
    ",",
    "was",
    "it",
)
PIECES_AND_SPECIAL = len(SPECIAL) + len(PIECES)
POSITIONS = 128


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache. Both libraries read their environment when they are imported, so their settings are replaced."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def write_tokenizer(folder: Path, pieces: Sequence[str] = PIECES) -> int:
    """A tokenizer of lower-case words and their pieces; how many tokens it has."""
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, *pieces])}
    rules = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def write_bert(folder: Path, seed: int = 0, pieces: Sequence[str] = PIECES, **config: Any) -> None:
    """A BERT as it is after pretraining, with a head for masked words and none for classes, and its tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    quick = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # to learn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vocab_size = write_tokenizer(folder, pieces)
        chosen = {**sizes, **quick, **config}
        model = BertForMaskedLM(BertConfig(vocab_size=vocab_size, max_position_embeddings=POSITIONS, **chosen))
        model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT of 4 layers with random weights, and of the tokenizer of `tiny_tokenizer`."""
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder)
    return folder


def write_table(path: Path, rows: Mapping[str, Sequence[Any]], features: Features | None = None) -> None:
    """Columns as Parquet, CSV or lines of JSON, whichever the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict(dict(rows), features=features)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))


def write_splits(
    folder: Path,
    train: Mapping[str, Sequence[Any]],
    test: Mapping[str, Sequence[Any]],
    suffix: str = "parquet",
    features: Features | None = None,
) -> str:
    """A folder with both splits; its path as text."""
    for split, rows in (("train", train), ("test", test)):
        write_table(folder / f"{split}.{suffix}", rows, features)
    return str(folder)


def one_round(task: Task, client: int = 0, seed: int = 1, **options: object) -> tuple[Algorithm, Trained]:
    """FedKD on a task, and what one round of one client leaves behind."""
    local = {"num_epochs": 1, "batch_size": 8}
    algorithm = FedKDOptions.model_validate({"local": local, **options}).build(task, 0)
    data = task.client_data(client)
    private = algorithm.client.initial_private(data)
    return algorithm, algorithm.client.train(algorithm.shared.initial(), private, data, Assignment(0.0, seed))


def everything(examples: Examples) -> Batch:
    return next(iter(examples.batches(len(examples))))


def images(examples: Examples) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(examples)["pixel_values"]}


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())
