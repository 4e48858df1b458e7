import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import client_app
from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.experiment import parse
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.tasks.cnn import Cnn, CnnOptions, load_cnn
from tests.conftest import ROOT
from tests.tasks.conftest import everything, images, state
from tests.tasks.image_data import (
    NATURAL,
    NUM_CLASSES,
    NUM_CLIENTS,
    NUM_TEST,
    NUM_TRAIN,
    SMALL,
    build,
    columns,
    options,
    refusal,
    rows,
    write,
    write_both,
)

pytestmark = pytest.mark.usefixtures("offline")

MNIST = ROOT.parent / "shared" / "data" / "mnist"


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data that a test may spoil."""
    return write_both(tmp_path / "data")


def equal(a: nn.Module, b: nn.Module) -> bool:
    return state(a).keys() == state(b).keys() and all(torch.equal(state(a)[name], state(b)[name]) for name in state(a))


@pytest.mark.parametrize("partition", [{"name": "iid"}, {"name": "dirichlet", "min_examples": 4}, NATURAL], ids=str)
def test_each_training_image_belongs_to_one_client_and_the_test_split_to_the_server(
    partition: object, stored: Path
) -> None:
    task = build(stored, partition=partition)
    clients = [task.client_data(client) for client in range(NUM_CLIENTS)]
    held = [data.train for data in clients]
    if partition != NATURAL:
        held += [data.test for data in clients]
    assert sum(map(len, held)) == NUM_TRAIN
    assert len(set().union(*map(images, held))) == NUM_TRAIN  # all images differ
    assert len(images(task.test_data())) == NUM_TEST
    assert not set().union(*map(images, held)) & images(task.test_data())


def test_a_natural_client_scores_on_its_own_rows_of_the_test_split(stored: Path) -> None:
    task = build(stored, partition=NATURAL)
    own = [images(task.client_data(client).test) for client in range(NUM_CLIENTS)]
    assert set().union(*own) == images(task.test_data())
    assert sum(map(len, own)) == NUM_TEST


def test_a_natural_client_without_rows_in_the_test_split_keeps_a_share_of_its_own(folder: Path) -> None:
    write(folder, "test", {name: values[:3] for name, values in rows(NUM_TEST, first=NUM_TRAIN).items()})
    task = build(folder, partition=NATURAL, client_test_fraction=0.25)
    sizes = [(len(data.train), len(data.test)) for data in map(task.client_data, range(NUM_CLIENTS))]
    assert sizes == [(12, 3), (9, 3), (9, 3), (9, 3)]


def test_a_test_split_without_the_column_leaves_every_natural_client_a_share_of_its_own(folder: Path) -> None:
    test = rows(NUM_TEST, first=NUM_TRAIN)
    del test["site"]
    write(folder, "test", test)
    data = build(folder, partition=NATURAL, client_test_fraction=0.5).client_data(0)
    assert (len(data.train), len(data.test)) == (6, 6)
    assert not images(data.train) & images(data.test)


@pytest.mark.parametrize("most", [1, 2, 100])
def test_a_client_trains_on_no_more_of_a_class_than_asked_and_scores_on_as_many(most: int, stored: Path) -> None:
    whole = build(stored, partition=NATURAL).client_data(1)
    data = build(stored, partition=NATURAL, max_examples_per_class=most).client_data(1)
    counts = Counter(everything(data.train)["labels"].tolist())
    assert counts == dict.fromkeys(range(NUM_CLASSES), min(most, 4))
    assert images(data.train) <= images(whole.train)
    assert images(data.test) == images(whole.test)


@pytest.mark.parametrize("changes", [{}, {"partition": NATURAL}, {"max_examples_per_class": 2}], ids=str)
def test_the_report_counts_the_images_that_clients_learn_from(changes: dict[str, Any], stored: Path) -> None:
    task = build(stored, **changes)
    counts = task.data_report().label_counts
    assert counts == tuple(task.client_data(client).label_counts for client in range(NUM_CLIENTS))
    assert [sum(mine) for mine in counts] == [len(task.client_data(client).train) for client in range(NUM_CLIENTS)]


def test_the_seed_decides_which_examples_of_a_class_those_are(stored: Path) -> None:
    first, again, other = (
        images(build(stored, seed=seed, partition=NATURAL, max_examples_per_class=1).client_data(0).train)
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_classes_without_names_are_counted(folder: Path) -> None:
    for split in ("train", "test"):
        write(folder, split, rows(NUM_TRAIN), named=False)
    task = build(folder)
    out = task.forward(task.build_models(0).student, task.example_batch(), hidden_states=False, attentions=False)
    assert out.logits.shape == (1, NUM_CLASSES)


@pytest.mark.parametrize("partition_id", [-1, NUM_CLIENTS])
def test_a_client_that_does_not_exist_is_an_error(partition_id: int, stored: Path) -> None:
    with pytest.raises(ValueError, match=r"^partition-id must be in \[0, 3\]"):
        build(stored).client_data(partition_id)


def test_the_default_network_on_mnists_images_has_582026_parameters() -> None:
    model = CnnOptions().build((1, 28, 28), 10)
    assert sum(p.numel() for p in model.parameters()) == 582_026


def test_the_network_is_convolution_relu_maximum_and_two_linear_layers() -> None:
    model = CnnOptions(num_channels=(3, 5), kernel_size=3, hidden_size=7).build((2, 12, 15), 4)
    layers: list[nn.Module] = []
    for convolution in model.convolutions:
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten(), model.hidden, nn.ReLU(), model.classifier)
    batch = torch.randn(6, 2, 12, 15, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch), plain(batch))
    assert model(batch).shape == (6, 4)


def test_the_same_seed_builds_the_same_models_and_another_builds_others(stored: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        build(stored, seed=task_seed).build_models(seed) for task_seed, seed in ((0, 7), (9, 7), (0, 8))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first.teacher, again.teacher)
    assert equal(first.student, again.student)
    assert not equal(first.teacher, other.teacher)


def test_the_student_starts_with_the_teachers_tensors_where_names_and_shapes_agree(stored: Path) -> None:
    same = build(stored).build_models(0)
    assert equal(same.teacher, same.student)
    narrow = build(stored, student={**SMALL, "hidden_size": 2}).build_models(0)
    teacher, student = state(narrow.teacher), state(narrow.student)
    agree = {name for name in student if student[name].shape == teacher[name].shape}
    assert agree == {"convolutions.0.weight", "convolutions.0.bias", "classifier.bias"}
    assert all(torch.equal(student[name], teacher[name]) for name in agree)


def test_a_forward_pass_returns_logits_and_labels_but_no_hidden_states(stored: Path) -> None:
    task = build(stored)
    batch = next(iter(task.test_data().batches(5)))
    out = task.forward(task.build_models(0).teacher, batch, hidden_states=True, attentions=True)
    assert out.logits.shape == (5, NUM_CLASSES)
    assert torch.equal(out.labels, batch["labels"])
    assert (out.hidden_states, out.attentions, out.token_mask) == (None, None, None)


def test_the_example_batch_is_shaped_like_real_data(stored: Path) -> None:
    task = build(stored)
    example, real = task.example_batch(), next(iter(task.test_data().batches(1)))
    assert {n: (t.shape, t.dtype) for n, t in example.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}


def test_a_model_that_always_answers_one_class_scores_that_classs_share(stored: Path) -> None:
    task = build(stored)
    model = task.build_models(0).student
    assert isinstance(model, Cnn)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(NUM_CLASSES)[1] * 100)
    score = score_of(task, model, task.test_data())
    assert list(score) == ["accuracy", "macro_f1", "loss"]
    assert score["accuracy"] == pytest.approx(1 / NUM_CLASSES)
    assert score["loss"] == pytest.approx(100 * (1 - 1 / NUM_CLASSES), rel=1e-5)


def test_an_exported_model_is_read_back_with_all_that_is_needed_to_use_it(stored: Path, tmp_path: Path) -> None:
    task = build(stored, pixel_mean=0.25)
    model = task.build_models(3).teacher
    for _ in range(2):  # each evaluation writes it anew
        task.export(model, tmp_path / "some" / "model")
    loaded = load_cnn(tmp_path / "some" / "model")
    pixels = next(iter(task.test_data().batches(4)))["pixel_values"]
    assert torch.equal(loaded(pixels), model(pixels))
    config = json.loads((tmp_path / "some" / "model" / "config.json").read_text())
    assert config["label_names"] == ["red", "green", "blue"]
    assert config["pixels"] == {"image_size": None, "channels": 1, "pixel_mean": [0.25], "pixel_std": [0.5]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 2},
        {"image_size": 0},
        {"max_examples_per_class": 0},
        {"pixel_std": 0.0},
        {"pixel_mean": 1.5},
        {"pixel_mean": [0.1, 0.2]},
        {"partition": {"name": "natural"}},
        {"teacher": {"name": "mlp"}},
        {"teacher": {"num_channels": []}},
        {"student": {"num_channels": [0]}},
        {"student": {"kernel_size": 0}},
        {"student": {"name": "layers", "num_layers": 1}},
        {"freeze_embeddings": True},
        {"class_weights": "heavy"},
        {"label_names": ["one"]},
        {"other_teachers": [{"clients": [0], "model": SMALL}, {"clients": [1, 0], "model": SMALL}]},
        {"colour": True},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict[str, object], stored: Path) -> None:
    with pytest.raises(ValidationError):
        options(stored, **wrong)


@pytest.mark.parametrize(
    ("wrong", "start"),
    [
        ({"partition": NATURAL | {"column": "x"}}, "task.partition.column: split 'train' has no column 'x'; columns: "),
        ({"num_clients": 3, "partition": NATURAL}, "num_clients: must be 4, the number of distinct values of column "),
        ({"num_clients": 25}, "num_clients: 25 clients need at least 50 training examples, the data has 48"),
        ({"class_weights": [1, 2]}, "task.class_weights must be 3 numbers, one for each class, got 2"),
        (
            {"student": {**SMALL, "kernel_size": 8}},
            "task.student: 1 convolutions with kernel_size 8 leave nothing of images of 8x8 pixels; lower kernel_size",
        ),
        (
            {"other_teachers": [{"clients": [4], "model": SMALL}]},
            "task.other_teachers: clients must be in [0, 3], got 4",
        ),
        (
            {"other_teachers": [{"clients": [3], "model": {**SMALL, "kernel_size": 8}}]},
            "task.other_teachers.0.model: 1 convolutions with kernel_size 8 leave nothing of images of 8x8 pixels",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_data_are_refused_with_the_key(
    wrong: dict[str, Any], start: str, stored: Path
) -> None:
    assert refusal(stored, **wrong).startswith(start)


@pytest.mark.parametrize(
    ("names", "start"),
    [
        ({"image": "x"}, "task.data.columns.image: split 'train' has no column 'x'; columns: image, label, site"),
        ({"image": "label"}, "task.data.columns.image: 'label' holds no images but ClassLabel("),
        (
            {"image": "site"},
            "task.data: no row of split 'train' can be used: 48 name an image file that is not there (",
        ),
        ({"label": "x"}, "task.data.columns.label: split 'train' has no column 'x'; columns: image, label, site"),
        ({"label": "image"}, "task.data.columns.label: 'image' is the column of the images; name another"),
    ],
    ids=str,
)
def test_columns_that_do_not_fit_are_refused_with_the_key(names: dict[str, str], start: str, stored: Path) -> None:
    assert refusal(stored, data=columns(stored, **names)).startswith(start)


def test_labels_may_be_texts(stored: Path) -> None:
    assert build(stored, data=columns(stored, label="site")).data_report().label_names == tuple(
        f"site{i}" for i in range(NUM_CLIENTS)
    )


def test_classes_may_be_named(folder: Path) -> None:
    for split in ("train", "test"):
        write(folder, split, rows(NUM_TRAIN), named=False)
    names = ["low", "middle", "high", "none of these"]
    assert build(folder, label_names=names).data_report().label_names == tuple(names)


@pytest.mark.parametrize(
    ("split", "labels", "start"),
    [
        ("train", [0, -1, 2], "task.data.columns.label: 'label' has 1 in row 1 of split 'test'"),
        ("test", [-1, -1, -1], "task.data.columns.label: 'label' has -1 in row 0 of split 'test'"),
        ("test", [0, 1, 3], "task.data.columns.label: 'label' has 3 in row 2 of split 'test'; labels must be one of 0"),
        ("train", [0, 0, 0], "task.data.columns.label: 'label' has one class only"),
    ],
    ids=str,
)
def test_labels_that_are_no_classes_are_refused(split: str, labels: list[Any], start: str, folder: Path) -> None:
    for name in ("train", "test"):
        data = rows(24)
        write(folder, name, data | ({"label": labels * 8} if name == split else {}), named=False)
    assert refusal(folder).startswith(start)


@pytest.mark.parametrize(
    ("weights", "expected"), [("balanced", [2 / 3, 1, 2]), ([1, 2, 0.5], [1, 2, 0.5]), (None, None)]
)
def test_class_weights_are_part_of_the_outputs(weights: Any, expected: list[float] | None, folder: Path) -> None:
    write(folder, "train", rows(NUM_TRAIN) | {"label": [0, 0, 0, 1, 1, 2] * (NUM_TRAIN // 6)})
    task = build(folder, class_weights=weights)
    model = task.build_models(0).teacher
    found = task.forward(model, task.example_batch(), hidden_states=False, attentions=False).class_weights
    assert (found if found is None else found.tolist()) == (expected and pytest.approx(expected))


def test_some_clients_may_have_another_teacher(stored: Path) -> None:
    task = build(stored, other_teachers=[{"clients": [1, 3], "model": {**SMALL, "hidden_size": 9}}])
    assert [task.client_data(client).teacher for client in range(NUM_CLIENTS)] == [0, 1, 0, 1]
    assert state(task.build_models(0).other_teachers[0])["hidden.weight"].shape[0] == 9


def test_a_natural_client_with_a_single_row_must_have_test_rows(folder: Path) -> None:
    data = rows(NUM_TRAIN)
    data["site"][0] = "alone"
    write(folder, "train", data)
    start = "task.partition: client 0 has one training example and none in the test split"
    assert refusal(folder, 5, partition=NATURAL).startswith(start)


@pytest.mark.parametrize("algorithm", ["{name: fedavg}", "{name: fedkd, hidden: false, attention: false}"])
def test_an_experiment_on_images_runs_to_its_end(algorithm: str, stored: Path, tmp_path: Path) -> None:
    text = f"""
name: images
num_clients: {NUM_CLIENTS}
num_rounds: 2
task: {options(stored, partition=NATURAL).model_dump_json()}
algorithm: {algorithm}
"""
    run_dir = run_in_process(parse(text), client_app.app, tmp_path / "run")
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["status"] == "completed"
    assert load_cnn(run_dir / "student").config["num_classes"] == NUM_CLASSES


def test_mnist_as_divided_among_twenty_clients_is_learned() -> None:
    if not MNIST.exists():
        pytest.skip("MNIST is not beside this repository")
    task = build(
        MNIST,
        20,
        partition={"name": "natural", "column": "pfllib_client"},
        max_examples_per_class=60,
        teacher={"num_channels": [8]},
        student={"num_channels": [8]},
    )
    data = everything(task.client_data(0).train)
    assert max(Counter(data["labels"].tolist()).values()) == 60
    # A wrong pairing of images and labels would classify at chance.
    train = [everything(task.client_data(client).train) for client in range(20)]
    pixels = torch.cat([batch["pixel_values"].flatten(1) for batch in train])
    labels = torch.cat([batch["labels"] for batch in train])
    means = torch.stack([pixels[labels == label].mean(dim=0) for label in range(10)])
    server = everything(task.test_data())
    guesses = torch.cdist(server["pixel_values"].flatten(1), means).argmin(dim=1)
    assert (guesses == server["labels"]).float().mean() > 0.75
