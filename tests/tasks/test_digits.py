from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from transformers import ViTForImageClassification

from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.tasks.digits import Digits, DigitsOptions, VitOptions
from fedkd_flwr.tasks.partition import DirichletPartition, IidPartition, PathologicalPartition
from tests.tasks.conftest import everything, images, state

NUM_IMAGES, NUM_TEST = 1797, 360
TEACHER = VitOptions(num_layers=3, hidden_size=16, num_heads=2, intermediate_size=16)
STUDENT = VitOptions(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16)
NARROW = VitOptions(num_layers=1, hidden_size=8, num_heads=4, intermediate_size=8)
NUM_CLIENTS = 5
NUM_TOKENS = 17  # 16 patches of 2x2 pixels and the class token


def digits(seed: int = 0, num_clients: int = NUM_CLIENTS, student: VitOptions = STUDENT, **options: object) -> Digits:
    chosen = {"teacher": TEACHER, "student": student, **options}
    return DigitsOptions.model_validate(chosen).build(num_clients, seed)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return state(a).keys() == state(b).keys() and all(torch.equal(state(a)[name], state(b)[name]) for name in state(a))


@pytest.mark.parametrize("partition", [IidPartition(), DirichletPartition(alpha=0.5)], ids=str)
def test_each_image_belongs_to_one_client_or_to_the_server(partition: object) -> None:
    task = digits(partition=partition)
    clients = [task.client_data(client) for client in range(NUM_CLIENTS)]
    parts = [examples for data in clients for examples in (data.train, data.test)] + [task.test_data()]
    assert len(task.test_data()) == NUM_TEST
    assert sum(map(len, parts)) == NUM_IMAGES
    # The bundled images all differ, so a shared or missing row would show in the union.
    assert len(set().union(*map(images, parts))) == NUM_IMAGES


def test_every_client_learns_and_scores_on_images_of_its_own() -> None:
    task = digits(partition=DirichletPartition(alpha=0.1, min_examples=2), num_clients=8)
    for client in range(8):
        data = task.client_data(client)
        assert len(data.train) > 0
        assert len(data.test) > 0
        assert not images(data.train) & images(data.test)


def test_two_images_are_one_to_learn_from_and_one_to_score_on() -> None:
    task = digits(partition=IidPartition(), num_clients=718, client_test_fraction=0.99)
    sizes = {(len(data.train), len(data.test)) for data in map(task.client_data, range(718))}
    assert sizes == {(1, 1), (1, 2)}


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_client_keeps_the_asked_share_for_its_score(fraction: float) -> None:
    data = digits(partition=IidPartition(), client_test_fraction=fraction).client_data(0)
    assert len(data.test) == round(fraction * (len(data.train) + len(data.test)))


def test_the_seed_decides_the_clients_images_but_not_the_servers() -> None:
    first, again, other = digits(seed=0), digits(seed=0), digits(seed=1)
    for part in ("train", "test"):
        mine, same, others = (images(getattr(task.client_data(2), part)) for task in (first, again, other))
        assert mine == same != others
    assert images(first.test_data()) == images(other.test_data())


def test_the_servers_images_have_all_classes_in_equal_measure() -> None:
    counts = np.bincount(everything(digits().test_data())["labels"].numpy(), minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_images_keep_their_labels() -> None:
    # A wrong pairing would still train, to nothing: the mean image of each class must classify far above chance.
    batch = everything(digits(partition=IidPartition(), num_clients=1).client_data(0).train)
    pixels, labels = batch["pixel_values"].flatten(1), batch["labels"]
    means = torch.stack([pixels[labels == label].mean(dim=0) for label in range(10)])
    server = everything(digits().test_data())
    guesses = torch.cdist(server["pixel_values"].flatten(1), means).argmin(dim=1)
    assert (guesses == server["labels"]).float().mean() > 0.8


def test_a_partition_by_column_is_refused_because_there_are_no_columns() -> None:
    with pytest.raises(ValidationError, match="expected tags: 'iid', 'dirichlet'"):
        DigitsOptions.model_validate({"partition": {"name": "natural", "column": "writer"}})


@pytest.mark.parametrize("partition_id", [-1, NUM_CLIENTS])
def test_a_client_that_does_not_exist_is_an_error_with_the_range(partition_id: int) -> None:
    with pytest.raises(ValueError) as caught:
        digits().client_data(partition_id)
    assert str(caught.value) == f"partition-id must be in [0, {NUM_CLIENTS - 1}], got {partition_id}"


def test_the_same_seed_builds_the_same_models_and_another_builds_others() -> None:
    task = digits()
    first, again, other = task.build_models(7), digits(seed=9).build_models(7), task.build_models(8)
    assert equal(first.teacher, again.teacher)
    assert equal(first.student, again.student)
    assert not equal(first.teacher, other.teacher)
    assert not equal(first.student, other.student)


def test_building_models_neither_reads_nor_moves_the_global_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digits().build_models(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first.teacher, digits().build_models(7).teacher)


def test_the_student_is_the_teachers_first_layers_embeddings_and_head() -> None:
    models = digits().build_models(0)
    teacher, student = state(models.teacher), state(models.student)
    assert student.keys() < teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)


def test_teacher_and_student_share_no_storage() -> None:
    models = digits().build_models(0)
    addresses = [{p.data_ptr() for p in model.parameters()} for model in (models.teacher, models.student)]
    assert not addresses[0] & addresses[1]


def test_a_student_of_another_width_is_a_model_of_its_own() -> None:
    models = digits(student=NARROW).build_models(0)
    out = digits().forward(models.student, digits().example_batch(), hidden_states=True, attentions=True)
    assert out.hidden_states is not None
    assert {tuple(hidden.shape) for hidden in out.hidden_states} == {(1, NUM_TOKENS, 8)}
    assert all(value.isfinite().all() for value in state(models.student).values())


def test_a_forward_pass_returns_every_hidden_state_and_every_attention_map() -> None:
    task = digits()
    batch = next(iter(task.test_data().batches(4)))
    out = task.forward(task.build_models(0).teacher, batch, hidden_states=True, attentions=True)
    assert out.logits.shape == (4, 10)
    assert torch.equal(out.labels, batch["labels"])
    assert out.hidden_states is not None
    assert out.attentions is not None
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(4, NUM_TOKENS, 16)] * (TEACHER.num_layers + 1)
    # transformers' default attention returns an empty tuple instead, and the term would silently be 0.
    assert [tuple(maps.shape) for maps in out.attentions] == [(4, 2, NUM_TOKENS, NUM_TOKENS)] * TEACHER.num_layers
    for maps in out.attentions:
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(4, 2, NUM_TOKENS))


def test_a_forward_pass_returns_none_of_what_was_not_asked_for() -> None:
    task = digits()
    out = task.forward(task.build_models(0).student, task.example_batch(), hidden_states=False, attentions=False)
    assert (out.hidden_states, out.attentions, out.token_mask) == (None, None, None)


def test_the_example_batch_is_shaped_like_real_data() -> None:
    task = digits()
    example, real = task.example_batch(), next(iter(task.test_data().batches(1)))
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in real.items()
    }


def test_training_mode_does_not_change_the_output() -> None:
    # No dropout: what a client learns depends on nothing but its seed for the order of images.
    task = digits()
    model, batch = task.build_models(0).teacher, next(iter(task.test_data().batches(8)))
    logits = [
        task.forward(model.train(mode), batch, hidden_states=False, attentions=False).logits for mode in (True, False)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_is_sklearns_accuracy_and_log_loss(seed: int) -> None:
    task = digits()
    model = task.build_models(seed).teacher
    # Sharper than version 0, whose probabilities are all about one tenth. 360 images also make two unequal batches.
    with torch.no_grad():
        model.classifier.weight.mul_(3.0)
    batch = everything(task.test_data())
    with torch.inference_mode():
        logits = task.forward(model.eval(), batch, hidden_states=False, attentions=False).logits
    probabilities = logits.double().softmax(dim=-1).numpy()
    score = score_of(task, model, task.test_data())
    assert list(score) == ["accuracy", "macro_f1", "loss"]
    assert score["accuracy"] == accuracy_score(batch["labels"], logits.argmax(dim=-1))
    assert score["loss"] == pytest.approx(log_loss(batch["labels"], probabilities, labels=range(10)), rel=1e-5)


def test_a_model_that_always_answers_one_class_scores_that_classs_share() -> None:
    task = digits()
    model = task.build_models(0).student
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(10)[3] * 100)
    labels = everything(task.test_data())["labels"]
    share = float((labels == 3).double().mean())
    score = score_of(task, model, task.test_data())
    assert score["accuracy"] == pytest.approx(share)
    assert score["loss"] == pytest.approx(100 * (1 - share), rel=1e-5)


def test_an_exported_model_loads_with_from_pretrained_and_gives_the_same_logits(tmp_path: Path) -> None:
    task = digits()
    model = task.build_models(0).teacher.eval()
    task.export(model, tmp_path / "model")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    pixels = next(iter(task.test_data().batches(16)))["pixel_values"]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-5)
    assert loaded.config.id2label == {label: str(label) for label in range(10)}


def test_the_report_counts_the_labels_that_clients_learn_from_and_none_that_they_score_on() -> None:
    task = digits(partition=DirichletPartition(alpha=0.1, min_examples=2), num_clients=8)
    report = task.data_report()
    assert report.label_names == tuple("0123456789")
    for client, counts in enumerate(report.label_counts):
        data = task.client_data(client)
        labels = [int(x) for b in data.train.batches(64) for x in b["labels"]]
        assert len(labels) < len(data.train) + len(data.test)
        assert [labels.count(label) for label in range(10)] == list(counts)


def test_the_report_notes_clients_of_one_class() -> None:
    report = digits(partition=PathologicalPartition(classes_per_client=1), num_clients=10).data_report()
    assert report.notes == (
        "clients 0, 1, 2, 3, 4 and 5 more have training examples of one class only (10 of 10 clients)",
    )
    assert digits(partition=IidPartition()).data_report().notes == ()
