"""The proxy experience memory of federated reinforcement distillation: gathered, packed, averaged.

For each proxy state that an agent came near it holds the mean of its policy there, over all visits of a round.
"""

import numpy as np
import torch
from torch import Tensor

from fedkd_flwr.algorithms.label_outputs import require_at_most
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, require_finite
from fedkd_flwr.core.entropy_coding import BitReader, BitWriter, most_bits_of_flags, read_flags, write_flags
from fedkd_flwr.core.proxy_states import ProxyGrid

POLICIES, VISITED = "policies", "visited"


class ProxyMemory:
    """Sums the policy of an agent in the states of each cluster, while it acts.

    Args:
        grid: K proxy states.
        num_actions: A.
    """

    def __init__(self, grid: ProxyGrid, num_actions: int) -> None:
        self._grid = grid
        self._sums = torch.zeros(len(grid), num_actions, dtype=torch.float64)
        self._visits = torch.zeros(len(grid), dtype=torch.float64)

    def add(self, states: Tensor, logits: Tensor) -> None:
        """Take what the policy was in some states.

        Args:
            states: [N, axes].
            logits: [N, A].
        """
        nearest = self._grid.nearest(states.cpu())
        self._sums.index_add_(0, nearest, logits.detach().double().softmax(dim=-1).cpu())
        self._visits.index_add_(0, nearest, torch.ones(len(nearest), dtype=torch.float64))

    def means(self) -> dict[str, Array]:
        """`policies` [K, A], time-averaged, zeros where the agent never was; `visited` [K], 1 where it was."""
        means = self._sums / self._visits.clamp(min=1)[:, None]
        return {POLICIES: means.numpy().astype(np.float32), VISITED: self._visits.clamp(max=1).numpy().astype("f4")}


class ProxyMemoryCodec:
    """Packs a memory as one string of bits: which proxies were visited, then A - 1 probabilities for each of those.

    A memory of V proxies out of K takes what `write_flags` needs for the V, at most about K bits, and V (A - 1) bits of
    a number; the last probability follows, because they sum to 1.

    Args:
        num_proxies: K.
        num_actions: A.
        bits: of a probability, which is a multiple of 1 / (2**bits - 1).
    """

    def __init__(self, num_proxies: int, num_actions: int, bits: int) -> None:
        self._num_proxies = num_proxies
        self._num_actions = num_actions
        self._bits = bits
        self._largest = 2**bits - 1
        self.spec: Spec = (TensorSpec(POLICIES, (num_proxies, num_actions)), TensorSpec(VISITED, (num_proxies,)))

    @property
    def most_bytes(self) -> int:
        """Length of the longest payload: every proxy was visited."""
        numbers = self._num_proxies * (self._num_actions - 1) * self._bits
        return -(-(most_bits_of_flags(self._num_proxies) + numbers) // 8)

    def initial_state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def encode(self, update: Arrays, state: Arrays, *, progress: float, seed: int) -> tuple[bytes, Arrays]:
        """The payload.

        Raises:
            ValueError: if a number is not finite.
        """
        require_finite(update)
        visited = update[VISITED] > 0
        writer = BitWriter()
        write_flags(visited, writer)
        cumulated = update[POLICIES][visited].astype(np.float64).cumsum(axis=1)[:, :-1]
        # Sums are rounded, not the probabilities: so what is left for the last one is never below 0.
        steps = np.rint(cumulated.clip(0, 1) * self._largest).astype(np.int64)
        writer.numbers(np.diff(steps, axis=1, prepend=0).reshape(-1), self._bits)
        return writer.to_bytes(), state

    def decode(self, payload: bytes, state: Arrays) -> tuple[Arrays, Arrays]:
        """What was packed, as float32.

        Raises:
            ValueError: if the payload is not one of these.
        """
        require_at_most(payload, self.most_bytes)
        reader = BitReader(payload)
        visited = read_flags(self._num_proxies, reader)
        given = reader.numbers(int(visited.sum()) * (self._num_actions - 1), self._bits)
        reader.finish()
        steps = given.reshape(-1, self._num_actions - 1)
        left = self._largest - steps.sum(axis=1)
        if (left < 0).any():
            raise ValueError("probabilities of a proxy state sum to more than 1")
        policies = np.zeros((self._num_proxies, self._num_actions), np.float32)
        policies[visited] = np.concatenate([steps, left[:, None]], axis=1) / self._largest
        return {POLICIES: policies, VISITED: visited.astype(np.float32)}, state


class ProxyMemoryMean:
    """The mean policy of each proxy state, over the agents that visited it, all alike."""

    def __init__(self) -> None:
        self._sums: Array | None = None
        self._agents: Array | None = None

    def begin(self, server_round: int) -> None:
        """Forget the round before."""
        self._sums = self._agents = None

    def add(self, upload: Arrays, num_examples: int, loss: float | None, client: str = "") -> None:
        """Add one agent's memory."""
        agents = upload[VISITED].astype(np.float64)
        sums = upload[POLICIES].astype(np.float64) * agents[:, None]
        self._sums = sums if self._sums is None else self._sums + sums
        self._agents = agents if self._agents is None else self._agents + agents

    def result(self) -> Arrays | None:
        """`policies` and `visited` over all agents; a proxy state that none of them visited is all zeros."""
        if self._sums is None or self._agents is None:
            return None
        means = self._sums / np.maximum(self._agents, 1)[:, None]
        return {POLICIES: means.astype(np.float32), VISITED: (self._agents > 0).astype(np.float32)}

    def state(self) -> Arrays:
        """Nothing is kept."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing to restore."""
