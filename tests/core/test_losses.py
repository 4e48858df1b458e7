"""Losses against equations 1 to 7 of the paper, written a second time here in float64 numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedkd_flwr.core.losses import (
    NO_LABEL,
    DistillationTerms,
    Side,
    adaptive_divisor,
    attention_mse,
    cross_entropy,
    distillation,
    hidden_mse,
    kl_divergence,
    layer_map,
    masked_mse,
    own_loss,
    task_loss,
)
from fedkd_flwr.core.protocols import Outputs

Float64 = NDArray[np.float64]
CLASSES = [2, 3, 10]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).requires_grad_()


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# The oracle: loops over positions, so that no axis or mean can be shared with the source by accident.


def oracle_probabilities(logits: Float64) -> Float64:
    powers = np.exp(logits - logits.max())
    probabilities: Float64 = powers / powers.sum()
    return probabilities


def oracle_cross_entropy(logits: Float64, labels: NDArray[np.int64]) -> float:
    losses = [
        -np.log(oracle_probabilities(row)[label])
        for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.ravel(), strict=True)
        if label != NO_LABEL
    ]
    return float(np.mean(losses)) if losses else 0.0


def oracle_distillation(learner: Float64, guide: Float64, labels: NDArray[np.int64], tau: float = 1.0) -> float:
    classes = learner.shape[-1]
    rows = zip(learner.reshape(-1, classes), guide.reshape(-1, classes), labels.ravel(), strict=True)
    divergences = []
    for own, other, label in rows:
        if label == NO_LABEL:
            continue
        p, q = oracle_probabilities(own / tau), oracle_probabilities(other / tau)
        divergences.append(sum(q[j] * (np.log(q[j]) - np.log(p[j])) for j in range(classes)))
    return tau**2 * float(np.mean(divergences)) if divergences else 0.0


def oracle_hidden(learner: Sequence[Float64], guide: Sequence[Float64], real: NDArray[np.bool_]) -> float:
    layers = []
    for own, other in zip(learner, guide, strict=True):
        kept = [
            (own[b, t, w] - other[b, t, w]) ** 2 for b, t in np.argwhere(real).tolist() for w in range(own.shape[2])
        ]
        layers.append(np.mean(kept) if kept else 0.0)
    return float(np.mean(layers))


def oracle_attention(learner: Sequence[Float64], guide: Sequence[Float64], real: NDArray[np.bool_]) -> float:
    layers = []
    for one, two in zip(learner, guide, strict=True):
        own, other = one, two
        if one.shape[1] != two.shape[1]:
            own, other = one.mean(axis=1)[:, None], two.mean(axis=1)[:, None]
        batch, heads, tokens, _ = own.shape
        kept = [
            (own[b, h, i, j] - other[b, h, i, j]) ** 2
            for b in range(batch)
            for h in range(heads)
            for i in range(tokens)
            for j in range(tokens)
            if real[b, i] and real[b, j]
        ]
        layers.append(np.mean(kept) if kept else 0.0)
    return float(np.mean(layers))


def some_labels(*shape: int, classes: int, ignored: float = 0.3, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape)
    labels[rng.random(shape) < ignored] = NO_LABEL
    return torch.from_numpy(labels)


def some_mask(batch: int, tokens: int) -> Tensor:
    lengths = torch.arange(batch) % tokens + 1
    return torch.arange(tokens)[None] < lengths[:, None]


# Cross-entropy


@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy_is_the_mean_over_examples(classes: int) -> None:
    logits, labels = 3 * normal(7, classes), some_labels(7, classes=classes, ignored=0.0)
    expected = oracle_cross_entropy(logits.numpy(), labels.numpy())
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("classes", CLASSES)
def test_cross_entropy_of_token_labels_counts_labelled_positions_only(classes: int) -> None:
    logits, labels = 3 * normal(4, 6, classes), some_labels(4, 6, classes=classes)
    assert 0 < (labels == NO_LABEL).sum() < labels.numel()
    expected = oracle_cross_entropy(logits.numpy(), labels.numpy())
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_gives_ignored_positions_no_gradient() -> None:
    logits = leaf(3, 4, 5)
    labels = some_labels(3, 4, classes=5)
    cross_entropy(logits, labels).backward()
    ignored = labels == NO_LABEL
    assert torch.equal(grad_of(logits)[ignored], torch.zeros_like(logits[ignored]))
    assert (grad_of(logits)[~ignored] != 0).all()


@pytest.mark.parametrize("shape", [(7,), (4, 6)])
def test_with_class_weights_it_is_torchs_weighted_mean(shape: tuple[int, ...]) -> None:
    logits, labels = leaf(*shape, 3), some_labels(*shape, classes=3)
    weights = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    ours = cross_entropy(logits, labels, weights)
    torchs = nn.CrossEntropyLoss(weight=weights)(logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=0.0)
    (expected,) = torch.autograd.grad(torchs, logits)
    ours.backward()
    torch.testing.assert_close(grad_of(logits), expected, rtol=1e-12, atol=0.0)
    assert torch.equal(grad_of(logits)[labels == NO_LABEL], torch.zeros_like(logits[labels == NO_LABEL]))


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_equal_class_weights_are_none(weight: float) -> None:
    logits, labels = normal(4, 6, 3), some_labels(4, 6, classes=3)
    weighted = cross_entropy(logits, labels, torch.full((3,), weight))
    torch.testing.assert_close(weighted, cross_entropy(logits, labels), rtol=1e-12, atol=0.0)


def test_labels_that_all_weigh_nothing_give_exactly_zero() -> None:
    logits = leaf(4, 2)
    value = cross_entropy(logits, torch.tensor([0, 0, NO_LABEL, 0]), torch.tensor([0.0, 1.0]))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(grad_of(logits), torch.zeros(4, 2, dtype=torch.float64))


def test_the_task_loss_takes_the_class_weights_of_the_outputs() -> None:
    logits, labels, weights = normal(7, 3), some_labels(7, classes=3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(task_loss(Outputs(logits, labels)), cross_entropy(logits, labels))
    assert torch.equal(
        task_loss(Outputs(logits, labels, class_weights=weights)), cross_entropy(logits, labels, weights)
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_a_batch_without_any_label_gives_exactly_zero_and_no_gradient(loss: str) -> None:
    logits, labels = leaf(3, 4, 5), torch.full((3, 4), NO_LABEL)
    value = cross_entropy(logits, labels) if loss == "cross_entropy" else distillation(logits, normal(3, 4, 5), labels)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(grad_of(logits), torch.zeros(3, 4, 5, dtype=torch.float64))


# KL


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_distillation_is_the_batch_mean_kl_times_temperature_squared(classes: int, temperature: float) -> None:
    learner, guide = 2 * normal(5, classes), 2 * normal(5, classes, seed=1)
    labels = some_labels(5, classes=classes, ignored=0.0)
    expected = oracle_distillation(learner.numpy(), guide.numpy(), labels.numpy(), temperature)
    assert distillation(learner, guide, labels, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_distillation_over_tokens_counts_labelled_positions_only() -> None:
    learner, guide, labels = normal(4, 6, 5), normal(4, 6, 5, seed=1), some_labels(4, 6, classes=5)
    expected = oracle_distillation(learner.numpy(), guide.numpy(), labels.numpy())
    assert distillation(learner, guide, labels).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("classes", CLASSES)
def test_distillation_agrees_with_torch_and_is_not_divided_by_the_classes(classes: int) -> None:
    learner, guide = normal(6, classes), normal(6, classes, seed=1)
    log_p, log_q = learner.log_softmax(-1), guide.log_softmax(-1)
    batch_mean = functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    # What the published codes take: the default 'mean' also divides by the number of classes.
    element_mean = functional.kl_div(log_p, log_q, log_target=True, reduction="mean")
    value = distillation(learner, guide, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(value, batch_mean, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(value, classes * element_mean, rtol=1e-12, atol=0.0)


def test_kl_takes_the_second_argument_as_the_target() -> None:
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    value = kl_divergence(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_kl_keeps_all_axes_but_the_last() -> None:
    log_p, log_q = normal(2, 3, 4).log_softmax(-1), normal(2, 3, 4, seed=1).log_softmax(-1)
    assert kl_divergence(log_p, log_q).shape == (2, 3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), classes=st.integers(2, 12), scale=st.floats(0.01, 20.0))
def test_kl_is_positive_between_different_distributions_and_zero_to_itself(
    seed: int, classes: int, scale: float
) -> None:
    log_p = (scale * normal(classes, seed=seed)).log_softmax(-1)
    log_q = (scale * normal(classes, seed=seed + 1)).log_softmax(-1)
    assert kl_divergence(log_p, log_q).item() > 0
    assert kl_divergence(log_p, log_p).item() == 0.0


def test_kl_to_a_one_hot_target_is_the_cross_entropy_and_finite() -> None:
    logits = leaf(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    one_hot = functional.one_hot(labels, 3).to(torch.float64).log()
    assert torch.isneginf(one_hot).any()
    value = kl_divergence(logits.log_softmax(-1), one_hot).mean()
    value.backward()
    torch.testing.assert_close(value, cross_entropy(logits, labels), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grad_of(logits), (logits.softmax(-1).detach() - one_hot.exp()) / 4)


def test_distillation_is_finite_where_the_guide_rounds_a_probability_to_zero() -> None:
    learner = torch.zeros(1, 2, requires_grad=True)
    guide = torch.tensor([[500.0, -500.0]])
    value = distillation(learner, guide, torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(np.log(2), rel=1e-6)
    torch.testing.assert_close(grad_of(learner), torch.tensor([[-0.5, 0.5]]))


def test_distillation_is_finite_where_the_learner_rounds_a_probability_to_zero() -> None:
    learner = torch.tensor([[500.0, -500.0]], requires_grad=True)
    value = distillation(learner, torch.zeros(1, 2), torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(500 - np.log(2), rel=1e-5)
    assert torch.isfinite(grad_of(learner)).all()


def test_distillation_gives_ignored_positions_no_gradient() -> None:
    learner, labels = leaf(3, 4, 5), some_labels(3, 4, classes=5)
    distillation(learner, normal(3, 4, 5, seed=1), labels).backward()
    ignored = labels == NO_LABEL
    assert torch.equal(grad_of(learner)[ignored], torch.zeros_like(learner[ignored]))
    assert (grad_of(learner)[~ignored] != 0).all()


def test_distillation_leaves_the_guide_without_gradient() -> None:
    learner, guide = leaf(3, 4), leaf(3, 4, seed=1)
    distillation(learner, guide, torch.zeros(3, dtype=torch.int64)).backward()
    assert guide.grad is None
    assert (grad_of(learner) != 0).all()


def test_gradient_at_a_high_temperature_tends_to_the_difference_of_logits() -> None:
    # Hinton et al. 2015, section 2.1: for logits of zero mean, tau^2 dKL/dz -> (z - v) / classes.
    learner, guide = normal(2, 5), normal(2, 5, seed=1)
    learner = (learner - learner.mean(-1, keepdim=True)).requires_grad_()
    guide = guide - guide.mean(-1, keepdim=True)
    distillation(learner, guide, torch.tensor([0, 1]), temperature=1e4).backward()
    expected = (learner.detach() - guide) / 5 / 2
    torch.testing.assert_close(grad_of(learner), expected, rtol=1e-3, atol=1e-5)


# Hidden states and attention maps


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_mse_is_the_mean_over_layers_real_tokens_and_width(masked: bool) -> None:
    learner = [normal(3, 4, 5, seed=layer) for layer in range(2)]
    guide = [normal(3, 4, 5, seed=layer + 10) for layer in range(2)]
    mask = some_mask(3, 4) if masked else None
    real = np.ones((3, 4), dtype=bool) if mask is None else mask.numpy()
    expected = oracle_hidden([a.numpy() for a in learner], [b.numpy() for b in guide], real)
    assert hidden_mse(learner, guide, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guide_heads", [2, 6], ids=["same-heads", "more-heads"])
def test_attention_mse_is_the_mean_over_layers_and_pairs_of_real_tokens(masked: bool, guide_heads: int) -> None:
    learner = [normal(3, 2, 4, 4, seed=layer) for layer in range(2)]
    guide = [normal(3, guide_heads, 4, 4, seed=layer + 10) for layer in range(2)]
    mask = some_mask(3, 4) if masked else None
    real = np.ones((3, 4), dtype=bool) if mask is None else mask.numpy()
    expected = oracle_attention([a.numpy() for a in learner], [b.numpy() for b in guide], real)
    assert attention_mse(learner, guide, mask).item() == pytest.approx(expected, rel=1e-12)


def test_attention_maps_with_equal_means_over_different_heads_do_not_differ() -> None:
    one = normal(2, 1, 3, 3)
    pair = torch.cat([one + 1, one - 1], dim=1)
    assert attention_mse([one], [pair]).item() == pytest.approx(0.0, abs=1e-30)


def test_hidden_mse_gives_masked_tokens_no_gradient() -> None:
    learner, mask = leaf(3, 4, 5), some_mask(3, 4)
    hidden_mse([learner], [normal(3, 4, 5, seed=1)], mask).backward()
    assert torch.equal(grad_of(learner)[~mask], torch.zeros_like(learner[~mask]))
    assert (grad_of(learner)[mask] != 0).all()


@pytest.mark.parametrize("guide_heads", [2, 3], ids=["same-heads", "more-heads"])
def test_attention_mse_gives_pairs_with_a_masked_query_or_key_no_gradient(guide_heads: int) -> None:
    learner, mask = leaf(3, 2, 4, 4), some_mask(3, 4)
    attention_mse([learner], [normal(3, guide_heads, 4, 4, seed=1)], mask).backward()
    both = torch.zeros(3, 2, 4, 4, dtype=torch.bool)
    for batch, query, key in np.ndindex(3, 4, 4):
        both[batch, :, query, key] = bool(mask[batch, query]) and bool(mask[batch, key])
    assert torch.equal(grad_of(learner)[~both], torch.zeros_like(learner[~both]))
    assert (grad_of(learner)[both] != 0).all()


def test_what_masked_tokens_hold_does_not_change_the_features_losses() -> None:
    mask = some_mask(3, 4)
    hidden, guide = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    noisy = torch.where(mask[..., None], hidden, torch.full_like(hidden, 1e6))
    assert torch.equal(hidden_mse([noisy], [guide], mask), hidden_mse([hidden], [guide], mask))
    assert not torch.equal(hidden_mse([noisy], [guide]), hidden_mse([hidden], [guide]))


def test_integer_masks_count_like_boolean_ones() -> None:
    mask = some_mask(3, 4)
    hidden, attention = (
        ([normal(3, 4, 5)], [normal(3, 4, 5, seed=1)]),
        ([normal(3, 2, 4, 4)], [normal(3, 2, 4, 4, seed=1)]),
    )
    assert torch.equal(hidden_mse(*hidden, mask.long()), hidden_mse(*hidden, mask))
    assert torch.equal(attention_mse(*attention, mask.long()), attention_mse(*attention, mask))


def test_features_of_masked_tokens_only_give_exactly_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    learner = leaf(2, 3, 4)
    value = hidden_mse([learner], [normal(2, 3, 4, seed=1)], nothing)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(grad_of(learner), torch.zeros(2, 3, 4, dtype=torch.float64))
    assert attention_mse([normal(2, 2, 3, 3)], [normal(2, 2, 3, 3, seed=1)], nothing).item() == 0.0


def test_features_leave_the_guide_without_gradient() -> None:
    learner, guide = leaf(2, 3, 4), leaf(2, 3, 4, seed=1)
    hidden_mse([learner], [guide]).backward()
    assert guide.grad is None
    torch.testing.assert_close(grad_of(learner), 2 * (learner - guide).detach() / learner.numel())
    maps, guide_maps = leaf(2, 2, 3, 3), leaf(2, 4, 3, 3, seed=1)
    attention_mse([maps], [guide_maps]).backward()
    assert guide_maps.grad is None
    assert (grad_of(maps) != 0).all()


def test_features_of_different_numbers_of_layers_are_refused() -> None:
    with pytest.raises(ValueError):
        hidden_mse([normal(1, 2, 3)], [normal(1, 2, 3), normal(1, 2, 3)])
    with pytest.raises(ValueError):
        attention_mse([normal(1, 2, 3, 3)], [normal(1, 2, 3, 3), normal(1, 2, 3, 3)])


def test_masked_mse_without_a_mask_is_the_mean_over_all_elements() -> None:
    value = masked_mse(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 3.0, 0.0]))
    assert value.item() == 5.0


def test_masked_mse_is_the_mean_over_kept_elements() -> None:
    mask = torch.tensor([True, True, False, False])
    value = masked_mse(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 3.0, 0.0]), mask)
    assert value.item() == 2.0


# Layer map


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, (3, 6, 9, 12)),
        (2, 12, (6, 12)),
        (2, 6, (3, 6)),
        (3, 3, (1, 2, 3)),
        (1, 5, (5,)),
    ],
)
def test_layer_map_spreads_the_student_over_the_teacher(student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert layer_map(student, teacher) == expected


@pytest.mark.parametrize(("student", "teacher"), [(5, 12), (12, 4), (4, 6), (0, 12)])
def test_layer_map_refuses_a_ratio_that_is_not_whole(student: int, teacher: int) -> None:
    with pytest.raises(ValueError, match=f"{teacher} teacher layers over {student} student layers.*give layer_map"):
        layer_map(student, teacher)


# Divisor


def test_divisor_is_the_sum_of_both_task_losses() -> None:
    assert adaptive_divisor(torch.tensor(1.25), torch.tensor(0.5), floor=0.1).item() == 1.75


def test_divisor_is_never_below_its_floor() -> None:
    assert adaptive_divisor(torch.tensor(0.02), torch.tensor(0.03), floor=0.125).item() == 0.125
    assert adaptive_divisor(torch.tensor(0.0), torch.tensor(0.0), floor=0.125).item() == 0.125


def test_divisor_is_a_constant() -> None:
    teacher, student = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    assert not adaptive_divisor(teacher, student, floor=0.1).requires_grad


# A pair of models that offers everything


@dataclass
class Pair:
    """Leaves of both models and the sides they offer; W_h maps width 3 to width 5."""

    teacher_leaves: list[Tensor]
    student_leaves: list[Tensor]
    projection: nn.Linear
    teacher: Side
    student: Side
    labels: Tensor
    mask: Tensor


def make_pair(classes: int = 4, seed: int = 0) -> Pair:
    batch, tokens = 3, 4
    labels, mask = some_labels(batch, tokens, classes=classes, seed=seed), some_mask(batch, tokens)
    teacher_logits, student_logits = (
        leaf(batch, tokens, classes, seed=seed),
        leaf(batch, tokens, classes, seed=seed + 1),
    )
    teacher_hidden, student_hidden = leaf(batch, tokens, 5, seed=seed + 2), leaf(batch, tokens, 3, seed=seed + 3)
    teacher_maps, student_maps = (
        leaf(batch, 6, tokens, tokens, seed=seed + 4),
        leaf(batch, 2, tokens, tokens, seed=seed + 5),
    )
    torch.manual_seed(seed)
    projection = nn.Linear(3, 5, bias=False, dtype=torch.float64)
    return Pair(
        teacher_leaves=[teacher_logits, teacher_hidden, teacher_maps],
        student_leaves=[student_logits, student_hidden, student_maps],
        projection=projection,
        teacher=Side(teacher_logits, cross_entropy(teacher_logits, labels), [teacher_hidden], [teacher_maps]),
        student=Side(
            student_logits, cross_entropy(student_logits, labels), [projection(student_hidden)], [student_maps]
        ),
        labels=labels,
        mask=mask,
    )


def own_losses(pair: Pair, terms: DistillationTerms) -> tuple[Tensor, Tensor]:
    divisor = adaptive_divisor(pair.teacher.task, pair.student.task, terms.divisor_floor)
    student = own_loss(pair.student, pair.teacher, pair.labels, divisor, terms, pair.mask)
    teacher = own_loss(pair.teacher, pair.student, pair.labels, divisor, terms, pair.mask)
    return student, teacher


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_own_loss_is_equations_6_and_7(classes: int, temperature: float) -> None:
    pair = make_pair(classes)
    student, teacher = own_losses(pair, DistillationTerms(temperature=temperature, divisor_floor=0.1))

    labels, real = pair.labels.numpy(), pair.mask.numpy()
    (t_logits, t_hidden, t_maps), (s_logits, s_hidden, s_maps) = (
        [value.detach().numpy() for value in leaves] for leaves in (pair.teacher_leaves, pair.student_leaves)
    )
    projected = s_hidden @ pair.projection.weight.detach().numpy().T
    t_task, s_task = oracle_cross_entropy(t_logits, labels), oracle_cross_entropy(s_logits, labels)
    features = oracle_hidden([t_hidden], [projected], real) + oracle_attention([t_maps], [s_maps], real)
    s_guidance = oracle_distillation(s_logits, t_logits, labels, temperature) + features
    t_guidance = oracle_distillation(t_logits, s_logits, labels, temperature) + features
    assert t_task + s_task > 0.1
    assert student.item() == pytest.approx(s_task + s_guidance / (t_task + s_task), rel=1e-10)
    assert teacher.item() == pytest.approx(t_task + t_guidance / (t_task + s_task), rel=1e-10)


def test_student_loss_reaches_student_and_projection_and_leaves_the_teacher_without_gradient() -> None:
    pair = make_pair()
    student_loss, _ = own_losses(pair, DistillationTerms())
    student_loss.backward()
    assert [value.grad for value in pair.teacher_leaves] == [None, None, None]
    assert all(grad_of(value).any() for value in pair.student_leaves)
    assert grad_of(pair.projection.weight).any()


def test_teacher_loss_reaches_the_teacher_and_leaves_student_and_projection_without_gradient() -> None:
    pair = make_pair()
    _, teacher_loss = own_losses(pair, DistillationTerms())
    teacher_loss.backward()
    assert [value.grad for value in pair.student_leaves] == [None, None, None]
    assert pair.projection.weight.grad is None
    assert all(grad_of(value).any() for value in pair.teacher_leaves)


def test_one_backward_of_the_sum_gives_each_model_the_gradient_of_its_own_loss() -> None:
    apart, together = make_pair(), make_pair()
    own_losses(apart, DistillationTerms())[0].backward()
    own_losses(apart, DistillationTerms())[1].backward()
    sum(own_losses(together, DistillationTerms())).backward()  # type: ignore[union-attr]
    for one, two in zip(
        apart.student_leaves + apart.teacher_leaves, together.student_leaves + together.teacher_leaves, strict=True
    ):
        torch.testing.assert_close(grad_of(one), grad_of(two), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad_of(apart.projection.weight), grad_of(together.projection.weight))


def test_gradient_is_that_of_a_constant_divisor() -> None:
    adaptive, constant, differentiated = make_pair(), make_pair(), make_pair()
    own_losses(adaptive, DistillationTerms())[0].backward()

    value = adaptive.teacher.task.item() + adaptive.student.task.item()
    args = (constant.student, constant.teacher, constant.labels)
    own_loss(*args, torch.tensor(value, dtype=torch.float64), DistillationTerms(), constant.mask).backward()

    live = differentiated.teacher.task + differentiated.student.task
    args = (differentiated.student, differentiated.teacher, differentiated.labels)
    own_loss(*args, live, DistillationTerms(), differentiated.mask).backward()

    logits = [pair.student_leaves[0] for pair in (adaptive, constant, differentiated)]
    torch.testing.assert_close(grad_of(logits[0]), grad_of(logits[1]), rtol=1e-12, atol=1e-15)
    assert not torch.allclose(grad_of(logits[0]), grad_of(logits[2]), rtol=1e-3)


def test_losses_and_gradients_are_finite_when_both_task_losses_are_zero() -> None:
    pair = make_pair()
    nothing = torch.full_like(pair.labels, NO_LABEL)
    zero = cross_entropy(pair.student.logits, nothing)
    student = Side(pair.student.logits, zero, pair.student.hidden, pair.student.attentions)
    teacher = Side(
        pair.teacher.logits, cross_entropy(pair.teacher.logits, nothing), pair.teacher.hidden, pair.teacher.attentions
    )
    divisor = adaptive_divisor(teacher.task, student.task, floor=0.1)
    loss = own_loss(student, teacher, nothing, divisor, DistillationTerms(), pair.mask)
    loss.backward()
    assert zero.item() == 0.0
    features = hidden_mse(student.hidden or [], teacher.hidden or [], pair.mask) + attention_mse(
        student.attentions or [], teacher.attentions or [], pair.mask
    )
    assert loss.item() == pytest.approx(features.item() / 0.1, rel=1e-12)
    assert all(torch.isfinite(grad_of(value)).all() for value in pair.student_leaves)


def test_a_batch_without_labels_gives_exactly_no_loss_when_only_logits_guide() -> None:
    logits, nothing = leaf(2, 3, 4), torch.full((2, 3), NO_LABEL)
    side, guide = Side(logits, cross_entropy(logits, nothing)), Side(normal(2, 3, 4, seed=1), torch.tensor(0.0))
    loss = own_loss(side, guide, nothing, adaptive_divisor(guide.task, side.task, 0.1), DistillationTerms())
    loss.backward()
    assert loss.item() == 0.0
    assert not grad_of(logits).any()


def test_own_loss_with_every_term_off_is_the_task_loss() -> None:
    pair = make_pair()
    terms = DistillationTerms(mutual=False, hidden=False, attention=False)
    side, guide = Side(pair.student.logits, pair.student.task), Side(pair.teacher.logits, pair.teacher.task)
    assert torch.equal(own_loss(side, guide, pair.labels, torch.tensor(0.5), terms), pair.student.task)


def test_a_term_that_one_side_does_not_offer_is_left_out() -> None:
    pair = make_pair()
    bare = Side(pair.teacher.logits, pair.teacher.task)
    divisor = torch.tensor(2.0, dtype=torch.float64)
    value = own_loss(pair.student, bare, pair.labels, divisor, DistillationTerms(), pair.mask)
    expected = pair.student.task + distillation(pair.student.logits, bare.logits, pair.labels) / 2
    torch.testing.assert_close(value, expected)


def test_nan_in_padding_reaches_neither_loss_nor_gradient() -> None:
    learner = torch.tensor([[[1.0], [float("nan")]]], requires_grad=True)
    guide = torch.tensor([[[3.0], [float("nan")]]])
    loss = hidden_mse([learner], [guide], torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == 4.0
    assert learner.grad is not None
    assert torch.equal(learner.grad, torch.tensor([[[-4.0], [0.0]]]))


def test_nan_logits_without_a_label_reach_neither_loss_nor_gradient() -> None:
    learner = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]], requires_grad=True)
    loss = distillation(learner, torch.tensor([[1.0, 0.0], [0.0, float("nan")]]), torch.tensor([0, -100]))
    loss.backward()
    assert torch.isfinite(loss)
    assert learner.grad is not None
    assert torch.isfinite(learner.grad).all()
    assert not learner.grad[1].any()
