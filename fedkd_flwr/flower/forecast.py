"""What a run will move, found out without running it.

`forecast` lets a few clients train their first rounds here: their updates are encoded, decoded, aggregated and encoded
again as they would be, and every message of a client is made and counted like a real one. Rounds that are not tried are
taken to be like the last that is; where payloads follow the energy of updates, those may still grow.
`expected` trains nothing: it goes by what the codec may send, so a run can say it before it starts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from flwr.app import Message

from fedkd_flwr.core.arrays import FLOAT_BYTES, num_elements
from fedkd_flwr.core.snapshot import snapshot_bytes
from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.budget import check_accounting
from fedkd_flwr.flower.carriage import MOST_INLINE_BYTES
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.records import EVALUATE, HELLO, TRAIN, Hello, HelloReply, Instruction, Reply
from fedkd_flwr.flower.reference import snapshot_arrays
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.traffic import Traffic, traffic_of
from fedkd_flwr.flower.trial import Trial
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.measure.privacy_account import PrivacyAccount
from fedkd_flwr.server_options import AdaptiveAggregation

KILOBYTE = 1e3
_FEWEST_CLIENTS = 3  # the mean of one update is as easy to encode as the update; that of several is what will travel
_MOST_EXAMPLES = 7_000  # that are trained on before the first rounds are called known
_DENSE_SHARE = 0.5  # of a dense copy: from here on a broadcast is called dense
_STAND_IN_BYTES = MOST_INLINE_BYTES + 1  # the shortest payload that travels as an array
_GROWS = 1.05  # times the payload of the round before: it has not come to rest
_CLIENT_KEY = "00000"
_SCORES = dict.fromkeys(("accuracy", "macro_f1", "loss"), 0.0)  # as many as a task has, about

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes expected of clients.

    Attributes:
        uplink_bytes: a client's reply, the mean over rounds, without what only the first has.
        first_bytes: what that has besides, see `Algorithm.first_upload_bytes`.
        downlink_bytes: its instruction with a broadcast, the mean over rounds.
        framing_bytes: of reply and instruction, which take time on a link, too.
        client_bytes: of one client over the whole run: greeting, instructions, replies, the scores at the end.
        grows: whether payloads were still growing in the last round that was tried.
        broadcast_share: the first broadcast's payload as a share of a dense float32 copy of what is exchanged; None
            where nothing is.
        dense_bytes: one float32 copy of the teacher's trainable parameters, for comparison.
        aggregator: that made the broadcast.
        turns_dense: whether its broadcasts are known to get larger as training goes on.
        num_tried: clients that were tried.
        num_rounds_tried: rounds that they were.
        num_clients: of the run.
        num_sampled: clients that train in a round.
        num_rounds: of the run.
        privacy: what a client will have disclosed at the end, as in the ledger; None where updates have no noise.
        network: links that the experiment names.
    """

    uplink_bytes: float
    first_bytes: int
    downlink_bytes: float
    framing_bytes: tuple[int, int]
    client_bytes: float
    grows: bool
    broadcast_share: float | None
    dense_bytes: int
    aggregator: str
    turns_dense: bool
    num_tried: int
    num_rounds_tried: int
    num_clients: int
    num_sampled: int
    num_rounds: int
    privacy: Mapping[str, Any] | None = None
    network: NetworkOptions | None = None

    def describe(self) -> str:
        """One line for a person."""
        tried = "the first round" if self.num_rounds_tried == 1 else f"the first {self.num_rounds_tried} rounds"
        text = (
            f"about {self.uplink_bytes / KILOBYTE:.1f} kB up and {self.downlink_bytes / KILOBYTE:.1f} kB down per "
            f"client and round (FedAvg of the teacher: {self.dense_bytes / KILOBYTE:.1f} kB each way), "
            f"{in_megabytes(self.client_bytes * self.num_clients)} in {self.num_rounds} rounds of "
            f"{self.num_sampled} clients, {in_megabytes(self.client_bytes)} for each client, with greetings and the "
            f"scores at the end; measured on {tried} of {self.num_tried} clients"
        )
        if self.grows:
            text += "; payloads still grew, later ones may be larger: compressor.bytes_per_round bounds them"
        if self.first_bytes:
            text += f"; a client's first reply has {self.first_bytes / KILOBYTE:.1f} kB more"
        return text + self._of_transfer() + self._of_broadcast()

    def _of_transfer(self) -> str:
        if self.network is None:
            return ""
        up, down = self.framing_bytes
        seconds = self.network.seconds(round(self.uplink_bytes) + up, "uplink")
        seconds += self.network.seconds(round(self.downlink_bytes) + down, "downlink")
        text = f"; {seconds:.2g} s of transfer in each round over {self.network.describe()}"
        # Nothing comes down yet in a first round.
        first = self.network.seconds(round(self.uplink_bytes) + self.first_bytes + up, "uplink")
        if self.network.round_deadline_s is not None and max(seconds, first) > self.network.round_deadline_s:
            text += f", which is beyond network.round_deadline_s, {self.network.round_deadline_s:g}"
        return text

    def _of_broadcast(self) -> str:
        text = ""
        if self.num_sampled < self.num_clients:
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


def forecast(experiment: Experiment, tell: Tell | None = None) -> Forecast:
    """Train, encode and aggregate the first rounds of a few clients.

    One round where the codec's bytes are known beforehand, else as many as little work allows.

    Args:
        experiment: whose bytes are wanted.
        tell: called with what is done now, in words.

    Raises:
        ConfigError: if the experiment can't be built.
        ValueError: if a first update, or the aggregate, is not finite.
    """
    runtime = runtime_of(experiment)
    trial = Trial(runtime, _clients_to_try(runtime))
    with task_identity():
        trial.run(_rounds_to_try(runtime, trial), tell or (lambda text: None))
        messages = _messages(runtime, trial.replies, trial.broadcasts)
    first_bytes = runtime.algorithm.first_upload_bytes
    share = None
    if trial.broadcasts[0] is not None and runtime.wires is not None:
        share = len(trial.broadcasts[0]) / (FLOAT_BYTES * num_elements(runtime.wires.downlink.spec))
    return Forecast(
        uplink_bytes=messages.mean_reply(),
        first_bytes=first_bytes,
        downlink_bytes=messages.mean_instruction(),
        framing_bytes=(messages.replies[0].framing_bytes, messages.instructions[0].framing_bytes),
        client_bytes=messages.of_client(),
        grows=trial.grows(_GROWS) and trial.num_rounds < experiment.num_rounds,
        broadcast_share=share,
        dense_bytes=FLOAT_BYTES * runtime.algorithm.num_teacher_parameters,
        aggregator=experiment.server.aggregator.name,
        turns_dense=isinstance(experiment.server.aggregator, AdaptiveAggregation),
        num_tried=len(trial.clients),
        num_rounds_tried=trial.num_rounds,
        num_clients=experiment.num_clients,
        num_sampled=experiment.num_sampled,
        num_rounds=experiment.num_rounds,
        privacy=_privacy(experiment),
        network=experiment.network,
    )


def expected(runtime: Runtime) -> str:
    """The bytes of a run in words, from what its codec may send: nothing is trained."""
    exact = runtime.wires is None or (runtime.algorithm.exchanges == "updates" and _size_is_known(runtime.experiment))
    up, down = _most_bytes(runtime)
    tells = runtime.experiment.privacy is None or runtime.experiment.privacy.share_metrics
    scores = _SCORES if tells else {}
    reply = Reply(
        *(1, 1, 1, bytes(32), 1, 1, _stand_in(runtime, up)),
        *(scores, scores, scores, {"train_loss": 0.0}, {"decode": 0.0}),
    )
    with task_identity():
        client_bytes = _messages(runtime, [[reply]], [_stand_in(runtime, down)]).with_payloads(up, down).of_client()
    words = "about" if exact else "at most about"
    more = "" if exact else "; fedkd check measures it on first rounds"
    total = in_megabytes(client_bytes * runtime.experiment.num_clients)
    return f"{words} {in_megabytes(client_bytes)} for each client, up and down, {total} in all{more}"


@dataclass(frozen=True, slots=True)
class _Messages:
    """Bytes of a client's messages.

    Attributes:
        greeting: question and answer together.
        plain: an instruction that brings no broadcast.
        instructions: that bring the broadcasts of the rounds tried, one each.
        replies: to train, the mean of the clients tried, one for each round tried.
        scores: the reply at the end.
        payloads: bytes of the broadcasts.
        snapshot: of a whole version, which is sent instead of broadcasts that are longer together.
        first_bytes: of the first reply's payload that later ones don't have.
        fraction: of the clients that train in a round.
        num_rounds: of the run.
    """

    greeting: int
    plain: int
    instructions: Sequence[Traffic]
    replies: Sequence[Traffic]
    scores: int
    payloads: Sequence[int]
    snapshot: int
    first_bytes: int
    fraction: float
    num_rounds: int

    def mean_reply(self) -> float:
        """Bytes of a reply, over all rounds."""
        return mean(self._over_rounds([reply.wire_bytes for reply in self.replies]))

    def mean_instruction(self) -> float:
        """Bytes of an instruction that brings the broadcast of one round, over all rounds."""
        return mean(self._over_rounds([instruction.wire_bytes for instruction in self.instructions]))

    def with_payloads(self, up: int, down: int) -> "_Messages":
        """The same with payloads of other lengths, where each of these was a `_stand_in`, or there were none."""
        more = [length - min(length, _STAND_IN_BYTES) for length in (up, down)]
        return replace(
            self,
            replies=[replace(reply, wire_bytes=reply.wire_bytes + more[0]) for reply in self.replies],
            instructions=[replace(each, wire_bytes=each.wire_bytes + more[1]) for each in self.instructions],
            payloads=[down] * len(self.payloads),
            first_bytes=0,
        )

    def of_client(self) -> float:
        """Bytes of one client over the run.

        Each broadcast comes down once, with the client's next instruction: those of a round, or that of the evaluation.
        """
        around = self.instructions[-1].wire_bytes - self.payloads[-1]
        asked = self.fraction * self.num_rounds
        bringing = asked if any(self.payloads) else 0.0  # all but the first, and the last one asks for scores
        down = sum(min(size, self.fraction * self.snapshot) for size in self._over_rounds(self.payloads))
        down += bringing * around + (asked + 1 - bringing) * self.plain
        up = self.fraction * self.num_rounds * self.mean_reply() + min(1.0, asked) * self.first_bytes
        return self.greeting + down + up + self.scores

    def _over_rounds(self, tried: Sequence[int]) -> list[int]:
        """A value for each round of the run: the last that was tried stands for those after it."""
        return [tried[min(number, len(tried) - 1)] for number in range(self.num_rounds)]


def _stand_in(runtime: Runtime, length: int) -> bytes | None:
    """A short payload that travels as one of this length does: even zeros, if they are many, take long to count."""
    return None if runtime.wires is None else bytes(min(length, _STAND_IN_BYTES))


def _most_bytes(runtime: Runtime) -> tuple[int, int]:
    """The longest payload up and down: what the user allows, or every number as float32."""
    if runtime.wires is None:
        return 0, 0
    dense_up, dense_down = (
        FLOAT_BYTES * num_elements(codec.spec) for codec in (runtime.wires.uplink, runtime.wires.downlink)
    )
    budget = getattr(runtime.experiment.compressor, "bytes_per_round", None)
    if budget is None or runtime.algorithm.exchanges != "updates":
        return dense_up, dense_down
    each = int(budget) // 2  # of one upload and one broadcast together
    return min(dense_up, each), min(dense_down, each)


def _messages(runtime: Runtime, replies: Sequence[Sequence[Reply]], broadcasts: Sequence[bytes | None]) -> _Messages:
    """The messages of one client, made as the run makes them, and counted.

    Args:
        runtime: the experiment.
        replies: of the clients tried, for each round tried.
        broadcasts: of these rounds.
    """
    experiment, first_bytes = runtime.experiment, runtime.algorithm.first_upload_bytes
    hello = Message(Hello("0" * 16, bytes(32), runtime.algorithm.foundations()).to_records(), 1, HELLO)
    answer = HelloReply(_CLIENT_KEY, 0, bytes(32), 1, 1, 0, 0, "nothing")
    greeting = traffic_of(hello, "downlink").wire_bytes
    greeting += traffic_of(Message(answer.to_records(), reply_to=hello), "uplink").wire_bytes
    down = [Message(_instruction(payload).to_records(), 1, TRAIN) for payload in broadcasts]
    of_replies: list[Traffic] = []
    for of_round in replies:
        counted = [traffic_of(Message(reply.to_records(), reply_to=down[0]), "uplink") for reply in of_round]
        wire = round(mean(traffic.wire_bytes for traffic in counted))
        of_replies.append(Traffic(wire - first_bytes * (not of_replies), counted[0].framing_bytes))
    last = replies[-1][0]
    scored = Reply(
        *(last.server_round, last.attempt, last.version, last.lineage, last.num_examples, last.num_test_examples),
        shared=last.shared,
        private=last.private,
        ensemble=last.ensemble,
        seconds={"decode": 0.0} if last.seconds else {},
    )
    shared = snapshot_arrays(runtime.initial, runtime.wires.downlink.initial_state() if runtime.wires else {})
    return _Messages(
        greeting,
        traffic_of(Message(_instruction(None).to_records(), 1, EVALUATE), "downlink").wire_bytes,
        [traffic_of(message, "downlink") for message in down],
        of_replies,
        traffic_of(Message(scored.to_records(), reply_to=down[0]), "uplink").wire_bytes,
        [len(payload or b"") for payload in broadcasts],
        snapshot_bytes(shared),
        first_bytes,
        experiment.num_sampled / experiment.num_clients,
        experiment.num_rounds,
    )


def _instruction(payload: bytes | None) -> Instruction:
    return Instruction("0" * 16, 1, 1, 1, bytes(32), 0.0, 0, 0, (payload,) if payload else ())


def _clients_to_try(runtime: Runtime) -> list[int]:
    """As few as an aggregate needs; more, up to all that train in a round, where sizes vary and it is little work."""
    experiment = runtime.experiment
    needed = min(experiment.num_sampled, max(_FEWEST_CLIENTS, experiment.server.aggregator.num_clients_needed))
    clients, examples = list(range(needed)), 0
    if _one_round_tells(runtime):
        return clients
    for client in range(experiment.num_sampled):
        examples += _num_passed(runtime, client)
        if client >= needed:
            if examples > _MOST_EXAMPLES:
                break
            clients.append(client)
    return clients


def _rounds_to_try(runtime: Runtime, trial: Trial) -> int:
    if _one_round_tells(runtime):
        return 1
    of_round = sum(_num_passed(runtime, client) for client in trial.clients)
    return min(runtime.experiment.num_rounds, max(1, _MOST_EXAMPLES // of_round))


def _num_passed(runtime: Runtime, client: int) -> int:
    """Examples that a client takes in a round, once for each epoch."""
    local = getattr(runtime.experiment.algorithm, "local", None)
    return len(runtime.task.client_data(client).train) * int(getattr(local, "num_epochs", 1))


def _one_round_tells(runtime: Runtime) -> bool:
    """Whether payloads of later rounds are as long as the first."""
    return runtime.algorithm.exchanges != "updates" or _size_is_known(runtime.experiment)


def _size_is_known(experiment: Experiment) -> bool:
    """Whether a codec of updates has a budget of bytes, or sends every number."""
    compressor = experiment.compressor
    return compressor.name == "identity" or getattr(compressor, "bytes_per_round", None) is not None


def _privacy(experiment: Experiment) -> Mapping[str, Any] | None:
    if experiment.noise_facts is None:
        return None
    check_accounting(experiment)
    return PrivacyAccount(experiment.noise_facts).forecast(experiment.num_rounds, experiment.num_sampled)


def in_megabytes(num_bytes: float) -> str:
    """With three digits, and a unit."""
    value = num_bytes / KILOBYTE**2
    return f"{value:.0f} MB" if value >= 100 else f"{value:.3g} MB"
