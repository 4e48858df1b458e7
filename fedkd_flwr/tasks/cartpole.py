"""CartPole: balance a pole on a cart, learned by acting. The environment is gymnasium's.

An example is an episode, given by its seed, and who acts decides what happens in it. To train, an agent draws its
actions and minimises the loss of advantage actor-critic (Mnih et al., "Asynchronous methods for deep reinforcement
learning", ICML 2016, https://arxiv.org/abs/1602.01783) with generalised advantage estimates over whole episodes
(Schulman et al., https://arxiv.org/abs/1506.02438); to be scored, it takes the likeliest action. Every step that the
pole stands is worth 1, so a return is a number of steps, at most 200; a mean of 195 counts as solved.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from fedkd_flwr.core.modules import on_device_of
from fedkd_flwr.core.predictions import Numbers, Predictions
from fedkd_flwr.core.protocols import Batch, ClientData, DataReport, Examples, Models, Outputs, Range
from fedkd_flwr.core.proxy_states import ProxyGrid
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.base import TaskOptions, copy_shared_tensors
from fedkd_flwr.tasks.partition import require_client

NUM_ACTIONS = 2
MAX_STEPS = 200
SOLVED = 195.0
METRICS: dict[str, Range] = {"mean_return": (0.0, MAX_STEPS), "solved": (0.0, 1.0)}
# Position and angle end an episode at 2.4 m and 12 degrees; speeds have no bound, and are seldom beyond these.
BOUNDS = ((-2.4, 2.4), (-3.0, 3.0), (-0.2095, 0.2095), (-3.0, 3.0))
_NUM_AXES = len(BOUNDS)
_MOST_PROXIES = 1_000_000
_EVALUATION = 0  # source of the seeds of evaluation episodes: the same for all experiments, so that scores compare


class ActorCriticOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How an agent learns from its episodes.

    Attributes:
        discount: of later rewards, in (0, 1].
        trace: lambda of the advantage estimates, in [0, 1]; 1: whole returns.
        value_weight: of the critic's squared error.
        entropy_weight: of the policy's entropy, which keeps it from being sure too early.
    """

    discount: float = Field(0.99, gt=0, le=1)
    trace: float = Field(0.95, ge=0, le=1)
    value_weight: float = Field(0.5, ge=0)
    entropy_weight: float = Field(0.01, ge=0)


class CartPoleOptions(TaskOptions):
    """Options of CartPole.

    Attributes:
        episodes: that an agent plays in an epoch, each once; their number weighs it where examples count.
        test_episodes: to score on, of the same seeds for everybody.
        teacher: width of both hidden layers of actor and critic.
        student: the same of the small model.
        proxies: cells of the grid of proxy states, along position, speed, angle and angular speed.
        learning: how an agent learns from its episodes.
    """

    name: Literal["cartpole"] = "cartpole"
    episodes: int = Field(5, ge=1)
    test_episodes: int = Field(10, ge=1)
    teacher: int = Field(64, ge=1)
    student: int = Field(32, ge=1)
    proxies: tuple[Annotated[int, Field(ge=1)], ...] = Field((3, 5, 6, 5), min_length=_NUM_AXES, max_length=_NUM_AXES)
    learning: ActorCriticOptions = ActorCriticOptions()

    @model_validator(mode="after")
    def _proxies_tell_states_apart(self) -> Self:
        count = int(np.prod(self.proxies, dtype=object))
        if not 2 <= count <= _MOST_PROXIES:
            raise ValueError(
                f"proxies must be between 2 and {_MOST_PROXIES} cells together, got {count}; take more along the angle "
                "where they are too coarse, and fewer where they are too fine"
            )
        return self

    def build(self, num_clients: int, seed: int) -> "CartPole":
        """The task for a number of agents.

        Raises:
            ValueError: if gymnasium is not installed.
        """
        if find_spec("gymnasium") is None:
            raise ValueError(
                "task.name: cartpole needs the package gymnasium; install it with pip install 'fedkd-flwr[rl]'"
            )
        return CartPole(self, num_clients, seed)


class Episodes:
    """Episodes by their seeds.

    Args:
        count: how many.
        stream: of seeds; with a seed of the order, other ones come each time.
    """

    def __init__(self, count: int, stream: int) -> None:
        self._count = count
        self._stream = stream

    def __len__(self) -> int:
        """Number of episodes."""
        return self._count

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All episodes once, in batches; new ones for each `seed`, the same ones when it is None."""
        stream = self._stream if seed is None else derive_seed(self._stream, seed)
        seeds = torch.tensor([derive_seed(stream, "episode", number) for number in range(self._count)])
        for some in torch.split(seeds, batch_size):
            yield {"seeds": some}


class ActorCritic(nn.Module):
    """A policy and a value of states, two perceptrons of two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor = _perceptron(width, NUM_ACTIONS)
        self.critic = _perceptron(width, 1)


class CartPole:
    """The task; see the module's text."""

    counts_labels = False
    metrics = METRICS
    num_actions = NUM_ACTIONS

    def __init__(self, options: CartPoleOptions, num_clients: int, seed: int) -> None:
        self._options = options
        self._num_clients = num_clients
        self._seed = seed
        self.proxies = ProxyGrid(BOUNDS, options.proxies)

    def client_data(self, partition_id: int) -> ClientData:
        """Episodes of one agent.

        Raises:
            ValueError: if there is no such client.
        """
        require_client(partition_id, self._num_clients)
        stream = derive_seed(self._seed, "episodes", partition_id)
        return ClientData(Episodes(self._options.episodes, stream), self.test_data(), client=partition_id)

    def test_data(self) -> Examples:
        """Episodes of fixed seeds."""
        return Episodes(self._options.test_episodes, _EVALUATION)

    def data_report(self) -> DataReport:
        """Actions have names, and nobody holds labels."""
        return DataReport(("left", "right"), ((0, 0),) * self._num_clients)

    def build_models(self, seed: int) -> Models:
        """Agents with random weights from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher, student = ActorCritic(self._options.teacher), ActorCritic(self._options.student)
        copy_shared_tensors(teacher, student)
        return Models(teacher, student)

    def example_batch(self) -> Batch:
        """One episode."""
        return {"seeds": torch.zeros(1, dtype=torch.int64)}

    def policy(self, model: nn.Module, states: Tensor) -> Tensor:
        """Logits of the actions in some states: [N, 4] to [N, 2]."""
        states = on_device_of(model, {"states": states})["states"]
        found: Tensor = model.get_submodule("actor")(_scaled(states))
        return found

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Play the episodes, actions drawn, and look at all their steps at once."""
        played = self._play(model, batch["seeds"], greedy=False)
        states = torch.from_numpy(np.concatenate([episode.states[:-1] for episode in played]))
        logits = self.policy(model, states)
        labels = torch.from_numpy(np.concatenate([episode.actions for episode in played])).to(logits.device)
        loss = self._loss(model, played, logits, labels)
        return Outputs(logits, labels, states=states, loss=loss)

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Of each episode, what the policy says in each step, and the action it takes: the likeliest."""
        model.eval()
        found: list[Numbers] = []
        labels: list[Numbers] = []
        for batch in examples.batches(len(examples)):
            for episode in self._play(model, batch["seeds"], greedy=True):
                with torch.inference_mode():
                    logits = self.policy(model, torch.from_numpy(episode.states[:-1]))
                found.append(logits.log_softmax(dim=-1).cpu().numpy())
                labels.append(episode.actions)
        return Predictions(found, labels)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """Mean return, in steps, and 1 where that is solved."""
        mean = float(np.mean([len(actions) for actions in predictions.labels]))
        return {"mean_return": mean, "solved": float(mean >= SOLVED)}

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the weights as safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), directory / "model.safetensors")

    def _play(self, model: nn.Module, seeds: Tensor, *, greedy: bool) -> "list[Episode]":
        """Episodes side by side, so that one pass of the model serves a step of all of them."""
        episodes = [Episode(int(seed)) for seed in seeds]
        with torch.inference_mode():
            while running := [episode for episode in episodes if not episode.over]:
                states = torch.from_numpy(np.stack([episode.states_so_far[-1] for episode in running]))
                right = self.policy(model, states).softmax(dim=-1)[:, 1].cpu().numpy()
                for episode, probability in zip(running, right, strict=True):
                    episode.act(float(probability), greedy=greedy)
        return episodes

    def _loss(self, model: nn.Module, played: "list[Episode]", logits: Tensor, actions: Tensor) -> Tensor:
        """Of advantage actor-critic, a mean over all steps."""
        learning = self._options.learning
        critic = model.get_submodule("critic")
        ends = torch.from_numpy(np.concatenate([episode.states for episode in played]))
        values = critic(_scaled(ends).to(logits.device)).squeeze(-1)
        known = values.detach().cpu().double().numpy()
        advantages, rows, start = [], [], 0
        for episode in played:
            steps = len(episode.actions)
            of_episode = known[start : start + steps + 1].copy()
            if episode.fell:
                of_episode[-1] = 0.0  # nothing comes after a fall; after the last step that is allowed, more would
            advantages.append(advantage_estimates(of_episode, learning.discount, learning.trace))
            rows.append(np.arange(start, start + steps))
            start += steps + 1
        advantage = torch.from_numpy(np.concatenate(advantages)).to(logits)
        of_steps = values[torch.from_numpy(np.concatenate(rows)).to(values.device)]
        log_policy = logits.log_softmax(dim=-1)
        taken = log_policy.gather(1, actions[:, None]).squeeze(1)
        scale = (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-6)
        entropy = -(log_policy.exp() * log_policy).sum(dim=-1).mean()
        error = (of_steps - (of_steps.detach() + advantage)).square().mean()
        policy_loss = -(scale * taken).mean() - learning.entropy_weight * entropy
        loss: Tensor = policy_loss + learning.value_weight * error
        return loss


class Episode:
    """One episode while it is played: its seed decides how it starts and which actions are drawn."""

    def __init__(self, seed: int) -> None:
        # Imported here: it takes a while, and a client that says who it is plays nothing.
        from gymnasium.envs.classic_control import CartPoleEnv

        self._environment: Any = CartPoleEnv()
        self._random = np.random.default_rng(seed)
        state, _ = self._environment.reset(seed=seed % 2**31)
        self.states_so_far = [state]
        self.fell = False
        self._actions: list[int] = []

    @property
    def over(self) -> bool:
        """Whether the pole fell, or stood to the end."""
        return self.fell or len(self._actions) == MAX_STEPS

    @property
    def states(self) -> Numbers:
        """Float32 [steps + 1, 4], the first and the last included."""
        return np.stack(self.states_so_far)

    @property
    def actions(self) -> Numbers:
        """Int64 [steps]."""
        return np.array(self._actions, np.int64)

    def act(self, probability: float, *, greedy: bool) -> None:
        """One step: to the right with this probability, or where that is likelier."""
        action = int(probability > 0.5) if greedy else int(self._random.random() < probability)
        state, _, self.fell, _, _ = self._environment.step(action)
        self._actions.append(action)
        self.states_so_far.append(state)


def advantage_estimates(values: Numbers, discount: float, trace: float) -> Numbers:
    """Generalised advantage estimates of one episode in which every step is worth 1.

    Args:
        values: [steps + 1], what the critic gives each state; 0 for the last one where nothing comes after it.
        discount: gamma, in (0, 1].
        trace: lambda, in [0, 1].

    Returns:
        [steps], float64.
    """
    errors = 1.0 + discount * values[1:] - values[:-1]
    found, later = np.empty(len(errors)), 0.0
    for step in range(len(errors) - 1, -1, -1):
        found[step] = later = errors[step] + discount * trace * later
    return found


def _scaled(states: Tensor) -> Tensor:
    highest = torch.tensor([high for _, high in BOUNDS], dtype=states.dtype, device=states.device)
    scaled: Tensor = states / highest
    return scaled


def _perceptron(width: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(_NUM_AXES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_outputs)
    )
