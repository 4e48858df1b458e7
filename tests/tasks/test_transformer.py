import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from fedkd_flwr.core.modules import exchanged_spec
from fedkd_flwr.core.protocols import Models
from fedkd_flwr.tasks.text_classification import TextClassification, TextClassificationOptions
from fedkd_flwr.tasks.transformer import (
    LayersOptions,
    Transformers,
    TransformerTaskOptions,
    cut_student,
    freeze_embeddings,
)
from tests.tasks.conftest import PIECES, POSITIONS, SPECIAL, one_round, state, write_bert, write_splits, write_tokenizer

pytestmark = pytest.mark.usefixtures("offline")

VOCABULARY = len(SPECIAL) + len(PIECES)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": SIZES | {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
    "llama": SIZES | {"num_key_value_heads": 1},
}
HEAD = "classifier.weight"


class Options(TransformerTaskOptions):
    name: Literal["some"] = "some"

    def build(self, num_clients: int, seed: int) -> Any:
        raise NotImplementedError


def inline(family: str = "bert", **changes: Any) -> dict[str, Any]:
    config = {"model_type": family, "vocab_size": VOCABULARY, **FAMILIES[family], **changes}
    return {"name": "transformers", "config": config}


def source(folder: Path | str, **changes: Any) -> dict[str, Any]:
    return {"name": "transformers", "source": str(folder), **({"config": changes} if changes else {})}


def layers(num_layers: int, pick: str = "first") -> dict[str, Any]:
    return {"name": "layers", "num_layers": num_layers, "pick": pick}


def build(seed: int = 0, num_classes: int = 2, **options: Any) -> Models:
    names = tuple("abc"[:num_classes])
    kind = "AutoModelForSequenceClassification"
    return Transformers(Options.model_validate(options), kind, names, {"pad_token_id": 0}).build(seed)


def refusal(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: nn.Module, b: nn.Module) -> bool:
    return state(a).keys() == state(b).keys() and all(torch.equal(t, state(b)[name]) for name, t in state(a).items())


MakeTask = Callable[..., TextClassification]


@pytest.fixture
def make_task(tmp_path: Path, tiny_tokenizer: Path) -> MakeTask:
    """A task of two clients with whatever models; texts with "good" in them are of one class."""
    texts = [f"{start} {word} {end}" for start in ("the", "a", "so") for word in ("good", "bad") for end in PIECES[2:6]]
    rows = {"text": texts, "label": [int("good" in text) for text in texts]}
    data = write_splits(tmp_path / "data", rows, {name: column[:8] for name, column in rows.items()})

    def make(**options: Any) -> TextClassification:
        chosen = {"data": data, "tokenizer": str(tiny_tokenizer), "max_length": 32, **options}
        return TextClassificationOptions.model_validate(chosen).build(2, 0)

    return make


def test_a_pretrained_teacher_is_read_from_a_folder(tiny_bert: Path) -> None:
    teacher = build(teacher=source(tiny_bert)).teacher
    pretrained = BertForMaskedLM.from_pretrained(tiny_bert)
    assert same(teacher.bert.encoder, pretrained.bert.encoder)
    assert same(teacher.bert.embeddings, pretrained.bert.embeddings)
    assert teacher.config.id2label == {0: "a", 1: "b"}
    assert teacher.config.label2id == {"a": 0, "b": 1}


def test_the_number_of_classes_is_the_tasks_whatever_the_folder_has(tiny_bert: Path, tmp_path: Path) -> None:
    build(teacher=source(tiny_bert)).teacher.save_pretrained(tmp_path)
    assert tuple(state(build(teacher=source(tmp_path), num_classes=3).teacher)[HEAD].shape) == (3, 16)


def test_weights_of_half_precision_become_float32(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    BertForMaskedLM.from_pretrained(tiny_bert).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in build(teacher=source(tmp_path)).teacher.parameters()} == {torch.float32}


def test_a_teacher_of_random_weights_is_made_of_a_configuration() -> None:
    teacher = build(teacher=inline(hidden_size=8, hidden_dropout_prob=0.3)).teacher
    assert (teacher.config.hidden_size, teacher.config.num_hidden_layers) == (8, 2)
    assert teacher.config.hidden_dropout_prob == 0.3
    assert teacher.config.pad_token_id == 0


def test_a_configuration_changes_what_a_folder_says(tiny_bert: Path) -> None:
    teacher = build(teacher=source(tiny_bert, hidden_dropout_prob=0.3, num_hidden_layers=3)).teacher
    assert teacher.config.hidden_dropout_prob == 0.3
    assert len(teacher.bert.encoder.layer) == 3
    assert same(teacher.bert.encoder.layer[2], BertForMaskedLM.from_pretrained(tiny_bert).bert.encoder.layer[2])


@pytest.mark.parametrize("which", ["inline", "folder"])
def test_an_unknown_option_of_a_configuration_is_refused(which: str, tiny_bert: Path) -> None:
    model = inline(hiden_size=8) if which == "inline" else source(tiny_bert, hiden_size=8)
    assert refusal(teacher=model) == (
        "task.teacher.config: a model of type 'bert' has no option 'hiden_size'; see the library's BertConfig"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hidden_size": 32}, "[32"), ({"vocab_size": 99}, "[99, 16]"), ({"max_position_embeddings": 256}, "[256, 16]")],
)
def test_sizes_that_the_weights_do_not_have_are_refused(changes: dict[str, int], named: str, tiny_bert: Path) -> None:
    text = refusal(teacher=source(tiny_bert, **changes))
    assert text.startswith(f"task.teacher.source: {str(tiny_bert)!r} has weights of other shapes, bert.")
    assert f"must be {named}" in text


@pytest.mark.parametrize("num_layers", [5, 50])
def test_more_layers_than_the_folder_has_are_refused(num_layers: int, tiny_bert: Path) -> None:
    assert str(tiny_bert) in refusal(teacher=source(tiny_bert, num_hidden_layers=num_layers))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nonsense"},
        {"model_type": "bert", "hidden_size": 15},
        {"model_type": "bert", "hidden_size": "x"},
    ],
)
def test_a_configuration_that_makes_no_model_is_an_error_with_the_reason(config: dict[str, Any]) -> None:
    text = refusal(teacher={"config": config})
    assert text.startswith("task.teacher.config: no model can be built (")
    assert text.endswith("); see the library's documentation of its model_type")


def test_weights_are_read_from_safetensors_only(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    without = refusal(teacher=source(tmp_path))
    torch.save(BertForMaskedLM.from_pretrained(tiny_bert).state_dict(), tmp_path / "pytorch_model.bin")
    with_pickle = refusal(teacher=source(tmp_path))
    for text in (without, with_pickle):
        assert text.startswith(f"task.teacher.source: {str(tmp_path)!r} can't be loaded (")
        assert text.endswith("); it must hold config.json and model.safetensors of a model that suits the task")


def test_a_folder_without_a_model_is_refused(tiny_tokenizer: Path) -> None:
    assert "can't be loaded" in refusal(teacher=source(tiny_tokenizer))


def test_weights_of_another_family_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=VOCABULARY, **FAMILIES["distilbert"])).save_pretrained(tmp_path)
    shutil.copy(tiny_bert / "config.json", tmp_path)
    assert refusal(teacher=source(tmp_path)) == (
        f"task.teacher.source: {str(tmp_path)!r} holds no weights for most of a BertForSequenceClassification; "
        "give the folder or id of a pretrained model of that kind, or config for random weights"
    )


def test_a_hub_that_can_not_be_reached_is_an_error_with_the_remedy() -> None:
    text = refusal(teacher=source("nobody/nothing"))
    assert text.startswith(
        "task.teacher.source: 'nobody/nothing' is no folder here, and can't be loaded from the Hugging Face Hub ("
    )
    assert text.endswith("); check source, revision, the connection, and that its weights are kept as safetensors")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "needs source"),
        ({"config": {"hidden_size": 8}}, "config with model_type"),
        ({"source": "a", "config": {"model_type": "bert"}}, "config.model_type can't be changed"),
        ({"source": ""}, "at least 1 character"),
        ({"source": "a", "layers": 2}, "Extra inputs"),
    ],
)
def test_options_of_a_model_that_make_no_sense_are_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Options.model_validate({"teacher": model})


def test_a_folder_that_exists_is_made_absolute(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_bert.parent)
    assert Options.model_validate({"teacher": source(tiny_bert.name)}).teacher.source == str(tiny_bert)


def test_the_same_seed_gives_the_same_models(tiny_bert: Path) -> None:
    others = [{"clients": [1], "model": inline()}]
    student = inline("distilbert")
    first, again, other = (
        build(seed, teacher=source(tiny_bert), student=student, other_teachers=others) for seed in (0, 0, 1)
    )
    assert same(first.teacher, again.teacher)
    assert same(first.student, again.student)
    assert same(first.other_teachers[0], again.other_teachers[0])
    assert not torch.equal(state(first.teacher)[HEAD], state(other.teacher)[HEAD])
    assert same(first.teacher.bert.encoder, other.teacher.bert.encoder)  # pretrained: no seed can change it
    assert not same(first.student.distilbert, other.student.distilbert)
    assert not same(first.other_teachers[0].bert, other.other_teachers[0].bert)


def test_building_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(teacher=inline())
    assert torch.equal(torch.rand(3), expected)


def picked_from(models: Models) -> list[int]:
    """Which layer of the teacher each of the student's is, counted from 1."""
    stacks = [model.base_model.encoder.layer for model in (models.teacher, models.student)]
    return [next(n for n, layer in enumerate(stacks[0], 1) if same(layer, own)) for own in stacks[1]]


@pytest.mark.parametrize(
    ("depth", "num_layers", "pick", "expected"),
    [
        (6, 2, "first", [1, 2]),
        (6, 2, "spread", [3, 6]),
        (6, 3, "spread", [2, 4, 6]),
        (6, 6, "spread", [1, 2, 3, 4, 5, 6]),
        (4, 3, "spread", [1, 2, 4]),
        (3, 1, "spread", [3]),
        (3, 1, "first", [1]),
    ],
)
def test_a_student_of_layers_has_those_that_were_picked_and_the_teachers_ends(
    depth: int, num_layers: int, pick: str, expected: list[int]
) -> None:
    models = build(teacher=inline(num_hidden_layers=depth), student=layers(num_layers, pick))
    assert picked_from(models) == expected
    assert models.student.config.num_hidden_layers == num_layers
    assert models.teacher.config.num_hidden_layers == depth
    assert same(models.student.bert.embeddings, models.teacher.bert.embeddings)
    assert same(models.student.bert.pooler, models.teacher.bert.pooler)
    assert same(models.student.classifier, models.teacher.classifier)


def test_a_student_of_layers_shares_no_memory_with_its_teacher() -> None:
    models = build(teacher=inline(), student=layers(1))
    before = state(models.teacher)[HEAD].clone()
    with torch.no_grad():
        models.student.classifier.weight.add_(1.0)
    assert torch.equal(state(models.teacher)[HEAD], before)


def test_a_student_has_at_most_the_teachers_layers() -> None:
    assert refusal(teacher=inline(), student=layers(3)) == (
        "task.student.num_layers must be at most the teacher's 2, got 3"
    )


def test_a_model_whose_layers_share_weights_can_not_be_cut() -> None:
    albert = {"model_type": "albert", "vocab_size": VOCABULARY, "embedding_size": 8, **SIZES}
    assert refusal(teacher={"config": albert}, student=layers(1)).startswith(
        "task.student: a AlbertForSequenceClassification has no plain stack of layers to cut from; give the student"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_can_be_cut_from_any_family(family: str) -> None:
    teacher = build(teacher=inline(family), student=layers(1)).teacher
    student = cut_student(teacher, LayersOptions(num_layers=1, pick="spread"))
    shared = [name for name in state(student) if ".0." not in name]
    assert len(shared) < len(state(student)) < len(state(teacher))
    for name, tensor in state(student).items():
        assert torch.equal(tensor, state(teacher)[name.replace(".0.", ".1.")])


def test_a_student_of_its_own_size_begins_with_what_fits_of_its_teacher() -> None:
    models = build(teacher=inline(num_hidden_layers=4), student=inline(num_hidden_layers=2))
    assert picked_from(models) == [1, 2]
    narrow = build(teacher=inline(hidden_size=32, num_attention_heads=4), student=inline()).student
    assert state(narrow)[HEAD].shape == (2, 16)


def test_a_pretrained_student_keeps_its_own_weights(tiny_bert: Path, tmp_path: Path) -> None:
    write_bert(tmp_path, seed=1)
    models = build(teacher=source(tiny_bert), student=source(tmp_path, num_hidden_layers=2))
    assert same(models.student.bert.embeddings, BertForMaskedLM.from_pretrained(tmp_path).bert.embeddings)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (inline("bert", hidden_size=32), inline("bert")),  # twice as wide
        (inline("bert", num_hidden_layers=4), inline("distilbert")),
        (inline("bert", num_attention_heads=4), inline("electra")),
        (inline("llama"), inline("bert")),
    ],
)
def test_a_student_of_another_width_or_family_learns_from_its_teacher(
    teacher: dict[str, Any], student: dict[str, Any], make_task: MakeTask
) -> None:
    task = make_task(teacher=teacher, student=student)
    algorithm, trained = one_round(task, hidden=True, attention=True)
    assert trained.upload is not None
    assert {name: value.shape for name, value in trained.upload.items()} == {
        tensor.name: tensor.shape for tensor in exchanged_spec(task.build_models(0).student)
    }
    assert all(np.isfinite(value).all() for value in trained.upload.values())
    projections = {n: v.shape for n, v in trained.private.items() if n.startswith("projections/")}
    widths = (teacher["config"].get("hidden_size", 16), student["config"].get("hidden_size", 16))
    assert set(projections.values()) == {widths}
    assert algorithm.num_student_parameters < algorithm.num_teacher_parameters or widths[0] == widths[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_its_layers_and_takes_part_in_a_round(family: str, make_task: MakeTask) -> None:
    task = make_task(teacher=inline(family), student=layers(1))
    models = task.build_models(0)
    batch = next(task.test_data().batches(3))
    size, tokens = batch["input_ids"].shape
    out = task.forward(models.teacher, batch, hidden_states=True, attentions=True)
    assert out.logits.shape == (size, 2)
    assert out.hidden_states is not None
    assert [state.shape for state in out.hidden_states] == [(size, tokens, 16)] * 3
    assert out.attentions is not None
    assert [attention.shape for attention in out.attentions] == [(size, 2, tokens, tokens)] * 2
    assert out.token_mask is not None
    assert torch.equal(out.token_mask, batch["attention_mask"])
    plain = task.forward(models.teacher, batch, hidden_states=False, attentions=False)
    assert plain.hidden_states is None
    assert plain.attentions is None

    _, trained = one_round(task, hidden=True, attention=True)
    assert trained.upload is not None
    # Electra's and RoBERTa's heads begin with a bias of 0 and so on: what counts is that layers, ends and head move.
    moved = {name for name, value in trained.upload.items() if np.abs(value).max() > 0}
    weights = {name for name in trained.upload if name.endswith("weight") and "token_type" not in name}
    assert weights <= moved
    assert all(np.isfinite(value).all() for value in trained.upload.values())
    assert np.isfinite(trained.metrics["train_loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_embeddings_are_not_exchanged(family: str) -> None:
    model = build(teacher=inline(family)).student
    whole = {tensor.name for tensor in exchanged_spec(model)}
    freeze_embeddings(model)
    rest = {tensor.name for tensor in exchanged_spec(model)}
    gone = whole - rest
    assert gone and rest
    assert all("embed" in name for name in gone)
    assert not any("embeddings." in name or "embed_tokens" in name for name in rest)


def test_frozen_embeddings_stay_as_they_are_in_training(tiny_bert: Path, make_task: MakeTask) -> None:
    task = make_task(teacher=source(tiny_bert), freeze_embeddings=True)
    _, trained = one_round(task)
    assert trained.upload is not None
    assert not any("embeddings" in name for name in (*trained.upload, *trained.private))
    assert any("encoder" in name for name in trained.upload)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"teacher": inline()}, "task.teacher"),
        ({"student": inline()}, "task.student"),
        ({"other_teachers": [{"clients": [1], "model": inline()}]}, "task.other_teachers.0.model"),
    ],
)
def test_random_embeddings_can_not_be_frozen(options: dict[str, Any], key: str, tiny_bert: Path) -> None:
    chosen = {"teacher": source(tiny_bert), "freeze_embeddings": True, **options}
    assert refusal(**chosen).startswith(f"task.freeze_embeddings: {key} has random embeddings, which would never learn")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"teacher": inline(vocab_size=VOCABULARY - 1)}, "teacher"),
        ({"teacher": inline(), "student": inline(vocab_size=3)}, "student"),
        (
            {"teacher": inline(), "other_teachers": [{"clients": [1], "model": inline(vocab_size=3)}]},
            "other_teachers.0.model",
        ),
    ],
)
def test_a_model_must_know_every_token(options: dict[str, Any], key: str, make_task: MakeTask) -> None:
    with pytest.raises(
        ValueError, match=rf"task.{key}: the tokenizer has {VOCABULARY} tokens, the model \d+, and .*; set conf"
    ):
        make_task(**options).build_models(0)


@pytest.mark.parametrize(("family", "most"), [("bert", 40), ("roberta", 39), ("distilbert", 40), ("electra", 40)])
def test_a_model_must_have_a_position_for_every_token(family: str, most: int, make_task: MakeTask) -> None:
    teacher = inline(family, max_position_embeddings=40)
    make_task(teacher=teacher, student=layers(1), max_length=most).build_models(0)
    with pytest.raises(ValueError, match=rf"task.max_length: must be at most {most}, the positions that task.teacher"):
        make_task(teacher=teacher, student=layers(1), max_length=most + 1).build_models(0)


def test_clients_may_have_another_teacher(tiny_bert: Path, tmp_path: Path, make_task: MakeTask) -> None:
    write_bert(tmp_path / "other", seed=1, num_hidden_layers=2, hidden_size=8)
    task = make_task(
        teacher=source(tiny_bert),
        student=inline("distilbert"),
        other_teachers=[{"clients": [1], "model": source(tmp_path / "other")}],
    )
    assert [task.client_data(client).teacher for client in range(2)] == [0, 1]
    (other,) = task.build_models(0).other_teachers
    assert same(other.bert.encoder, BertForMaskedLM.from_pretrained(tmp_path / "other").bert.encoder)
    algorithm, of_first = one_round(task, client=0)
    _, of_second = one_round(task, client=1)
    assert of_first.upload is not None and of_second.upload is not None
    assert of_first.upload.keys() == of_second.upload.keys()
    head = "teacher/classifier.weight"
    assert (of_first.private[head].shape, of_second.private[head].shape) == ((2, 16), (2, 8))
    scores = algorithm.client.evaluate(algorithm.shared.initial(), of_second.private, task.client_data(1))
    assert scores.keys() == {"shared", "private", "ensemble"}


def test_each_client_has_one_teacher_and_exists(make_task: MakeTask) -> None:
    others = [{"clients": [1], "model": inline()}, {"clients": [0, 1], "model": inline()}]
    with pytest.raises(ValidationError, match="other_teachers names client 1 twice"):
        Options.model_validate({"teacher": inline(), "other_teachers": others})
    with pytest.raises(ValueError, match=r"task.other_teachers: clients must be in \[0, 1\], got 2"):
        make_task(teacher=inline(), other_teachers=[{"clients": [2], "model": inline()}])


@pytest.mark.parametrize("which", ["teacher", "student", "other_teachers.0.model"])
def test_pretrained_models_of_another_vocabulary_are_refused(
    which: str, tiny_bert: Path, tmp_path: Path, make_task: MakeTask
) -> None:
    write_bert(tmp_path / "other", pieces=PIECES[::-1])
    other = source(tmp_path / "other")
    options = {which: other} if "." not in which else {"other_teachers": [{"clients": [0], "model": other}]}
    with pytest.raises(ValueError) as caught:
        make_task(**{"teacher": source(tiny_bert), **options})
    assert str(caught.value).startswith(f"task.{which}.source: {str(tmp_path / 'other')!r} has other tokens than ")


def test_the_teachers_tokenizer_is_taken_where_none_is_named(tiny_bert: Path, make_task: MakeTask) -> None:
    one = make_task(teacher=source(tiny_bert), tokenizer=None).test_data()
    other = make_task(teacher=source(tiny_bert)).test_data()
    assert torch.equal(next(one.batches(8))["input_ids"], next(other.batches(8))["input_ids"])
    with pytest.raises(ValueError, match=r"task.tokenizer: required, because the teacher has no source"):
        make_task(teacher=inline(), tokenizer=None)


def test_weights_without_a_tokenizer_need_one_by_name(tmp_path: Path, make_task: MakeTask) -> None:
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **SIZES)
    BertForMaskedLM(config).save_pretrained(tmp_path / "weights")
    teacher = source(tmp_path / "weights")
    make_task(teacher=teacher, student=layers(1)).build_models(0)
    with pytest.raises(ValueError, match=r"task.teacher.source: .* holds no tokenizer; name one in task.tokenizer"):
        make_task(teacher=teacher, tokenizer=None)


def test_a_tokenizer_that_can_not_be_loaded_is_an_error_with_the_remedy(tmp_path: Path, make_task: MakeTask) -> None:
    with pytest.raises(ValueError) as caught:
        make_task(teacher=inline(), tokenizer="nobody/nothing")
    text = str(caught.value)
    assert text.startswith("task.tokenizer.source: no tokenizer can be loaded from 'nobody/nothing' (")
    assert "\n" not in text


def test_a_tokenizer_that_pads_on_the_left_is_turned_round(tmp_path: Path, make_task: MakeTask) -> None:
    write_tokenizer(tmp_path / "left")
    settings = tmp_path / "left" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"padding_side": "left", "truncation_side": "left",', 1))
    batch = next(make_task(teacher=inline(), tokenizer=str(tmp_path / "left")).test_data().batches(8))
    assert batch["attention_mask"][:, 0].all()
