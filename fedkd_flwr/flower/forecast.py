"""What a run will move, found out without running it.

As many clients as the aggregator needs train their first round here; their updates are encoded, decoded, aggregated and
encoded again as they would be, and the messages around them are made and counted like real ones. Later rounds differ:
ranks change as training goes on and the energy rises.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedkd_flwr.algorithms.base import Assignment, Trained
from fedkd_flwr.core.arrays import FLOAT_BYTES, num_elements
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.aggregators import aggregator_of
from fedkd_flwr.flower.budget import check_accounting
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.merger import Merger
from fedkd_flwr.flower.records import TRAIN, Instruction, Reply
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.traffic import traffic_of
from fedkd_flwr.flower.validation import NormBound
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.measure.privacy_account import PrivacyAccount
from fedkd_flwr.privacy import privatised
from fedkd_flwr.server_options import AdaptiveAggregation

KILOBYTE = 1e3
_FEWEST_CLIENTS = 3  # the mean of one update is as easy to encode as the update; that of several is what will travel
_DENSE_SHARE = 0.5  # of a dense copy: from here on a broadcast is called dense


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes expected of one client in one round.

    Attributes:
        uplink_bytes: its reply, the largest of those tried, without what only the first has.
        first_bytes: what that has besides, see `Algorithm.first_upload_bytes`.
        downlink_bytes: its instruction with the broadcast that their updates gave.
        framing_bytes: of reply and instruction, which take time on a link, too.
        broadcast_share: the broadcast's payload as a share of a dense float32 copy of what is exchanged; None where
            nothing is.
        dense_bytes: one float32 copy of the teacher's trainable parameters, for comparison.
        aggregator: that made the broadcast.
        turns_dense: whether its broadcasts are known to get larger as training goes on.
        num_tried: clients whose first round was tried.
        num_clients: that train in a round.
        num_rounds: of the run.
        fraction: of the clients that trains in a round.
        privacy: what a client will have disclosed at the end, as in the ledger; None where updates have no noise.
        network: links that the experiment names.
    """

    uplink_bytes: int
    first_bytes: int
    downlink_bytes: int
    framing_bytes: tuple[int, int]
    broadcast_share: float | None
    dense_bytes: int
    aggregator: str
    turns_dense: bool
    num_tried: int
    num_clients: int
    num_rounds: int
    fraction: float
    privacy: Mapping[str, Any] | None = None
    network: NetworkOptions | None = None

    def describe(self) -> str:
        """One line for a person."""
        of_client = (self.uplink_bytes + self.downlink_bytes) * self.num_rounds + self.first_bytes
        total = of_client * self.num_clients / KILOBYTE**2
        text = (
            f"about {self.uplink_bytes / KILOBYTE:.1f} kB up and {self.downlink_bytes / KILOBYTE:.1f} kB down per "
            f"client and round (FedAvg of the teacher: {self.dense_bytes / KILOBYTE:.1f} kB each way), {total:.1f} MB "
            f"in {self.num_rounds} rounds of {self.num_clients} clients; measured on first updates of "
            f"{self.num_tried} clients"
        )
        if self.first_bytes:
            text += f"; a client's first reply has {self.first_bytes / KILOBYTE:.1f} kB more"
        if self.network is not None:
            up, down = self.framing_bytes
            seconds = self.network.seconds(self.uplink_bytes + up, "uplink")
            seconds += self.network.seconds(self.downlink_bytes + down, "downlink")
            text += f"; {seconds:.2g} s of transfer in each round over {self.network.describe()}"
            first = self.network.seconds(self.uplink_bytes + self.first_bytes + up, "uplink")  # nothing comes down yet
            longest = max(seconds, first)
            if self.network.round_deadline_s is not None and longest > self.network.round_deadline_s:
                text += f", which is beyond network.round_deadline_s, {self.network.round_deadline_s:g}"
        if self.fraction < 1:
            text += "; a client that sat out some rounds is sent what it missed besides"
        if self.broadcast_share is not None and self.broadcast_share > _DENSE_SHARE:
            text += (
                f"; the downlink is dense: what {self.aggregator} makes of the updates takes "
                f"{self.broadcast_share:.0%} of a float32 copy"
            )
        elif self.broadcast_share is not None and self.turns_dense:
            text += (
                f"; the downlink will become dense: {self.aggregator} gives every parameter a rate of its own, and "
                "such a step is of high rank"
            )
        return text


def forecast(experiment: Experiment) -> Forecast:
    """Train, encode and aggregate the first round of a few clients.

    Raises:
        ConfigError: if the experiment can't be built.
        ValueError: if a first update, or the aggregate, is not finite.
    """
    runtime = runtime_of(experiment)
    num_tried = min(experiment.num_sampled, max(_FEWEST_CLIENTS, experiment.server.aggregator.num_clients_needed))
    with task_identity():
        replies = {f"{client:05d}": _first_reply(runtime, client) for client in range(num_tried)}
        broadcast = _first_broadcast(runtime, replies)
        instruction = Instruction("0" * 16, 1, 1, 1, bytes(32), 0.0, 1, 0, (broadcast,) if broadcast else ())
        down = Message(instruction.to_records(), 1, TRAIN)
        ups = [Message(reply.to_records(), reply_to=down) for reply in replies.values()]
    share = None
    if broadcast is not None and runtime.wires is not None:
        share = len(broadcast) / (FLOAT_BYTES * num_elements(runtime.wires.downlink.spec))
    largest = max((traffic_of(up, "uplink") for up in ups), key=lambda traffic: traffic.wire_bytes)
    instructed = traffic_of(down, "downlink")
    return Forecast(
        uplink_bytes=largest.wire_bytes - runtime.algorithm.first_upload_bytes,
        first_bytes=runtime.algorithm.first_upload_bytes,
        downlink_bytes=instructed.wire_bytes,
        framing_bytes=(largest.framing_bytes, instructed.framing_bytes),
        broadcast_share=share,
        dense_bytes=FLOAT_BYTES * runtime.algorithm.num_teacher_parameters,
        aggregator=experiment.server.aggregator.name,
        turns_dense=isinstance(experiment.server.aggregator, AdaptiveAggregation),
        num_tried=num_tried,
        num_clients=experiment.num_sampled,
        num_rounds=experiment.num_rounds,
        fraction=experiment.num_sampled / experiment.num_clients,
        privacy=_privacy(experiment),
        network=experiment.network,
    )


def _privacy(experiment: Experiment) -> Mapping[str, Any] | None:
    if experiment.noise_facts is None:
        return None
    check_accounting(experiment)
    return PrivacyAccount(experiment.noise_facts).forecast(experiment.num_rounds, experiment.num_sampled)


def _first_reply(runtime: Runtime, client: int) -> Reply:
    half = runtime.algorithm.client
    data = runtime.task.client_data(client)
    seed = derive_seed(runtime.experiment.seed, "forecast", client)
    trained = half.train(runtime.initial, half.initial_private(data), data, _first_assignment(runtime, seed))
    scores = half.evaluate(runtime.initial, trained.private, data)
    reply = Reply(
        server_round=1,
        attempt=1,
        version=1,
        lineage=bytes(32),
        num_examples=len(data.train),
        num_test_examples=len(data.test),
        payload=_encoded(runtime, trained, seed),
        shared=scores.get("shared", {}),
        private=scores.get("private", {}),
        ensemble=scores.get("ensemble", {}),
        train=trained.metrics,
        seconds=dict.fromkeys(("evaluate", "client_train", "encode", "decode"), 0.0),
    )
    privacy = runtime.experiment.privacy
    return reply if privacy is None or privacy.share_metrics else reply.without_metrics()


def _first_assignment(runtime: Runtime, seed: int) -> Assignment:
    return Assignment.of_round(1, runtime.experiment.num_rounds, progress=0.0, seed=seed)


def _encoded(runtime: Runtime, trained: Trained, seed: int) -> bytes | None:
    if runtime.wires is None or trained.upload is None:
        return None
    uplink, privacy = runtime.wires.uplink, runtime.experiment.privacy
    upload = trained.upload if privacy is None else privatised(trained.upload, privacy)
    return uplink.encode(upload, uplink.initial_state(), progress=0.0, seed=seed)[0]


def _first_broadcast(runtime: Runtime, replies: dict[str, Reply]) -> bytes | None:
    if runtime.wires is None:
        return None
    downlink: Codec = runtime.wires.downlink
    merger = Merger(runtime.wires.uplink, aggregator_of(runtime), NormBound(None, "clip"))
    current = Round(1, 0.0, 0, runtime.lineage, accepted=dict(replies))
    merger.take(current, current.reject)
    seed = derive_seed(runtime.experiment.seed, "forecast")
    assignment = _first_assignment(runtime, seed)
    broadcast = runtime.algorithm.server.broadcast(merger.result(), runtime.initial, assignment)
    return downlink.encode(broadcast, downlink.initial_state(), progress=0.0, seed=seed)[0]
