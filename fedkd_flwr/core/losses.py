"""Losses of adaptive mutual distillation.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), https://doi.org/10.1038/s41467-022-29763-x, equations 1 to 7, read strictly: each model gets the gradient of its
own loss only. What a model learns from, and the divisor that weighs it, are constants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedkd_flwr.core.protocols import Outputs

NO_LABEL = -100  # torch's own ignore_index

Trust = Literal["all", "right", "probability", "better"]


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Equations 1 and 2: cross-entropy in nats, mean over the positions that have a label; 0 where none has.

    With class weights w it is the weighted mean, sum(w_y CE) / sum(w_y), as torch's own `CrossEntropyLoss(weight=w)`
    has it; 0 where the weights of all labels are 0.

    Args:
        logits: [..., classes], at least two axes.
        labels: [...], class indices; -100 marks a position without a label.
        class_weights: [classes], each >= 0; None where all labels count alike.
    """
    weights = None if class_weights is None else class_weights.to(logits)  # device and dtype
    total = functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), weight=weights, ignore_index=NO_LABEL, reduction="sum"
    )
    labelled = labels != NO_LABEL
    if weights is None:
        return total / labelled.sum().clamp(min=1)
    mass = torch.where(labelled, weights[labels.clamp(min=0)], 0.0).sum()
    return total / torch.where(mass > 0, mass, 1.0)


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats towards probabilities, -sum_c q_c log softmax(z)_c, weighted and averaged over the batch.

    Args:
        logits: [batch, classes], gets the gradient.
        targets: [batch, classes], probabilities.
        weights: [batch], of each example, which counts in the mean whatever it weighs; 0 where there is no target.
    """
    return -((targets * logits.log_softmax(dim=-1)).sum(dim=-1) * weights).mean()


def task_loss(out: Outputs) -> Tensor:
    """What every model is trained on, whatever else it learns from.

    The loss that a task gives with its outputs, else `cross_entropy` with the labels.
    """
    if out.loss is not None:
        return out.loss
    return cross_entropy(out.logits, out.labels, out.class_weights)


def log_prior(label_counts: Sequence[int]) -> Tensor:
    """Logarithm of how often each class occurs, for logit adjustment: [classes].

    A model that is trained on logits + log P(class) learns what a text or an image says beyond the frequencies of the
    classes where it was trained (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
    https://arxiv.org/abs/2007.07314; Ren et al., "Balanced meta-softmax", NeurIPS 2020). Every class counts one example
    more than it has, so that none is impossible.

    Args:
        label_counts: examples of each class.
    """
    counts = torch.tensor(label_counts, dtype=torch.float64) + 1
    return (counts / counts.sum()).log().float()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) in nats along the last axis: p learns, q is the target. Shape [..., classes] to [...].

    0 log 0 counts as 0.
    """
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), torch.zeros_like(q)).sum(dim=-1)


def distillation(
    learner_logits: Tensor, guide_logits: Tensor, labels: Tensor, temperature: float = 1.0, trust: Trust = "all"
) -> Tensor:
    """Numerator of equations 3 and 4: KL(guide || learner), mean over labelled positions. The guide is a constant.

    With a temperature tau, both sides are softened by 1/tau and the result is scaled by tau squared, which keeps the
    size of the gradient (Hinton et al., "Distilling the knowledge in a neural network", 2015). The paper has tau = 1.

    Args:
        learner_logits: [..., classes], gets the gradient.
        guide_logits: [..., classes].
        labels: [...]; only positions other than -100 count.
        temperature: > 0.
        trust: where the guide is followed: "all", everywhere alike; "right", where the class it finds likeliest is the
            label; "probability", as much as the probability that it gives to the label; "better", where it gives the
            label a higher probability than the learner does. Positions where it is not followed add 0 to the mean.
    """
    labelled = labels != NO_LABEL
    learner, guide = (torch.where(labelled[..., None], of, 0.0) for of in (learner_logits, guide_logits.detach()))
    log_p, log_q = ((of / temperature).log_softmax(dim=-1) for of in (learner, guide))
    # Positions without a label are equal on both sides now, so they add nothing.
    divergence = kl_divergence(log_p, log_q)
    if trust != "all":
        divergence = divergence * _trusted(learner.detach(), guide, labels.clamp(min=0), trust)
    return temperature**2 * divergence.sum() / labelled.sum().clamp(min=1)


def _trusted(learner_logits: Tensor, guide_logits: Tensor, labels: Tensor, trust: Trust) -> Tensor:
    """How far the guide is followed at each position, in [0, 1]."""
    if trust == "right":
        return (guide_logits.argmax(dim=-1) == labels).to(guide_logits.dtype)
    of_learner, of_guide = (
        logits.softmax(dim=-1).gather(-1, labels[..., None])[..., 0] for logits in (learner_logits, guide_logits)
    )
    return of_guide if trust == "probability" else (of_guide > of_learner).to(of_guide.dtype)


def masked_mse(learner: Tensor, guide: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over the elements that `mask` keeps. The guide is a constant.

    Args:
        learner: any shape, gets the gradient.
        guide: the same shape.
        mask: broadcastable to that shape, true where an element counts; None where all do.
    """
    target = guide.detach()
    if mask is None:
        return ((learner - target) ** 2).mean()
    kept = mask.expand_as(learner)
    # Masked before it is squared: a model may leave NaN where a token is padding, and NaN survives a later mask.
    difference = torch.where(kept, learner, 0.0) - torch.where(kept, target, 0.0)
    return (difference**2).sum() / kept.sum().clamp(min=1)


def layer_map(num_student_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Teacher layer that guides each student layer: l to l * num_teacher_layers / num_student_layers, counted from 1.

    Example:
        >>> layer_map(2, 6)
        (3, 6)

    Raises:
        ValueError: if the ratio is not a whole number; name the pairs yourself then.
    """
    if num_student_layers < 1 or num_teacher_layers < 1 or num_teacher_layers % num_student_layers:
        raise ValueError(
            f"{num_teacher_layers} teacher layers over {num_student_layers} student layers is not a whole number; "
            "give layer_map, one teacher layer for each student layer"
        )
    ratio = num_teacher_layers // num_student_layers
    return tuple(ratio * layer for layer in range(1, num_student_layers + 1))


def hidden_mse(learner: Sequence[Tensor], guide: Sequence[Tensor], token_mask: Tensor | None = None) -> Tensor:
    """Hidden part of equation 5: MSE(H_t, W_h H_s), mean over mapped layers and unmasked tokens.

    Args:
        learner: one [batch, tokens, width] for each mapped layer, gets the gradient.
        guide: the same shapes.
        token_mask: [batch, tokens], true where a token is real; None where every token is.
    """
    mask = None if token_mask is None else token_mask.bool()[..., None]
    return torch.stack([masked_mse(a, b, mask) for a, b in zip(learner, guide, strict=True)]).mean()


def attention_mse(learner: Sequence[Tensor], guide: Sequence[Tensor], token_mask: Tensor | None = None) -> Tensor:
    """Attention part of equation 5: MSE(A_t, A_s), mean over mapped layers and pairs of unmasked tokens.

    Models with different numbers of heads are compared by their mean over heads.

    Args:
        learner: one [batch, heads, tokens, tokens] for each mapped layer, gets the gradient.
        guide: the same but for the number of heads.
        token_mask: [batch, tokens], true where a token is real; None where every token is.
    """
    mask = None
    if token_mask is not None:
        real = token_mask.bool()
        mask = (real[:, :, None] & real[:, None, :])[:, None]
    terms = []
    for a, b in zip(learner, guide, strict=True):
        same_heads = a.shape[1] == b.shape[1]
        pair = (a, b) if same_heads else (a.mean(dim=1, keepdim=True), b.mean(dim=1, keepdim=True))
        terms.append(masked_mse(*pair, mask))
    return torch.stack(terms).mean()


def adaptive_divisor(teacher_task: Tensor, student_task: Tensor, floor: float) -> Tensor:
    """Divisor of equations 3 to 5: max(L_t_task + L_s_task, floor), a constant.

    The paper has no floor. Late in training both losses fall to some thousandths, and the quotient would turn a client
    with few examples into a machine that only matches features.

    Args:
        teacher_task: scalar, >= 0.
        student_task: scalar, >= 0.
        floor: > 0.
    """
    return (teacher_task + student_task).detach().clamp(min=floor)


@dataclass(frozen=True, slots=True)
class DistillationTerms:
    """Which terms of equations 3 to 5 take part. All off leaves plain supervised training.

    The caller leaves `Side.hidden` or `Side.attentions` empty where that term is off, and passes a divisor of 1 where
    `adaptive` is.
    """

    mutual: bool = True
    hidden: bool = True
    attention: bool = True
    adaptive: bool = True
    temperature: float = 1.0
    divisor_floor: float = 3.0
    trust: Trust = "all"


@dataclass(frozen=True, slots=True)
class Side:
    """What one model offers to the other on one batch.

    Attributes:
        logits: [..., classes].
        task: its task loss, scalar.
        hidden: mapped hidden states in the *teacher's* width (the student's after W_h); None where the term is off.
        attentions: mapped attention maps; None where the term is off.
    """

    logits: Tensor
    task: Tensor
    hidden: Sequence[Tensor] | None = None
    attentions: Sequence[Tensor] | None = None


def own_loss(
    learner: Side,
    guide: Side,
    labels: Tensor,
    divisor: Tensor,
    terms: DistillationTerms,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Equations 6 and 7, for either model: L = L_task + (KL + MSE(H) + MSE(A)) / divisor.

    The gradient reaches the learner only. W_h belongs to the student's side, so it learns from the student's loss; the
    teacher's loss has the same hidden term with W_h H_s as a constant.

    Args:
        learner: the model that this loss trains.
        guide: the other one.
        labels: [...], as for `cross_entropy`.
        divisor: scalar from `adaptive_divisor`.
        terms: which terms take part.
        token_mask: [batch, tokens] or None.
    """
    guidance: list[Tensor] = []
    if terms.mutual:
        guidance.append(distillation(learner.logits, guide.logits, labels, terms.temperature, terms.trust))
    if learner.hidden is not None and guide.hidden is not None:
        guidance.append(hidden_mse(learner.hidden, guide.hidden, token_mask))
    if learner.attentions is not None and guide.attentions is not None:
        guidance.append(attention_mse(learner.attentions, guide.attentions, token_mask))
    return learner.task if not guidance else learner.task + torch.stack(guidance).sum() / divisor
