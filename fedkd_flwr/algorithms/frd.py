"""Federated reinforcement distillation: agents exchange what their policies do in proxy states, and no model.

Cha et al., "Federated reinforcement distillation with proxy experience memory", 2019, https://arxiv.org/abs/1907.06536,
and, with mixing, "Proxy experience replay: Federated distillation for distributed reinforcement learning", 2020,
https://arxiv.org/abs/2005.06105; of both only the abstracts were at hand, and the equations are the usual ones. With
C_k the states near proxy state s_k:

    p_i(k) = mean of pi_i(. | s) over agent i's visits to states s in C_k, in one round
    p(k)   = mean of p_i(k) over the agents that visited C_k
    every agent, before it acts:  minimise the mean over k of  - sum_a p(a | k) log pi(a | s_k)

MixFRD also distils at mixed states lam s_k + (1 - lam) s_l of adjacent proxies, towards policies mixed alike.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Algorithm, Assignment, MakeCodec, Trained, Wires, num_parameters
from fedkd_flwr.algorithms.loop import Optimizer, OptimizerOptions, forward, run_epochs
from fedkd_flwr.algorithms.own_models import NoModelServer, OwnModelClient, OwnModelOptions
from fedkd_flwr.algorithms.proxy_memory import POLICIES, VISITED, ProxyMemory, ProxyMemoryCodec, ProxyMemoryMean
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.losses import soft_cross_entropy, task_loss
from fedkd_flwr.core.protocols import ActingTask, Batch, ClientData, Models, Task
from fedkd_flwr.core.seeds import derive_seed


class FrdOptions(OwnModelOptions):
    """Options of federated reinforcement distillation, beside those of a model of one's own.

    Attributes:
        bits: of a probability on the wire, in [1, 16].
        distillation_steps: on the whole memory, at the beginning of each round.
        distillation_optimizer: of these steps; it begins afresh in every round, as the memory does.
    """

    learns_by_acting: ClassVar[bool] = True
    weighs_by_examples: ClassVar[bool] = False
    name: Literal["frd"] = "frd"
    bits: int = Field(8, ge=1, le=16)
    distillation_steps: int = Field(5, ge=0)
    distillation_optimizer: OptimizerOptions = OptimizerOptions()

    def build(self, task: Task, seed: int) -> Algorithm:
        """Federated reinforcement distillation between agents.

        Raises:
            ValueError: if the task is not learned by acting.
        """
        return _build(task, seed, self, mix=False)


class MixFrdOptions(FrdOptions):
    """Options of FRD with mixed proxy states; see `FrdOptions`."""

    name: Literal["mixfrd"] = "mixfrd"  # type: ignore[assignment]

    def build(self, task: Task, seed: int) -> Algorithm:
        """FRD in which every step also sees each pair of adjacent proxies, mixed by a share drawn anew from (0, 1).

        Raises:
            ValueError: if the task is not learned by acting.
        """
        return _build(task, seed, self, mix=True)


def _build(task: Task, seed: int, options: FrdOptions, *, mix: bool) -> Algorithm:
    if not isinstance(task, ActingTask):
        raise ValueError(
            f"algorithm.name: {options.name} needs a task that is learned by acting (cartpole), got one with data"
        )
    models = task.build_models(seed)
    shared = SharedMemory(ProxyMemoryCodec(len(task.proxies), task.num_actions, options.bits))
    client = FrdClient(task, models, options, mix=mix)
    return Algorithm(
        "outputs",
        shared,
        client,
        NoModelServer(),
        *num_parameters(models),
        make_aggregator=ProxyMemoryMean,
        leaves="the policy in the proxy states that were visited",
        stays="the policy's model",
    )


class SharedMemory:
    """The memory of all agents: version 0 is that nobody was anywhere."""

    def __init__(self, codec: ProxyMemoryCodec) -> None:
        self._codec = codec

    def initial(self) -> Arrays:
        """No proxy is visited."""
        return {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in self._codec.spec}

    def wires(self, make_codec: MakeCodec) -> Wires | None:
        """The codec of memories, each way; the user's is for updates of models, of which there are none."""
        return Wires(self._codec, self._codec)

    def apply(self, shared: Arrays, broadcast: Arrays) -> Arrays:
        """The memory of the last round replaces the one before."""
        return broadcast


class FrdClient(OwnModelClient):
    """Client half: distils the memory of all into its policy, then acts and learns, and sums up what its policy did."""

    def __init__(self, task: ActingTask, models: Models, options: FrdOptions, *, mix: bool) -> None:
        super().__init__(task, models, options)
        self._acting = task
        self._frd = options
        self._mix = mix

    def train(self, shared: Arrays, private: Arrays, data: ClientData, assignment: Assignment) -> Trained:
        """One round; the upload is the agent's memory of it."""
        module = self._own.load(private, data)
        optimizer = self._own.optimizer(module, private)
        memory = ProxyMemory(self._acting.proxies, self._acting.num_actions)
        self._frd.local.prepare(module)
        measured = self._distil(module, shared, assignment)

        def loss_of(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
            out = forward(self._task, module, batch, self._frd.local)
            assert out.states is not None  # an `ActingTask` gives them
            memory.add(out.states, out.logits)
            loss = task_loss(out)
            return loss, {"train_loss": loss.detach()}

        measures = run_epochs(data.train, self._frd.local, assignment, [optimizer], loss_of)
        metrics = {name: float(np.mean(values)) for name, values in measures.items()}
        return Trained(memory.means(), self._own.kept(module, optimizer), metrics | measured)

    def _distil(self, module: nn.Module, shared: Arrays, assignment: Assignment) -> dict[str, float]:
        """Move the policy towards the memory; the mean loss, unless there is no memory."""
        visited = torch.from_numpy(shared[VISITED] > 0)
        if not visited.any() or not self._frd.distillation_steps:
            return {}
        policies = torch.from_numpy(shared[POLICIES])
        centres = self._acting.proxies.centres
        pairs = self._acting.proxies.neighbours(visited) if self._mix else torch.zeros(0, 2, dtype=torch.long)
        optimizer = Optimizer(self._frd.distillation_optimizer, module.named_parameters())
        random = torch.Generator().manual_seed(derive_seed(assignment.seed, "mix"))
        losses = []
        for _ in range(self._frd.distillation_steps):
            share = torch.rand(len(pairs), 1, generator=random)
            states = torch.cat([centres[visited], mixed(centres, pairs, share)])
            targets = torch.cat([policies[visited], mixed(policies, pairs, share)])
            logits = self._acting.policy(module, states)
            loss = soft_cross_entropy(logits, targets.to(logits), torch.ones(len(logits)).to(logits))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        return {"distillation_loss": float(torch.stack(losses).mean())}


def mixed(rows: Tensor, pairs: Tensor, share: Tensor) -> Tensor:
    """Mix each pair of rows: share * first + (1 - share) * second.

    Args:
        rows: [K, width].
        pairs: [pairs, 2], numbers of rows.
        share: [pairs, 1], in [0, 1].
    """
    return share * rows[pairs[:, 0]] + (1 - share) * rows[pairs[:, 1]]
