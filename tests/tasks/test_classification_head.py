import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fedkd_flwr.tasks.classification_head import head_notes, label_tensors, row_order
from fedkd_flwr.tasks.transformer import Transformers, TransformerTaskOptions

SEQUENCES, TOKENS, IMAGES = (f"AutoModelFor{kind}Classification" for kind in ("Sequence", "Token", "Image"))
NAMES = ("negative", "neutral", "positive")
TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8}
# Heads of each shape that families have, called otherwise in nearly each; three of them as wide as there are classes.
FAMILIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (SEQUENCES, "bert", TEXT),
    (SEQUENCES, "roberta", {**TEXT, "hidden_size": 3, "num_attention_heads": 1, "pad_token_id": 1}),
    (SEQUENCES, "llama", {**TEXT, "pad_token_id": 0, "num_key_value_heads": 1}),
    (SEQUENCES, "xlnet", {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}),
    (SEQUENCES, "distilbert", {"vocab_size": 20, "dim": 3, "n_layers": 1, "n_heads": 1, "hidden_dim": 8}),
    (
        SEQUENCES,
        "bart",
        {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
        | {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        | {"eos_token_id": 2},
    ),
    (TOKENS, "bert", {**TEXT, "hidden_size": 3, "num_attention_heads": 1}),
    (TOKENS, "deberta-v2", TEXT),
    (IMAGES, "vit", {**VISION, "patch_size": 4}),
    (IMAGES, "resnet", {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}),
    (IMAGES, "convnext", {"patch_size": 2, "num_stages": 1, "hidden_sizes": [4], "depths": [1], "image_size": 8}),
)
IDS = [f"{kind.removeprefix('AutoModelFor')[0]}-{family}" for kind, family, _ in FAMILIES]


def checkpoint(folder: Path, kind: str, family: str, sizes: Mapping[str, Any], names: Sequence[str] | None) -> Path:
    """A model with random weights; without `names` it has the library's own for three classes."""
    called = {"num_labels": 3} if names is None else {"id2label": dict(enumerate(names)), "num_labels": len(names)}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **called})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases of zeros would hide a wrong order
                parameter.add_(torch.rand_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


class Options(TransformerTaskOptions):
    """Models of no task in particular."""

    name: str = "any"

    def build(self, num_clients: int, seed: int) -> Any:
        raise NotImplementedError


def options_of(source: Path) -> Options:
    return Options.model_validate({"teacher": {"source": str(source)}})


def load(kind: str, source: Path, names: Sequence[str], seed: int = 0) -> Any:
    options = options_of(source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformers(options, kind, tuple(names)).load(options.teacher, "task.teacher").eval()


def logits(kind: str, model: Any) -> Tensor:
    with torch.inference_mode():
        if kind == IMAGES:
            size = getattr(model.config, "image_size", 8)
            pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
            return model(pixel_values=pixels).logits
        return model(input_ids=torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])).logits


@pytest.mark.parametrize(("kind", "family", "sizes"), FAMILIES, ids=IDS)
def test_a_class_is_the_same_whatever_place_the_data_gives_it(
    kind: str, family: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, kind, family, sizes, NAMES)
    stored = logits(kind, getattr(transformers, kind).from_pretrained(source).eval())
    assert len({*stored.flatten()[:3].tolist()}) == 3
    for order in list(permutations(range(3)))[1::2]:
        names = [NAMES[place].upper() for place in order]
        model = load(kind, source, names)
        torch.testing.assert_close(logits(kind, model), stored[..., list(order)])
        assert model.config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("index", [0, 7, 10], ids=lambda index: IDS[index])
def test_a_head_of_other_classes_is_drawn_anew_from_the_seed(index: int, tmp_path: Path) -> None:
    kind, family, sizes = FAMILIES[index]
    source = checkpoint(tmp_path, kind, family, sizes, NAMES)
    stored = getattr(transformers, kind).from_pretrained(source).state_dict()
    first, again, other = (load(kind, source, ("ham", "spam", "neutral"), seed).state_dict() for seed in (0, 0, 1))
    heads = label_tensors(load(kind, source, NAMES), 3)
    assert heads
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name not in heads:
            assert torch.equal(tensor, stored[name])
            assert torch.equal(tensor, other[name])
        else:
            assert not torch.equal(tensor, stored[name])
    assert any(not torch.equal(first[name], other[name]) for name in heads)
    assert all(tensor.abs().max() < 2 for tensor in first.values())


@pytest.mark.parametrize(
    ("own", "classes"),
    [(None, ("bad", "so", "good")), (("0", "1", "2"), ("bad", "so", "good")), (NAMES, ("0", "1", "2"))],
    ids=str,
)
def test_names_that_say_nothing_leave_a_head_as_it_is(own: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
    source = checkpoint(tmp_path, SEQUENCES, "bert", TEXT, own)
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    assert torch.equal(logits(SEQUENCES, load(SEQUENCES, source, classes)), logits(SEQUENCES, stored))


def test_an_order_is_found_by_name_case_and_spaces_aside_but_never_by_guess() -> None:
    assert row_order(("b", "a"), ("a", "b")) == [1, 0]
    assert row_order(("New  York", "rome"), ("Rome", "new york")) == [1, 0]
    assert row_order(("A", "a"), ("a", "A")) == [1, 0]
    assert row_order(("A", "a", "b"), ("B", "a", "A")) == [2, 1, 0]
    assert row_order(("A", "a"), ("a", "x")) is None
    assert row_order(("O", "B-X", "I-X"), ("O", "I-X", "B-X")) == [0, 2, 1]
    assert row_order(("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1")) == [1, 0]
    assert row_order(("LABEL_0", "LABEL_1"), ("x", "y")) == [0, 1]
    assert row_order(("1", "2"), ("0", "1")) == [0, 1]
    assert row_order(("cat", "dog"), ("dog", "bird")) is None


def test_what_becomes_of_each_head_is_said_in_one_line(tmp_path: Path) -> None:
    named = checkpoint(tmp_path / "named", SEQUENCES, "bert", TEXT, NAMES)
    generic = checkpoint(tmp_path / "generic", SEQUENCES, "bert", TEXT, None)
    encoder = tmp_path / "encoder"
    transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).save_pretrained(encoder)

    def said(source: Path, *classes: str) -> tuple[str, ...]:
        return head_notes(options_of(source), SEQUENCES, classes)

    assert said(named, *NAMES) == said(generic, *NAMES) == said(encoder, *NAMES) == ()
    assert said(named, *NAMES[::-1]) == (
        "task.teacher: the checkpoint's classes are in another order (negative, neutral, positive): its head follows "
        "the data's",
    )
    assert said(named, "a", "b", "c") == (
        "task.teacher: the checkpoint's head is for negative, neutral, positive, the data has others: it is drawn anew",
    )
    assert said(named, "a", "b") == ("task.teacher: the checkpoint's head has 3 classes, the data 2: it is drawn anew",)
    (taken,) = said(named, "0", "1", "2")
    assert taken.endswith("the checkpoint's are taken by place (negative, neutral, positive)")
    assert said(tmp_path / "none", *NAMES) == ()


def test_a_head_for_several_labels_at_once_becomes_one_for_a_single_label(tmp_path: Path) -> None:
    """A pipeline takes from the configuration how logits are read."""
    source = checkpoint(tmp_path, SEQUENCES, "bert", TEXT, NAMES)
    written = json.loads((source / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (source / "config.json").write_text(json.dumps(written))
    assert load(SEQUENCES, source, NAMES).config.problem_type == "single_label_classification"
