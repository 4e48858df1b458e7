import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch import nn

import client_app
from fedkd_flwr.experiment import ConfigError, parse
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.tasks.cnn import Cnn
from fedkd_flwr.tasks.image_classification import ImageClassification, ImageClassificationOptions
from tests.tasks.conftest import everything, state

pytestmark = pytest.mark.usefixtures("offline")

SIDE, NUM_CLIENTS, CLASSES = 8, 2, ("cat", "dog")


def vit(width: int = 8, depth: int = 2, kind: str = "vit", **more: object) -> dict[str, Any]:
    config = {
        "model_type": kind,
        "patch_size": 4,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": width,
    }
    return {"name": "transformers", "config": config | more}


def resnet(width: int = 4) -> dict[str, Any]:
    config = {
        "model_type": "resnet",
        "embedding_size": width,
        "hidden_sizes": [width, 2 * width],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    return {"name": "transformers", "config": config}


LAYER = {"name": "layers", "num_layers": 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files in folders of classes; nine training images for each of two clients, of which one is held out."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", 10), ("test", 4)):
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def parquet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files of a table."""
    root = tmp_path_factory.mktemp("tables")
    for split in ("train", "test"):
        table = load_dataset("imagefolder", data_dir=str(folder), split=split, cache_dir=str(root / "cache"))
        table.to_parquet(root / f"{split}.parquet")
    return root


def build(folder: Path, **changes: object) -> ImageClassification:
    chosen = {"data": str(folder), "client_test_fraction": 0.1, **changes}
    return ImageClassificationOptions.model_validate(chosen).build(NUM_CLIENTS, 0)


def outputs(task: ImageClassification, model: nn.Module) -> Any:
    with torch.no_grad():
        return task.forward(model.eval(), everything(task.test_data()), hidden_states=True, attentions=True)


@pytest.mark.parametrize(
    ("teacher", "student", "data"),
    [
        (vit(16), vit(8, 1), "parquet"),
        (vit(16, kind="deit"), vit(8, 1, kind="deit"), "folder"),
        (resnet(8), resnet(4), "folder"),
        (vit(16), LAYER, "folder"),
        (vit(16), {"name": "cnn", "num_channels": [2], "kernel_size": 3, "hidden_size": 4}, "folder"),
    ],
    ids=["vit", "deit", "resnet", "layers", "vit to cnn"],
)
def test_a_round_of_fedkd_trains_any_image_model(
    teacher: dict[str, Any], student: dict[str, Any], data: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = str(request.getfixturevalue(data))
    task = {"name": "image_classification", "data": source, "client_test_fraction": 0.1}
    text = json.dumps(
        {
            "name": "images",
            "num_clients": NUM_CLIENTS,
            "num_rounds": 1,
            "task": {**task, "teacher": teacher, "student": student},
            # Nine examples in batches of four leave one alone, which a batch norm could make nothing of.
            "algorithm": {"name": "fedkd", "local": {"num_epochs": 1, "batch_size": 4}},
        }
    )
    run_dir = run_in_process(parse(text), client_app.app, tmp_path / "run")
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["status"] == "completed"
    assert (run_dir / "student" / "config.json").is_file()


def alone(folder: Path, **changes: object) -> ImageClassification:
    """Of one client's images all but one are held out."""
    data = {"source": str(folder), "train_split": "train[:2]"}
    chosen = {"data": data, "label_names": ["cat", "dog"], **changes}
    return ImageClassificationOptions.model_validate(chosen).build(1, 0)


CNN = {"name": "cnn", "num_channels": [2], "kernel_size": 3, "hidden_size": 4}


@pytest.mark.parametrize(
    ("key", "models"),
    [
        ("teacher", {"teacher": resnet(), "student": CNN}),
        ("student", {"teacher": CNN, "student": resnet()}),
        (
            "other_teachers.0.model",
            {"teacher": CNN, "student": CNN, "other_teachers": [{"clients": [0], "model": resnet()}]},
        ),
    ],
)
def test_a_model_that_a_clients_only_image_is_too_few_for_is_refused(
    key: str, models: dict[str, Any], folder: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        alone(folder, **models).build_models(0)
    start = f"task.{key}: a ResNetForImageClassification normalises over a batch, which takes two images of 8x8 pixels "
    end = (
        ", but client 0 has one training image; choose another task.partition, a larger task.image_size, "
        "or a model without batch normalisation"
    )
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(end)
    assert "\n" not in str(caught.value)


def test_larger_images_other_models_and_clients_with_more_are_not_refused(folder: Path) -> None:
    task = alone(folder, teacher=resnet(), student=CNN, image_size=16)
    fresh = build(folder, teacher=resnet(), student=CNN, image_size=16).build_models(0)
    torch.testing.assert_close(state(task.build_models(0).teacher), state(fresh.teacher), rtol=0, atol=0)
    alone(folder, teacher=vit(), student=LAYER).build_models(0)
    unused = {"teacher": resnet(), "student": CNN, "other_teachers": [{"clients": [0], "model": CNN}]}
    alone(folder, **unused).build_models(0)
    build(folder, teacher=resnet(), student=resnet()).build_models(0)


def test_hidden_states_are_tokens_and_attentions_where_there_are_any(folder: Path) -> None:
    task = build(folder, teacher=vit(16), student=resnet(4))
    models = task.build_models(0)
    of_vit, of_resnet = (outputs(task, model) for model in (models.teacher, models.student))
    assert [tuple(h.shape) for h in of_vit.hidden_states] == [(8, 5, 16)] * 3
    assert [tuple(a.shape) for a in of_vit.attentions] == [(8, 2, 5, 5)] * 2
    assert [tuple(h.shape) for h in of_resnet.hidden_states] == [(8, 4, 4), (8, 4, 4), (8, 1, 8)]
    assert of_resnet.attentions is None


@pytest.mark.parametrize(("pick", "layer"), [("first", 0), ("spread", 1)])
def test_a_student_is_cut_from_a_vision_transformer(pick: str, layer: int, folder: Path) -> None:
    models = build(folder, teacher=vit(8, 2), student={**LAYER, "pick": pick}).build_models(0)
    teacher, student = state(models.teacher), state(models.student)
    cut = {name for name in student if name.startswith("vit.layers.0.")}
    assert len(student) < len(teacher)
    assert cut
    for name in student:
        source = name.replace("vit.layers.0.", f"vit.layers.{layer}.")
        assert torch.equal(student[name], teacher[source])


def test_the_task_tells_models_the_size_and_channels_of_its_images(folder: Path) -> None:
    task = build(folder, teacher=vit(), student=vit(), channels=1, image_size=12)
    config: Any = task.build_models(0).teacher.config
    assert (config.image_size, config.num_channels, config.id2label) == (12, 1, dict(enumerate(CLASSES)))
    assert task.example_batch()["pixel_values"].shape == (1, 1, 12, 12)


def test_class_weights_are_part_of_the_outputs_of_either_kind_of_model(folder: Path) -> None:
    task = build(folder, teacher=vit(), class_weights=[1, 3], student={"num_channels": [2], "kernel_size": 3})
    models = task.build_models(0)
    for model in (models.teacher, models.student):
        assert outputs(task, model).class_weights.tolist() == [1, 3]


@pytest.mark.parametrize(("image_size", "mean"), [(None, [0.4]), (12, [0.1, 0.2, 0.3])])
def test_a_pipeline_scores_images_as_the_task_does(
    image_size: int | None, mean: list[float], folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification, pipeline

    task = build(folder, teacher=vit(), student=LAYER, image_size=image_size, pixel_mean=mean, pixel_std=0.3)
    model = task.build_models(0).student
    task.export(model, tmp_path)
    expected = outputs(task, model).logits
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        again = loaded(pixel_values=everything(task.test_data())["pixel_values"]).logits
    torch.testing.assert_close(again, expected)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    files = [str(path) for label in CLASSES for path in sorted((folder / "test" / label).iterdir())]
    found = [{entry["label"]: entry["score"] for entry in entries} for entries in classify(files)]
    for scores, probabilities in zip(found, expected.softmax(dim=-1), strict=True):
        assert [scores[name] for name in CLASSES] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_a_pretrained_model_for_images_of_another_size_is_refused_with_both(folder: Path, tmp_path: Path) -> None:
    task = build(folder, teacher=vit(), student=LAYER)
    task.export(task.build_models(0).teacher, tmp_path)
    source = {"name": "transformers", "source": str(tmp_path)}
    torch.testing.assert_close(
        state(build(folder, teacher=source, student=LAYER).build_models(1).teacher),
        state(task.build_models(0).teacher),
    )
    with pytest.raises(ValueError, match=r"^task\.teacher\.source: .* has weights of other shapes, vit\.") as caught:
        build(folder, teacher=source, student=LAYER, image_size=16).build_models(0)
    assert "(image_size is 8 there, 16 here); change the task's sizes or task.teacher.config" in str(caught.value)


def test_frozen_embeddings_are_those_of_the_transformers(folder: Path, tmp_path: Path) -> None:
    task = build(folder, teacher=vit(), student=LAYER)
    task.export(task.build_models(0).teacher, tmp_path)
    source = {"name": "transformers", "source": str(tmp_path)}
    models = build(folder, teacher=source, student={"num_channels": [2], "kernel_size": 3}, freeze_embeddings=True)
    built = models.build_models(0)
    frozen = {name for name, parameter in built.teacher.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("vit.embeddings.") for name in frozen)
    assert isinstance(built.student, Cnn)
    assert all(parameter.requires_grad for parameter in built.student.parameters())


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"teacher": vit(patch_size=16)}, "task.teacher: a ViTForImageClassification can't take images of 8x8 pixels"),
        ({"teacher": vit(kind="bert")}, "task.teacher.config: "),
        ({"teacher": resnet(), "student": LAYER}, "task.student: a ResNetForImageClassification has no plain stack of"),
        ({"teacher": vit(), "student": {**LAYER, "num_layers": 3}}, "task.student.num_layers must be at most the te"),
        ({"teacher": vit(), "freeze_embeddings": True}, "task.freeze_embeddings: task.teacher has random embeddings"),
        ({"student": LAYER}, "task: student.name: layers are cut from a teacher of name transformers"),
        ({"teacher": {"name": "transformers"}}, "task.teacher: needs source (a hub id or a folder), or config with"),
    ],
    ids=str,
)
def test_models_that_can_not_be_had_are_refused_with_the_key(changes: dict[str, Any], start: str, folder: Path) -> None:
    task = {"name": "image_classification", "data": str(folder)}
    experiment = {"name": "images", "num_clients": NUM_CLIENTS, "num_rounds": 1, "algorithm": {"name": "fedavg"}}
    small = {"num_channels": [2], "kernel_size": 3}
    with pytest.raises(ConfigError) as caught:
        read = parse(json.dumps(experiment | {"task": {**task, "teacher": small, "student": small, **changes}}))
        read.build_algorithm(read.build_task())
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
