"""First rounds of some clients in this process: no server, no disk, no messages."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedkd_flwr.algorithms.base import Assignment, LearningServer
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.schedules import progress_of
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower.aggregators import aggregator_of
from fedkd_flwr.flower.merger import Merger
from fedkd_flwr.flower.records import Reply
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.flower.settings import client_key_of
from fedkd_flwr.flower.validation import NormBound
from fedkd_flwr.privacy import privatised

_LINEAGE = bytes(32)


class Trial:
    """Clients that train, with the seeds of the run and all that is kept from round to round.

    Args:
        runtime: the experiment.
        clients: numbers of those that take part.

    Attributes:
        clients: as given.
        replies: for each round, one of each client.
        broadcasts: for each round what comes down after it; None where nothing is exchanged.
    """

    def __init__(self, runtime: Runtime, clients: Sequence[int]) -> None:
        self.clients = list(clients)
        self.replies: list[list[Reply]] = []
        self.broadcasts: list[bytes | None] = []
        self._runtime = runtime
        self._shared = runtime.initial
        self._private: dict[int, Arrays] = {}
        self._uplinks: dict[int, Arrays] = {}
        self._scores: dict[int, Reply] = {}
        self._encoder: Arrays = {}
        self._decoder: Arrays = {}
        self._merger: Merger | None = None
        if (wires := runtime.wires) is not None:
            self._encoder = self._decoder = wires.downlink.initial_state()
            robust = runtime.experiment.server.aggregator.robust
            self._merger = Merger(wires.uplink, aggregator_of(runtime), NormBound(None, "clip"), robust=robust)
        if isinstance(learner := runtime.algorithm.server, LearningServer):
            learner.begin()

    @property
    def num_rounds(self) -> int:
        """Rounds that were tried so far."""
        return len(self.replies)

    def run(self, num_rounds: int, tell: Callable[[str], None]) -> None:
        """Try as many rounds.

        Args:
            num_rounds: at least 1.
            tell: called with what is done now, in words.

        Raises:
            ValueError: if an update, or the aggregate, is not finite.
        """
        for number in range(1, num_rounds + 1):
            replies = []
            for place, client in enumerate(self.clients, 1):
                tell(f"round {number} of {num_rounds}, client {place} of {len(self.clients)}")
                replies.append(self._reply(number, client))
            self.replies.append(replies)
            self.broadcasts.append(self._broadcast(number, replies))

    def grows(self, factor: float) -> bool:
        """Whether the last round's payloads were longer by a factor than those of the round before, either way."""
        if self.num_rounds < 2:
            return False
        up = [sum(reply.payload_bytes for reply in replies) for replies in self.replies[-2:]]
        down = [len(payload or b"") for payload in self.broadcasts[-2:]]
        return up[1] > factor * up[0] or down[1] > factor * down[0]

    def _reply(self, number: int, client: int) -> Reply:
        runtime, half = self._runtime, self._runtime.algorithm.client
        data = runtime.task.client_data(client)
        private = self._private.get(client)
        private = half.initial_private(data) if private is None else private
        experiment, progress = runtime.experiment, progress_of(number, runtime.experiment.num_rounds)
        seed = derive_seed(experiment.seed, "client", number, client_key_of(client))
        assignment = Assignment.of_round(
            number, experiment.num_rounds, progress=progress, seed=seed, counted_round=number - 1
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = half.train(self._shared, private, data, assignment)
        self._private[client] = trained.private
        payload = None
        if runtime.wires is not None and trained.upload is not None:
            uplink, privacy = runtime.wires.uplink, experiment.privacy
            upload = trained.upload if privacy is None else privatised(trained.upload, privacy)
            state = self._uplinks.get(client, uplink.initial_state())
            payload, state = uplink.encode(upload, state, progress=progress, seed=derive_seed(seed, "encode"))
            self._uplinks[client] = state
        if client not in self._scores:  # their names decide the bytes, not their values
            self._scores[client] = self._scored(client, trained.private)
        reply = replace(self._scores[client], payload=payload, train=trained.metrics)
        tells = experiment.privacy is None or experiment.privacy.share_metrics
        return reply if tells else reply.without_metrics()

    def _scored(self, client: int, private: Arrays) -> Reply:
        data = self._runtime.task.client_data(client)
        scores = self._runtime.algorithm.client.evaluate(self._shared, private, data)
        return Reply(
            server_round=1,
            attempt=1,
            version=1,
            lineage=_LINEAGE,
            num_examples=len(data.train),
            num_test_examples=len(data.test),
            shared=scores.get("shared", {}),
            private=scores.get("private", {}),
            ensemble=scores.get("ensemble", {}),
            seconds=dict.fromkeys(("evaluate", "client_train", "encode", "decode"), 0.0),
        )

    def _broadcast(self, number: int, replies: Sequence[Reply]) -> bytes | None:
        runtime = self._runtime
        if runtime.wires is None or self._merger is None:
            return None
        experiment, downlink = runtime.experiment, runtime.wires.downlink
        progress = progress_of(number, experiment.num_rounds)
        accepted = {client_key_of(client): reply for client, reply in zip(self.clients, replies, strict=True)}
        current = Round(number, progress, number - 1, runtime.lineage, accepted=accepted)
        self._merger.take(current, current.reject)
        seed = derive_seed(experiment.seed, "server", number)
        assignment = Assignment.of_round(number, experiment.num_rounds, progress=progress, seed=seed)
        mean = runtime.algorithm.server.broadcast(self._merger.result(), self._shared, assignment)
        payload, self._encoder = downlink.encode(
            mean, self._encoder, progress=progress, seed=derive_seed(seed, "encode")
        )
        decoded, self._decoder = downlink.decode(payload, self._decoder)
        self._shared = runtime.algorithm.shared.apply(self._shared, decoded)
        self._merger.counted()
        return payload
