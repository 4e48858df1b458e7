"""CartPole: episodes, advantages, scores and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedkd_flwr.core.predictions import Predictions
from fedkd_flwr.core.protocols import ActingTask
from fedkd_flwr.experiment import ConfigError, parse
from fedkd_flwr.tasks import cartpole
from fedkd_flwr.tasks.cartpole import CartPole, CartPoleOptions, Episodes, advantage_estimates

TEXT = """
name: pole
num_clients: 2
num_rounds: 1
task: {name: cartpole, episodes: 3, teacher: 16, student: 8}
algorithm: {name: frd}
"""


@pytest.fixture
def task() -> CartPole:
    pytest.importorskip("gymnasium")
    return CartPoleOptions(episodes=3, test_episodes=2, teacher=16, student=8).build(num_clients=2, seed=0)


def seeds_of(episodes: Any, seed: int | None) -> list[int]:
    return [int(number) for batch in episodes.batches(2, seed) for number in batch["seeds"]]


def test_training_plays_new_episodes_each_time_and_scoring_the_same_ones() -> None:
    episodes = Episodes(5, stream=1)
    assert len({*seeds_of(episodes, 1), *seeds_of(episodes, 2)}) == 10
    assert seeds_of(episodes, None) == seeds_of(episodes, None)


def test_agents_play_different_episodes_and_are_scored_on_the_same(task: CartPole) -> None:
    first, second = task.client_data(0), task.client_data(1)
    assert not {*seeds_of(first.train, 1)} & {*seeds_of(second.train, 1)}
    assert seeds_of(first.test, None) == seeds_of(second.test, None) == seeds_of(task.test_data(), None)


def test_advantages_by_hand() -> None:
    values = np.array([3.0, 2.0, 0.0])
    np.testing.assert_allclose(advantage_estimates(values, 0.5, 0.5), [-1.25, -1.0])  # -1 + 1/4 * -1
    np.testing.assert_allclose(advantage_estimates(values, 1.0, 1.0), [2 - 3, 1 - 2])  # whole returns
    np.testing.assert_allclose(advantage_estimates(values, 1.0, 0.0), [1 + 2 - 3, 1 + 0 - 2])  # one step


def test_a_forward_pass_plays_and_gives_a_loss_with_a_gradient_for_actor_and_critic(task: CartPole) -> None:
    model = task.build_models(0).teacher
    [batch] = task.client_data(0).train.batches(3, seed=1)
    out = task.forward(model, batch, hidden_states=False, attentions=False)
    assert out.states is not None and out.loss is not None
    assert len(out.logits) == len(out.labels) == len(out.states) > 3
    again = task.forward(model, batch, hidden_states=False, attentions=False)
    assert torch.equal(out.labels, again.labels)  # seeds decide the actions, and nothing else
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_score_is_the_mean_number_of_steps_and_solved_from_195(task: CartPole) -> None:
    def of(*steps: int) -> dict[str, float]:
        return task.score(Predictions([np.zeros((n, 2)) for n in steps], [np.zeros(n) for n in steps]), Episodes(2, 0))

    assert of(200, 190) == {"mean_return": 195.0, "solved": 1.0}
    assert of(200, 188) == {"mean_return": 194.0, "solved": 0.0}
    predictions = task.predict(task.build_models(0).student, task.test_data())
    assert len(predictions.labels) == 2


def test_it_is_a_task_that_is_learned_by_acting(task: CartPole) -> None:
    assert isinstance(task, ActingTask)


@pytest.mark.parametrize("cells", [[1, 1, 1, 1], [100, 100, 100, 100]])
def test_proxies_that_are_too_coarse_or_too_fine_are_refused(cells: list[int]) -> None:
    with pytest.raises(ValidationError, match="proxies must be between 2 and 1000000 cells together"):
        CartPoleOptions.model_validate({"proxies": cells})


def test_no_proxies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.proxies"):
        parse(TEXT, ("task.proxies=[]",))


def test_without_gymnasium_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cartpole, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package gymnasium; install it with pip install 'fedkd-flwr\[rl\]'"
    ):
        parse(TEXT).build_task()
