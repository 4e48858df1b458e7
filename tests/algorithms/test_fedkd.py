from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.algorithms.local_only import LocalOnlyOptions
from fedkd_flwr.algorithms.loop import OptimizerOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import exchanged_spec, read_arrays, write_arrays
from fedkd_flwr.core.predictions import ensemble
from fedkd_flwr.core.protocols import ClientData, Task, score_of
from tests.algorithms.conftest import (
    FIRST,
    LOCAL,
    ONE_STEP,
    SECOND,
    SEED,
    SGD,
    Without,
    copied,
    digits,
    norm,
    same,
    under,
    vit,
)
from tests.algorithms.rounds import TERMS, fedkd, student_alone, teacher_alone, teacher_of, train, upload


@pytest.mark.parametrize("optimizer", [OptimizerOptions(), OptimizerOptions(max_grad_norm=0.1), SGD], ids=str)
def test_without_distillation_the_student_is_that_of_fedavg_bit_for_bit(
    task: Task, data: ClientData, optimizer: OptimizerOptions
) -> None:
    alone = student_alone(task, data, optimizer=optimizer)
    assert same(upload(fedkd(task, student_optimizer=optimizer), data), alone)


def test_without_distillation_the_teacher_is_one_that_trains_alone_bit_for_bit(task: Task, data: ClientData) -> None:
    assert same(teacher_of(train(fedkd(task), data)), teacher_alone(task, data))


def test_without_distillation_the_student_ignores_what_the_teacher_knows(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task)
    taught = train(algorithm, data).private
    again = train(algorithm, data, taught).upload
    assert again is not None
    assert same(again, upload(algorithm, data))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_changes_what_the_student_learns(task: Task, data: ClientData, term: str) -> None:
    assert not same(upload(fedkd(task, term), data), student_alone(task, data))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_changes_what_the_teacher_learns(task: Task, data: ClientData, term: str) -> None:
    assert not same(teacher_of(train(fedkd(task, term), data)), teacher_alone(task, data))


@pytest.mark.parametrize("term", ["mutual", "attention"])
def test_each_term_adds_to_the_hidden_term(task: Task, data: ClientData, term: str) -> None:
    assert not same(upload(fedkd(task, "hidden", term), data), upload(fedkd(task, "hidden"), data))


def test_the_temperature_and_the_adaptive_weight_matter(task: Task, data: ClientData) -> None:
    uploads = [
        upload(fedkd(task, *TERMS, **options), data)
        for options in ({}, {"temperature": 4.0}, {"adaptive": False}, {"divisor_floor": 100.0})
    ]
    assert all(not same(uploads[0], other) for other in uploads[1:])


def test_a_huge_divisor_leaves_next_to_nothing_of_the_distillation(task: Task, data: ClientData) -> None:
    def away(floor: float) -> float:
        options = {"divisor_floor": floor, "student_optimizer": SGD}
        guided, alone = upload(fedkd(task, *TERMS, **options), data), student_alone(task, data, optimizer=SGD)
        return norm({name: guided[name] - alone[name] for name in alone})

    # Losses are above 2 nats in the first round, so a floor of 0.1 is no divisor of its own.
    assert away(1e6) < 1e-3 * away(0.1)


def test_the_least_divisor_of_the_round_is_reported(task: Task, data: ClientData) -> None:
    assert train(fedkd(task, *TERMS, divisor_floor=100.0), data).metrics["min_divisor"] == 100.0
    metrics = train(fedkd(task, *TERMS, local=ONE_STEP), data).metrics
    assert metrics.keys() == {"train_loss", "teacher_train_loss", "min_divisor"}
    assert metrics["min_divisor"] == pytest.approx(metrics["train_loss"] + metrics["teacher_train_loss"], rel=1e-6)
    several = train(fedkd(task, *TERMS), data).metrics
    assert several["min_divisor"] < several["train_loss"] + several["teacher_train_loss"]


def test_the_upload_has_the_students_tensors_and_none_of_the_teachers(task: Task, data: ClientData) -> None:
    sent = upload(fedkd(task, *TERMS), data)
    spec = exchanged_spec(task.build_models(SEED).student)
    assert {name: value.shape for name, value in sent.items()} == {t.name: t.shape for t in spec}
    assert all(value.dtype == np.float32 for value in sent.values())


def test_the_upload_is_the_students_move_and_every_tensor_that_learns_moves(task: Task, data: ClientData) -> None:
    sent = upload(fedkd(task, *TERMS), data)
    still = {name for name, value in sent.items() if not value.any()}
    assert still == set()


def test_the_teacher_moves_and_stays_with_the_client(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    before = read_arrays(task.build_models(SEED).teacher)
    trained = train(algorithm, data)
    assert same(under("teacher/", algorithm.client.initial_private(data)), before)
    after = teacher_of(trained)
    assert after.keys() == before.keys()
    assert all(not np.array_equal(after[name], before[name]) for name in before)
    assert algorithm.shared.initial().keys() == read_arrays(task.build_models(SEED).student).keys()


def test_the_arrays_that_were_handed_in_are_not_changed(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    shared, private = copied(algorithm.shared.initial()), train(algorithm, data).private
    shared_before, private_before = copied(shared), copied(private)
    algorithm.client.train(shared, private, data, SECOND)
    algorithm.client.evaluate(shared, private, data)
    assert same(shared, shared_before)
    assert same(private, private_before)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_arrays_can_be_trained_from(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    shared, private = copied(algorithm.shared.initial()), copied(algorithm.client.initial_private(data))
    for value in [*shared.values(), *private.values()]:
        value.flags.writeable = False
    sent = algorithm.client.train(shared, private, data, FIRST).upload
    assert sent is not None
    assert same(sent, upload(algorithm, data))


def test_version_0_is_the_same_on_every_machine_and_no_training_changes_it(task: Task, data: ClientData) -> None:
    algorithm, elsewhere = fedkd(task, *TERMS), fedkd(task, *TERMS)
    train(algorithm, data)
    assert same(algorithm.shared.initial(), elsewhere.shared.initial())
    assert same(algorithm.client.initial_private(data), elsewhere.client.initial_private(data))


def test_the_same_assignment_leads_to_the_same_bytes_whoever_trained_before(
    task: Task, data: ClientData, other_data: ClientData
) -> None:
    algorithm = fedkd(task, *TERMS)
    first = train(algorithm, data)
    # One process serves many clients, one after another, with the same modules.
    train(algorithm, other_data, assignment=SECOND)
    again = train(algorithm, data)
    assert first.upload is not None
    assert again.upload is not None
    assert same(first.upload, again.upload)
    assert same(first.private, again.private)
    assert first.metrics == again.metrics


def test_another_seed_leads_elsewhere(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    first, second = (train(algorithm, data, assignment=assignment).upload for assignment in (FIRST, SECOND))
    assert first is not None
    assert second is not None
    assert not same(first, second)


def test_the_student_starts_from_what_is_shared_now(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    version_0, private = algorithm.shared.initial(), algorithm.client.initial_private(data)
    version_1 = algorithm.shared.apply(version_0, upload(algorithm, data))
    from_0, from_1 = (algorithm.client.train(s, private, data, SECOND).upload for s in (version_0, version_1))
    assert from_0 is not None
    assert from_1 is not None
    assert not same(from_0, from_1)
    # The second is relative to what was sent: some steps' worth, not the sum of both rounds.
    assert norm(from_1) < 1.5 * norm(from_0)


@pytest.mark.parametrize("prefix", ["teacher_optimizer/", "projections_optimizer/"])
def test_moments_are_kept_with_the_client_and_used_in_its_next_round(
    narrow_student: Task, data: ClientData, prefix: str
) -> None:
    algorithm = fedkd(narrow_student, *TERMS)
    private = train(algorithm, data).private
    assert any(name.startswith(prefix) and name.endswith("/exp_avg_sq") for name in private)
    forgotten = {name: value for name, value in private.items() if not name.startswith(prefix)}
    kept = "teacher/" if prefix == "teacher_optimizer/" else "projections/"
    with_moments, without = (
        under(kept, train(algorithm, data, start, SECOND).private) for start in (private, forgotten)
    )
    assert not same(with_moments, without)


def test_the_steps_of_the_teachers_optimizer_are_counted_over_rounds(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    num_steps = -(-len(data.train) // LOCAL.batch_size)
    trained = train(algorithm, data)
    for rounds in (1, 2, 3):
        steps = {
            float(v) for n, v in trained.private.items() if n.startswith("teacher_optimizer/") and n.endswith("/step")
        }
        assert steps == {float(rounds * num_steps)}
        trained = train(algorithm, data, trained.private, SECOND)


def test_the_students_moments_are_forgotten(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    initial, private = algorithm.client.initial_private(data), train(algorithm, data).private
    added = {name.split("/")[0] for name in private.keys() - initial.keys()}
    assert added == {"teacher_optimizer", "projections_optimizer"}
    # A client with a round behind it, but the teacher and W_h of version 0, must teach its student the same.
    fresh = {**private, **initial, "num_rounds_trained": private["num_rounds_trained"]}
    fresh = {name: value for name, value in fresh.items() if "_optimizer/" not in name}
    again = train(algorithm, data, fresh).upload
    assert again is not None
    assert same(again, upload(algorithm, data))


def test_between_equal_widths_w_h_begins_as_the_identity(task: Task, data: ClientData) -> None:
    private = fedkd(task, *TERMS).client.initial_private(data)
    assert [value.tolist() for value in under("projections/", private).values()] == [np.eye(16).tolist()]


def test_between_other_widths_w_h_begins_orthogonal_and_the_same_for_all(
    narrow_student: Task, data: ClientData
) -> None:
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        drawn += under("projections/", fedkd(narrow_student, *TERMS).client.initial_private(data)).values()
    matrix, again = drawn
    assert matrix.shape == (16, 8)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-5)
    assert np.array_equal(matrix, again)


def test_w_h_learns(task: Task, narrow_student: Task, data: ClientData) -> None:
    for chosen in (task, narrow_student):
        algorithm = fedkd(chosen, *TERMS)
        (before,) = under("projections/", algorithm.client.initial_private(data)).values()
        (after,) = under("projections/", train(algorithm, data).private).values()
        assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    "student", [vit(1, hidden_size=8), vit(1, hidden_size=8, num_heads=4), vit(1, hidden_size=12, num_heads=3)], ids=str
)
def test_student_and_teacher_of_different_width_and_heads_train(student: object, data: ClientData) -> None:
    algorithm = fedkd(digits(student=student), *TERMS)  # type: ignore[arg-type]
    private: Arrays | None = None
    for assignment in (FIRST, SECOND):
        trained = train(algorithm, data, private, assignment)
        private = trained.private
        assert trained.upload is not None
        assert all(np.isfinite(value).all() and value.any() for value in trained.upload.values())
        assert all(np.isfinite(value).all() for value in private.values())


def test_a_teacher_of_another_width_does_not_follow_the_hidden_term_while_w_h_warms_up(
    narrow_student: Task, data: ClientData
) -> None:
    # One step, in which the student has not moved yet: all that reaches the teacher comes from its own loss.
    on = teacher_of(train(fedkd(narrow_student, *TERMS, local=ONE_STEP), data))
    off = teacher_of(train(fedkd(narrow_student, "mutual", "attention", local=ONE_STEP), data))
    assert same(on, off)


def test_a_teacher_that_hears_the_hidden_term_alone_trains_alone_while_w_h_warms_up(
    narrow_student: Task, data: ClientData
) -> None:
    algorithm = fedkd(narrow_student, "hidden")
    assert same(teacher_of(train(algorithm, data)), teacher_alone(narrow_student, data))


def test_the_student_and_w_h_follow_the_hidden_term_from_the_first_round(
    narrow_student: Task, data: ClientData
) -> None:
    assert not same(upload(fedkd(narrow_student, "hidden"), data), student_alone(narrow_student, data))


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_teacher_follows_the_hidden_term_after_the_warm_up_rounds(
    narrow_student: Task, data: ClientData, warmup: int
) -> None:
    algorithm = fedkd(narrow_student, "hidden", hidden_warmup_rounds=warmup)
    alone = LocalOnlyOptions(model="teacher", local=LOCAL).build(narrow_student, SEED)
    private, alone_private = algorithm.client.initial_private(data), alone.client.initial_private(data)
    followed = []
    for round_seed in range(3):
        assignment = Assignment(progress=0.0, seed=round_seed)
        private = train(algorithm, data, private, assignment).private
        alone_private = train(alone, data, alone_private, assignment).private
        followed.append(not same(under("teacher/", private), under("model/", alone_private)))
    assert followed == [server_round >= warmup for server_round in range(3)]


def test_between_equal_widths_there_is_no_warm_up(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, "hidden", hidden_warmup_rounds=5)
    assert not same(teacher_of(train(algorithm, data)), teacher_alone(task, data))


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([1, 2], "algorithm.layer_map must name 1 teacher layers in [1, 2], got [1, 2]"),
        ([], "algorithm.layer_map must name 1 teacher layers in [1, 2], got []"),
        ([3], "algorithm.layer_map must name 1 teacher layers in [1, 2], got [3]"),
        ([0], "algorithm.layer_map must name 1 teacher layers in [1, 2], got [0]"),
    ],
)
def test_a_layer_map_that_does_not_fit_is_refused_before_any_training(
    task: Task, layer_map: list[int], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        fedkd(task, *TERMS, layer_map=layer_map)
    assert str(caught.value) == message


def test_layers_that_do_not_divide_evenly_need_a_map_of_their_own() -> None:
    uneven = digits(teacher=vit(3), student=vit(2))
    with pytest.raises(ValueError) as caught:
        fedkd(uneven, *TERMS)
    assert str(caught.value).startswith("algorithm.layer_map: 3 teacher layers over 2 student layers")
    assert fedkd(uneven, *TERMS, layer_map=[1, 3]).exchanges == "updates"


@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_the_layer_map_decides_which_layers_guide(task: Task, data: ClientData, term: str) -> None:
    first, last, even = (upload(fedkd(task, term, layer_map=layer_map), data) for layer_map in ([1], [2], None))
    assert not same(first, last)
    assert same(even, last)


@pytest.mark.parametrize("attentions", [(), None])
def test_models_without_attention_maps_are_an_error_and_not_a_dropped_term(task: Task, attentions: object) -> None:
    with pytest.raises(ValueError) as caught:
        fedkd(Without(task, attentions=attentions), *TERMS)
    assert str(caught.value).startswith("algorithm.attention: these models return no attention maps; ")


@pytest.mark.parametrize("hidden_states", [(), None])
def test_models_without_hidden_states_are_an_error_and_not_a_dropped_term(task: Task, hidden_states: object) -> None:
    with pytest.raises(ValueError) as caught:
        fedkd(Without(task, hidden_states=hidden_states), *TERMS)
    assert str(caught.value).startswith("algorithm.hidden: these models return no hidden states; ")


def test_models_without_attention_maps_train_when_the_term_is_off(task: Task, data: ClientData) -> None:
    assert norm(upload(fedkd(Without(task, attentions=()), "mutual", "hidden"), data)) > 0


def test_evaluation_scores_the_student_as_shared_the_clients_teacher_and_both(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    trained = train(algorithm, data)
    models = task.build_models(SEED)
    expected: dict[str, Mapping[str, float]] = {"shared": score_of(task, models.student, data.test)}
    write_arrays(models.teacher, teacher_of(trained))
    expected["private"] = score_of(task, models.teacher, data.test)
    both = ensemble(task.predict(models.student, data.test), task.predict(models.teacher, data.test))
    expected["ensemble"] = task.score(both, data.test)
    assert len({tuple(scores.values()) for scores in expected.values()}) == 3
    assert algorithm.client.evaluate(algorithm.shared.initial(), trained.private, data) == expected
    assert (
        algorithm.client.evaluate(algorithm.shared.initial(), algorithm.client.initial_private(data), data) != expected
    )


def test_the_server_scores_the_student(task: Task, data: ClientData) -> None:
    algorithm = fedkd(task, *TERMS)
    train(algorithm, data)
    expected = score_of(task, task.build_models(SEED).student, task.test_data())
    assert algorithm.server.evaluate(algorithm.shared.initial(), task.test_data()) == expected
