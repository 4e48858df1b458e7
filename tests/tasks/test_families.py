"""Families of models that nobody has tried with the project: what goes through, and what is refused in one line."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from fedkd_flwr.core.protocols import Models
from fedkd_flwr.tasks.cnn import CnnOptions, load_cnn, save_cnn
from fedkd_flwr.tasks.image_classification import ImageClassificationOptions
from fedkd_flwr.tasks.layers import LayersOptions, cut_student
from fedkd_flwr.tasks.text_classification import TextClassification, TextClassificationOptions
from fedkd_flwr.tasks.token_classification import TokenClassificationOptions
from tests.tasks.conftest import PIECES, PIECES_AND_SPECIAL, one_round, write_bert, write_splits, write_tokenizer
from tests.tasks.families import POSITIONS, tiny_config

pytestmark = pytest.mark.usefixtures("offline")

ALL = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
CHECKED_ALWAYS = ("bert", "gpt2", "longformer", "opt", "qwen3")
# What is known to be refused, and why; of a family that is not here, whatever a newer library has, a traceback fails.
REFUSED = {
    "canine": "can't read this task's texts",  # of fewer than four letters
    "layoutlmv2": "no model can be built",  # needs another library
    "tapas": "can't read this task's texts",  # but tables, with seven types of tokens
}
NOT_CUT = {"albert", "funnel", "perceiver"}  # layers that share weights, blocks of layers, layers that are not a stack

Make = Callable[..., TextClassification]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts of two classes, those with "good" in them and the others."""
    texts = [
        f"{start} {word} {end}" for start in ("the", "a very", "so") for word in ("good", "bad") for end in PIECES[2:6]
    ]
    rows = {"text": texts, "label": [int("good" in text) for text in texts]}
    folder = tmp_path_factory.mktemp("texts")
    return write_splits(folder, {n: c[:16] for n, c in rows.items()}, {n: c[6:14] for n, c in rows.items()})


@pytest.fixture
def make(data: str, tiny_tokenizer: Path) -> Make:
    """A task of two clients, its student one layer of its teacher unless said otherwise."""

    def build(**options: Any) -> TextClassification:
        student = {"name": "layers", "num_layers": 1}
        chosen = {"data": data, "tokenizer": str(tiny_tokenizer), "max_length": 32, "student": student, **options}
        return TextClassificationOptions.model_validate(chosen).build(2, 0)

    return build


def random(family: str, **changes: Any) -> dict[str, Any]:
    return {"config": {**tiny_config(family, PIECES_AND_SPECIAL), **changes}}


def refusal(task: TextClassification) -> str:
    with pytest.raises(ValueError) as caught:
        one_round(task)
    text = str(caught.value)
    assert re.match(r"(task|algorithm)\.", text)
    assert "\n" not in text
    return text


def trains_and_is_exported(task: TextClassification, folder: Path) -> None:
    """One round of FedKD, and a student that the library loads and that says the same."""
    algorithm, trained = one_round(task)
    assert trained.upload is not None
    assert all(np.isfinite(value).all() for value in trained.upload.values())
    assert np.isfinite(trained.metrics["train_loss"])
    scores = algorithm.client.evaluate(algorithm.shared.initial(), trained.private, task.client_data(0))
    assert scores.keys() == {"shared", "private", "ensemble"}
    student = task.build_models(0).student.eval()
    task.export(student, folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    shutil.rmtree(folder)
    batch = next(task.test_data().batches(3))
    of_both = []
    for model in (student, again):
        torch.manual_seed(0)  # some families hash their tokens at random
        with torch.no_grad():
            of_both.append(task.forward(model, batch, hidden_states=False, attentions=False).logits)
    torch.testing.assert_close(*of_both)


def goes_through(family: str, make: Make, folder: Path) -> str:
    """How a family fares: "cut", "whole" where its student can't be cut, or the reason why it is refused."""
    reasons = []
    for how, student in (("cut", {"name": "layers", "num_layers": 1}), ("whole", random(family))):
        try:
            trains_and_is_exported(make(teacher=random(family), student={"name": "transformers"} | student), folder)
            return how
        except ValueError as error:
            if not re.match(r"(task|algorithm)\.", str(error)) or "\n" in str(error):
                raise
            reasons.append(str(error))
    return reasons[-1]


@pytest.mark.nightly
@pytest.mark.parametrize("family", ALL)
def test_every_family_goes_through_or_is_refused_in_one_line(family: str, make: Make, tmp_path: Path) -> None:
    found = goes_through(family, make, tmp_path / "model")
    print(f"{family}: {found}")  # shown by -rP
    if family in REFUSED:
        assert REFUSED[family] in found
    else:  # the very word: a reason may have it in a sentence
        assert found == ("whole" if family in NOT_CUT else "cut")


TOKENS = [
    "bert",
    "bloom",
    "deberta-v2",
    "electra",
    "gpt2",
    "longformer",
    "mpt",
    "qwen3",
    "roformer",
    "t5",
    "xlnet",
    "yoso",
]
IMAGES = [
    "beit",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "mobilevit",
    "regnet",
    "vit",
    "vit_msn",
]


@pytest.mark.nightly
@pytest.mark.parametrize("family", TOKENS)
def test_families_tag_words_as_well(family: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    words, tags = [["the", "drug"], ["so", "aspirin", "did", "help"]], [["O", "B-X"], ["O", "B-X", "O", "O"]]
    rows = {"tokens": words * 6, "ner_tags": tags * 6}
    options: dict[str, Any] = {"data": write_splits(tmp_path, rows, rows), "tokenizer": str(tiny_tokenizer)}
    options |= {"max_length": 16, "teacher": random(family), "student": {"name": "layers", "num_layers": 1}}
    task = TokenClassificationOptions.model_validate(options).build(2, 0)
    _, trained = one_round(task)
    assert np.isfinite(trained.metrics["train_loss"])


@pytest.mark.nightly
@pytest.mark.parametrize("family", IMAGES)
def test_families_classify_images_as_well(family: str, tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / ("train", "test")[number % 2] / "ab"[number // 2 % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    model = {"name": "transformers", **random(family)}
    task = ImageClassificationOptions.model_validate({"data": str(tmp_path), "teacher": model, "student": model}).build(
        2, 0
    )
    _, trained = one_round(task)
    assert np.isfinite(trained.metrics["train_loss"])


@pytest.mark.parametrize("family", CHECKED_ALWAYS)
def test_families_of_every_kind_train_are_cut_and_exported(family: str, make: Make, tmp_path: Path) -> None:
    assert goes_through(family, make, tmp_path / "model") == "cut"


@pytest.mark.parametrize("family", ["opt", "biogpt", "roformer", "gptj", "mpt", "gpt2", "xlm", "nystromformer", "bart"])
def test_the_positions_of_a_family_are_found_whatever_holds_them(family: str, make: Make) -> None:
    teacher = random(family)
    make(teacher=teacher, max_length=POSITIONS).build_models(0)
    said = f"task.max_length: must be at most {POSITIONS}, the positions that task.teacher has, got 300"
    assert refusal(make(teacher=teacher, max_length=300)) == said


def test_positions_of_the_student_and_of_other_teachers_count_as_well(make: Make) -> None:
    of_student = make(teacher=random("bert"), student={"name": "transformers", **random("opt")}, max_length=65)
    assert refusal(make(teacher=random("t5"), student={"name": "transformers", **random("opt")}, max_length=65)) == (
        "task.max_length: must be at most 64, the positions that task.student has, got 65"
    )
    others = [{"clients": [1], "model": random("mpt")}]
    assert "task.other_teachers.0.model has, got 65" in refusal(
        make(teacher=random("llama"), other_teachers=others, max_length=65)
    )
    assert "positions that task.teacher has" in refusal(of_student)


def test_models_without_a_table_of_positions_read_texts_of_any_length(make: Make) -> None:
    for family in ("llama", "t5", "xlnet"):
        make(teacher=random(family), max_length=300).build_models(0)


def test_asking_a_model_changes_neither_it_nor_the_random_numbers(make: Make) -> None:
    task = make(teacher=random("roberta"))
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()
    torch.manual_seed(3)
    np.random.seed(3)
    models = task.build_models(0)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected
    assert not any(module._forward_hooks for module in models.teacher.modules())
    assert all(parameter.grad is None for parameter in models.teacher.parameters())


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bert", {"return_dict": False}),
        ("deberta", {"return_dict": False}),
        ("longformer", {"return_dict": False, "output_hidden_states": True}),
        ("t5", {"return_dict": False, "problem_type": "multi_label_classification"}),
        ("llama", {"return_dict": False, "problem_type": "regression"}),
    ],
)
def test_what_a_configuration_says_of_answers_does_not_matter(family: str, said: dict[str, Any], make: Make) -> None:
    one, other = (one_of(make, random(family, **changes)) for changes in ({}, said))
    torch.testing.assert_close(one, other)


def one_of(make: Make, teacher: Mapping[str, Any]) -> torch.Tensor:
    task = make(teacher=teacher, student={"name": "transformers", **random("bert")})
    with torch.no_grad():
        batch = next(task.test_data().batches(3))
        model = task.build_models(0).teacher.eval()
        return task.forward(model, batch, hidden_states=False, attentions=False).logits


def test_another_number_of_labels_than_the_data_has_is_refused(make: Make) -> None:
    assert refusal(make(teacher=random("bert", num_labels=1))) == (
        "task.teacher.config.num_labels: must be 2, the classes that the task has, got 1; leave it away"
    )
    make(teacher=random("bert", num_labels=2)).build_models(0)


@pytest.mark.parametrize("family", ["yoso", "longformer"])
def test_attention_maps_of_another_kind_turn_their_term_off(
    family: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(teacher=random(family))
    one_round(task)
    assert (
        "algorithm.attention is off: attention maps of the teacher are no [batch, heads, tokens, tokens]" in caplog.text
    )
    with pytest.raises(ValueError, match=r"^algorithm\.attention: attention maps of the teacher are no .*; set attent"):
        one_round(task, attention=True)


def test_hidden_states_of_fewer_tokens_turn_their_term_off(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one_round(make(teacher=random("funnel"), student={"name": "transformers", **random("bert")}))
    assert "algorithm.hidden is off: hidden states of the teacher are no [batch, tokens, width]" in caplog.text


@pytest.mark.parametrize("family", ["layoutlmv2", "tapas"])
def test_models_that_read_something_else_are_refused_in_one_line(family: str, make: Make) -> None:
    assert refusal(make(teacher=random(family))).startswith("task.teacher")


def test_a_model_that_reads_its_answer_where_texts_end_knows_how_they_do(make: Make) -> None:
    teacher = random("bart", dropout=0.0)
    assert make(teacher=teacher).build_models(0).teacher.config.eos_token_id == 3  # [SEP]
    pretrained_otherwise = random("bart", eos_token_id=9)
    assert make(teacher=pretrained_otherwise).build_models(0).teacher.config.eos_token_id == 3


def test_a_pretrained_model_for_texts_that_end_in_another_way_is_refused(make: Make, tmp_path: Path) -> None:
    model = make(teacher=random("bart")).build_models(0).teacher
    model.config.eos_token_id = 9
    model.save_pretrained(tmp_path / "bart")
    text = refusal(make(teacher={"source": str(tmp_path / "bart")}))
    assert text.startswith(
        "task.teacher: a BartForSequenceClassification can't read this task's texts (ValueError: Each"
    )


def model_of(family: str, **changes: Any) -> nn.Module:
    config = tiny_config(family, PIECES_AND_SPECIAL)
    made = transformers.CONFIG_MAPPING[family].from_dict({**config, **changes})
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_config(made)
    return model


def layers_of(model: nn.Module, stack: str, tensor: str) -> list[torch.Tensor]:
    layers = model.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    return [layer.state_dict()[tensor] for layer in layers]


def test_lists_with_an_entry_for_each_layer_are_cut_as_the_layers_are() -> None:
    teacher = model_of("longformer", num_hidden_layers=4, attention_window=[2, 4, 6, 8])
    student = cut_student(teacher, LayersOptions(num_layers=2, pick="spread"))
    assert student.config.attention_window == [4, 8]
    own, there = (layers_of(of, "longformer.encoder.layer", "output.dense.weight") for of in (student, teacher))
    assert torch.equal(own[0], there[1])
    assert torch.equal(own[1], there[3])


def test_lists_of_kinds_of_layers_are_cut_in_both_ways_that_they_are_written() -> None:
    teacher = model_of("gpt_neo", num_layers=4, attention_types=[[["global", "local"], 2]])
    student = cut_student(teacher, LayersOptions(num_layers=2, pick="spread"))
    assert student.config.attention_layers == ["local", "local"]
    again = type(student.config).from_dict(student.config.to_dict())
    assert (again.num_layers, again.attention_layers) == (2, ["local", "local"])


@pytest.mark.parametrize("family", ["jamba", "minimax", "qwen3_next", "zamba"])
def test_a_mixture_of_layers_is_cut_at_its_first_ones(family: str) -> None:
    teacher = model_of(family)
    student = cut_student(teacher, LayersOptions(num_layers=1))
    of_both = [model.state_dict() for model in (teacher, student)]
    assert len(of_both[1]) < len(of_both[0])
    assert all(torch.equal(tensor, of_both[0][name]) for name, tensor in of_both[1].items())


def test_layers_that_are_not_alike_do_not_stand_in_for_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"^task\.student\.pick: layers of a JambaForSequenceClassification are not ali"
    ):
        cut_student(model_of("jamba"), LayersOptions(num_layers=1, pick="spread"))


def test_every_stack_of_a_layer_is_cut() -> None:
    teacher = model_of("xlm", n_layers=4)
    student = cut_student(teacher, LayersOptions(num_layers=2, pick="spread"))
    for stack, tensor in (("attentions", "q_lin.weight"), ("ffns", "lin1.weight")):
        own, there = (layers_of(of, f"transformer.{stack}", tensor) for of in (student, teacher))
        assert torch.equal(own[0], there[1])
        assert torch.equal(own[1], there[3])


@pytest.mark.parametrize(("family", "stacks"), [("bart", "model"), ("t5", "transformer")])
def test_an_encoder_and_a_decoder_are_both_cut(family: str, stacks: str) -> None:
    student = cut_student(model_of(family), LayersOptions(num_layers=1))
    lengths = {n: len(m) for n, m in student.named_modules() if re.fullmatch(rf"{stacks}\.\w+\.(layers|block)", n)}
    assert sorted(lengths.values()) == [1, 1]


def test_more_layers_than_the_shorter_stack_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^task\.student\.num_layers must be at most the teacher's 1, got 2"):
        cut_student(model_of("bart", encoder_layers=3, decoder_layers=1), LayersOptions(num_layers=2))


def add_padding(folder: Path, seed: int = 0) -> int:
    """A small Llama whose tokenizer was given a token to pad with, for which it has no row; how many rows it has."""
    size = write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert len(tokenizer) == size + 1
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model_of("llama").save_pretrained(folder)
    return size


def test_an_added_padding_token_that_the_model_lacks_is_replaced(make: Make, tmp_path: Path) -> None:
    size = add_padding(tmp_path / "llama")
    task = make(teacher={"source": str(tmp_path / "llama")}, tokenizer=None)
    batch = next(task.test_data().batches(8))
    assert int(batch["input_ids"].max()) < size
    trains_and_is_exported(task, tmp_path / "model")
    models: Models = task.build_models(0)
    task.export(models.student, tmp_path / "model")
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    pieces = exported(["good <pad> so", "bad"], padding=True, return_tensors="pt")
    assert int(pieces["input_ids"].max()) < size


def test_an_added_padding_token_that_the_model_has_stays(make: Make, tmp_path: Path) -> None:
    size = add_padding(tmp_path / "llama")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    model.resize_token_embeddings(size + 1)
    model.save_pretrained(tmp_path / "llama")
    batch = next(make(teacher={"source": str(tmp_path / "llama")}, tokenizer=None).test_data().batches(8))
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.min() < lengths.max()
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {size}


def test_another_added_token_is_refused_with_a_remedy_that_works(make: Make, tmp_path: Path) -> None:
    size = add_padding(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.add_special_tokens({"sep_token": "<sep>"})
    tokenizer.save_pretrained(tmp_path / "llama")
    text = refusal(make(teacher={"source": str(tmp_path / "llama")}, tokenizer=None))
    assert f"the tokenizer has {size + 1} tokens, the model {size}, and '<sep>' is not among them" in text
    assert "resize_token_embeddings" in text
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "llama")
    make(teacher={"source": str(tmp_path / "llama")}, tokenizer=None).build_models(0)


def damage(file: Path, tensor: str, value: float) -> None:
    tensors = load_file(file)
    tensors[tensor].view(-1)[1] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("which", "value"),
    [("teacher", float("nan")), ("student", float("inf")), ("other_teachers.0.model", float("-inf"))],
)
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused_by_name(
    which: str, value: float, tiny_bert: Path, tmp_path: Path, make: Make
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_bert, folder)
    damage(folder / "model.safetensors", "bert.encoder.layer.0.output.dense.weight", value)
    damaged = {"name": "transformers", "source": str(folder)}
    options: dict[str, Any] = {"teacher": {"source": str(tiny_bert)}}
    options |= {which: damaged} if "." not in which else {"other_teachers": [{"clients": [1], "model": damaged}]}
    assert refusal(make(**options)) == (
        f"task.{which}.source: {str(folder)!r} holds numbers that are not finite in "
        "'bert.encoder.layer.0.output.dense.weight' (model.safetensors); take another checkpoint, or one of an "
        "earlier step"
    )


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path, make: Make) -> None:
    write_bert(tmp_path)
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model.safetensors").unlink()
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name, file = next((n, f) for n, f in where.items() if n.endswith("layer.2.output.dense.weight"))
    damage(tmp_path / file, name, float("nan"))
    assert f"({file}); take another checkpoint" in refusal(make(teacher={"source": str(tmp_path)}))


def test_a_network_for_images_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    model = CnnOptions(num_channels=(2,), kernel_size=3, hidden_size=4).build((1, 8, 8), 2)
    save_cnn(model, tmp_path, {})
    load_cnn(tmp_path)
    damage(tmp_path / "model.safetensors", "hidden.bias", float("nan"))
    with pytest.raises(ValueError, match=r"holds numbers that are not finite in 'hidden\.bias'; take another"):
        load_cnn(tmp_path)
