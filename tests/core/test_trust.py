"""Where a guide is followed, and the prior that takes the frequencies of labels out of what is learned."""

import pytest
import torch
from torch import Tensor

from fedkd_flwr.core.losses import NO_LABEL, Trust, distillation, kl_divergence, log_prior

GUIDE = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
LEARNER = torch.tensor([[0.0, 1.0, 0.0], [1.0, -1.0, 0.5], [0.2, 0.1, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
GOLD = torch.tensor([0, 2, 2, NO_LABEL])  # the guide is right, wrong, right, and not asked


def divergences() -> Tensor:
    return kl_divergence(LEARNER.log_softmax(dim=-1), GUIDE.log_softmax(dim=-1))


def test_a_guide_that_is_trusted_where_right_teaches_nothing_where_it_is_wrong() -> None:
    of_each = divergences()
    torch.testing.assert_close(distillation(LEARNER, GUIDE, GOLD, trust="right"), (of_each[0] + of_each[2]) / 3)


def test_a_guide_that_is_trusted_by_probability_counts_as_much_as_it_gives_to_the_label() -> None:
    sure = GUIDE.softmax(dim=-1)
    expected = sum(divergences()[n] * sure[n, GOLD[n]] for n in range(3)) / 3
    torch.testing.assert_close(distillation(LEARNER, GUIDE, GOLD, trust="probability"), expected)


def test_a_guide_that_is_trusted_where_better_teaches_only_whoever_gives_the_label_less() -> None:
    of_each = divergences()
    mine, other = (logits.softmax(dim=-1)[torch.arange(4), GOLD.clamp(min=0)] for logits in (LEARNER, GUIDE))
    assert (other > mine).tolist()[:3] == [True, False, True]
    torch.testing.assert_close(distillation(LEARNER, GUIDE, GOLD, trust="better"), (of_each[0] + of_each[2]) / 3)
    of_back = kl_divergence(GUIDE.log_softmax(dim=-1), LEARNER.log_softmax(dim=-1))
    torch.testing.assert_close(distillation(GUIDE, LEARNER, GOLD, trust="better"), of_back[1] / 3)


@pytest.mark.parametrize("trust", ["right", "probability", "better"])
def test_trust_is_a_constant_and_needs_a_label(trust: Trust) -> None:
    learner, guide = LEARNER.clone().requires_grad_(), GUIDE.clone().requires_grad_()
    distillation(learner, guide, GOLD, trust=trust).backward()
    assert guide.grad is None
    assert not learner.grad[3].any()
    if trust == "right":
        assert not learner.grad[1].any()


def test_the_log_prior_is_the_smoothed_share_of_each_class() -> None:
    torch.testing.assert_close(log_prior([3, 0, 1]).exp(), torch.tensor([4.0, 1.0, 2.0]) / 7)
    assert log_prior([10**9, 0]).isfinite().all()


@pytest.mark.parametrize("trust", ["all", "right", "probability", "better"])
def test_what_stands_where_there_is_no_label_reaches_neither_loss_nor_gradient(trust: Trust) -> None:
    nothing = torch.where(GOLD[:, None] == NO_LABEL, float("nan"), 0.0)
    learner = (LEARNER + nothing).requires_grad_()
    loss = distillation(learner, GUIDE + nothing, GOLD, trust=trust)
    loss.backward()
    torch.testing.assert_close(loss.detach(), distillation(LEARNER, GUIDE, GOLD, trust=trust))
    assert learner.grad is not None and learner.grad.isfinite().all()
