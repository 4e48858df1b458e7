"""Nothing is computed twice, and nothing that no term asks for."""

from collections import Counter

import pytest

from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import LOCAL, SEED, Counting
from tests.algorithms.rounds import TERMS, fedkd, train


@pytest.mark.parametrize("on", [(), ("mutual",), ("hidden",), ("attention",), TERMS], ids="+".join)
def test_each_model_runs_once_on_each_batch_and_returns_only_what_a_term_needs(
    task: Task, data: ClientData, on: tuple[str, ...]
) -> None:
    counting = Counting(task)
    algorithm = fedkd(counting, *on)
    private = algorithm.client.initial_private(data)
    counting.calls.clear()
    train(algorithm, data, private)
    num_batches = LOCAL.num_steps(len(data.train))
    assert sorted(Counter(model for model, *_ in counting.calls).values()) == [num_batches, num_batches]
    assert {(hidden, attentions) for _, hidden, attentions in counting.calls} == {("hidden" in on, "attention" in on)}


def test_each_model_runs_once_on_each_batch_that_is_scored(task: Task, data: ClientData) -> None:
    counting = Counting(task)
    algorithm = FedKDOptions().build(counting, SEED)
    private = algorithm.client.initial_private(data)
    counting.calls.clear()
    algorithm.client.evaluate(algorithm.shared.initial(), private, data)
    assert len({model for model, *_ in counting.calls}) == len(counting.calls) == 2  # one batch holds the test images
    assert not any(hidden or attentions for _, hidden, attentions in counting.calls)
