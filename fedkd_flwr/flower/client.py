"""The client's end of the exchange: reach the version asked for, train, remember, reply."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from flwr.app import Context, Message

from fedkd_flwr.algorithms.base import Assignment, Metrics
from fedkd_flwr.core.arrays import require_finite
from fedkd_flwr.core.modules import without_prefix
from fedkd_flwr.core.protocols import ClientData
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.core.snapshot import unpack_snapshot
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.client_state import UNKNOWN_VERSION, ClientState, LastReply
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.guard import unplaced
from fedkd_flwr.flower.lineage import next_lineage
from fedkd_flwr.flower.records import Hello, HelloReply, Instruction, Reply
from fedkd_flwr.flower.reference import DECODER, SHARED, snapshot_arrays
from fedkd_flwr.flower.replies import reason_of
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.settings import ClientSettings, client_settings
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.privacy import PrivacyOptions, privatised

PRIVATE_MODEL_DIR = "private_model"
_SHOWN_DIGITS = 12  # of a digest, in a message for people

_log = logging.getLogger("fedkd")


@dataclass(frozen=True, slots=True)
class Client:
    """One client: its experiment, its name, its data."""

    settings: ClientSettings
    runtime: Runtime
    data: ClientData

    @property
    def privacy(self) -> PrivacyOptions | None:
        """What is done to its update before it leaves; None: nothing."""
        return self.settings.experiment.privacy

    @property
    def tells_metrics(self) -> bool:
        """Whether scores and numbers of examples leave this client."""
        return self.privacy is None or self.privacy.share_metrics

    def num_examples(self) -> tuple[int, int]:
        """Of training and of test, as others are told: one each where that is kept."""
        return (len(self.data.train), len(self.data.test)) if self.tells_metrics else (1, 1)

    def store(self, training_id: str) -> ClientStore:
        """Where this client remembers a training."""
        settings = self.settings
        return ClientStore(settings.state_dir, training_id, settings.client_key, settings.retention)

    def fresh_state(self) -> ClientState:
        """The state before the first round."""
        wires = self.runtime.wires
        uplink = wires.uplink.initial_state() if wires else {}
        return ClientState(
            version=0,
            lineage=self.runtime.lineage,
            shared=self.runtime.initial,
            private=self.runtime.algorithm.client.initial_private(self.data),
            committed=uplink,
            pending=uplink,
            downlink=wires.downlink.initial_state() if wires else {},
        )


def client_of(context: Context, app_dir: Path) -> Client:
    """The client that a node is.

    Raises:
        ConfigError: if the node's configuration and the experiment don't fit.
    """
    settings = client_settings(context.run_config, context.node_config, app_dir)
    with _of_node(settings.data_path):
        runtime = runtime_of(settings.experiment, settings.data_path)
        return Client(settings, runtime, runtime.task.client_data(settings.partition_id))


@contextmanager
def _of_node(data_path: Path | None) -> Iterator[None]:
    """Say of an error that it is of the node's own data, where it has some."""
    try:
        yield
    except Exception as error:
        if data_path is None:
            raise
        raise ConfigError(f"data-path: {reason_of(error)}") from error


def hello(message: Message, context: Context, app_dir: Path) -> Message:
    """Say who this is and which version it holds; whether it could build version 0 as the server did.

    Raises:
        NodeError: as `train` and `evaluate` do, where something went wrong; no reason names a place on this node.
    """
    with unplaced(context):
        return _hello(message, context, app_dir)


def _hello(message: Message, context: Context, app_dir: Path) -> Message:
    asked = Hello.from_records(message.content)
    client = client_of(context, app_dir)
    _require_foundations(asked.foundations, client.runtime.algorithm.foundations())
    state = client.store(asked.training_id).load()
    lineage = state.lineage if state else client.runtime.lineage
    version: int | None = state.version if state else 0
    lost = state is not None and state.version == UNKNOWN_VERSION
    if lost or (state is None and asked.initial_digest != client.runtime.lineage):
        version = None
    reply = HelloReply(
        client.settings.client_key,
        version,
        lineage,
        *client.num_examples(),
        committed_round=state.committed_round if state else 0,
        replied_round=state.replied_round if state else 0,
        memory="nothing" if state is None else "private" if lost else "all",
    )
    return Message(reply.to_records(), reply_to=message)


def _require_foundations(wanted: Mapping[str, bytes], found: Mapping[str, bytes]) -> None:
    """Raise ConfigError if this node builds on something else than the server, which no message could put right."""
    for name in sorted({*wanted, *found}):
        here, there = (digests.get(name, b"").hex()[:_SHOWN_DIGITS] or "none" for digests in (found, wanted))
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"the {name} must be the same on all nodes: digest {here} here, {there} on the server; "
                "give every node the same files, and the same versions of the libraries that read them"
            )


def train(message: Message, context: Context, app_dir: Path) -> Message:
    """One round: catch up, score what was received, train, encode, commit to disk, reply; see `hello` for errors."""
    with unplaced(context):
        return _train(message, context, app_dir)


def _train(message: Message, context: Context, app_dir: Path) -> Message:
    client = client_of(context, app_dir)
    instruction = Instruction.from_records(message.content, client.runtime.limits)
    store = client.store(instruction.training_id)
    state = store.load() or client.fresh_state()
    last = state.last_reply
    if last and (last.server_round, last.lineage) == (instruction.server_round, instruction.lineage):
        return Message(_again(last, instruction).to_records(), reply_to=message)

    started = perf_counter()
    state = catch_up(client.runtime, _settled(client, state, instruction), instruction)
    decoded = perf_counter()
    reply, state = _learn(client, state, instruction)
    reply = _told(client, replace(reply, seconds={**reply.seconds, "decode": decoded - started}))
    numbers = {name: getattr(reply, name) for name in _REMEMBERED}
    last = LastReply(instruction.server_round, instruction.lineage, reply.payload, numbers)
    store.commit(replace(state, last_reply=last))
    return Message(reply.to_records(), reply_to=message)


def evaluate(message: Message, context: Context, app_dir: Path) -> Message:
    """Catch up, score on the client's own test examples, export what it predicts with; see `hello` for errors."""
    with unplaced(context):
        return _evaluate(message, context, app_dir)


def _evaluate(message: Message, context: Context, app_dir: Path) -> Message:
    client = client_of(context, app_dir)
    instruction = Instruction.from_records(message.content, client.runtime.limits)
    store = client.store(instruction.training_id)
    started = perf_counter()
    state = catch_up(client.runtime, _settled(client, store.load() or client.fresh_state(), instruction), instruction)
    seconds = {"decode": perf_counter() - started}
    state = store.commit(state)
    half = client.runtime.algorithm.client
    scores = _scores(client, state)
    store.export(
        PRIVATE_MODEL_DIR,
        {**state.shared, **state.private},
        lambda directory: half.export_private(state.shared, state.private, client.data, directory),
    )
    reply = _told(client, replace(_scored(client, state, instruction, scores), seconds=seconds))
    return Message(reply.to_records(), reply_to=message)


def catch_up(runtime: Runtime, state: ClientState, instruction: Instruction) -> ClientState:
    """The state at the instruction's version: payloads it has are skipped, none is applied twice.

    Raises:
        StateError: if the version can't be reached from here by what was sent.
        PayloadError, SnapshotError: if what was sent can't be read.
    """
    wires = runtime.wires
    if instruction.snapshot is not None:
        template = snapshot_arrays(runtime.initial, wires.downlink.initial_state() if wires else {})
        arrays = unpack_snapshot(instruction.snapshot, template)
        return replace(
            state,
            shared=without_prefix(SHARED, arrays),
            downlink=without_prefix(DECODER, arrays),
            version=instruction.version,
            lineage=instruction.lineage,
        )
    missing = instruction.version - state.version
    if state.version == UNKNOWN_VERSION or not 0 <= missing <= len(instruction.payloads):
        raise StateError(
            f"holds version {state.version}, can't reach {instruction.version} from {instruction.base_version}"
        )
    for payload in instruction.payloads[len(instruction.payloads) - missing :]:
        if wires is None:
            raise StateError("was sent a payload by an algorithm that exchanges nothing")
        update, downlink = wires.downlink.decode(payload, state.downlink)
        state = replace(
            state,
            shared=runtime.algorithm.shared.apply(state.shared, update),
            downlink=downlink,
            version=state.version + 1,
            lineage=next_lineage(state.lineage, payload),
        )
    try:
        require_finite(state.shared)
    except ValueError as error:
        raise StateError(f"was sent payloads that lead nowhere: {error}") from error
    if state.lineage != instruction.lineage:
        raise StateError(f"holds another version {state.version} than the server: their updates differ")
    return state


_REMEMBERED = ("num_examples", "num_test_examples", "shared", "private", "ensemble", "train", "seconds")


def _learn(client: Client, state: ClientState, instruction: Instruction) -> tuple[Reply, ClientState]:
    settings, runtime = client.settings, client.runtime
    arrived = perf_counter()
    scores = _scores(client, state)
    seed = derive_seed(settings.experiment.seed, "client", instruction.server_round, settings.client_key)
    assignment = Assignment.of_round(
        instruction.server_round,
        settings.experiment.num_rounds,
        progress=instruction.progress,
        seed=seed,
        counted_round=instruction.counted_round,
    )
    started = perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout and the like draw from torch's global source
        trained = runtime.algorithm.client.train(state.shared, state.private, client.data, assignment)
    after_training = perf_counter()
    payload: bytes | None = None
    pending = state.committed
    if trained.upload is not None and runtime.wires is not None:
        upload = trained.upload if client.privacy is None else privatised(trained.upload, client.privacy)
        payload, pending = runtime.wires.uplink.encode(
            upload, state.committed, progress=instruction.progress, seed=derive_seed(seed, "encode")
        )
    reply = replace(
        _scored(client, state, instruction, scores),
        payload=payload,
        train=trained.metrics,
        seconds={
            "evaluate": started - arrived,
            "client_train": after_training - started,
            "encode": perf_counter() - after_training,
        },
    )
    return reply, replace(state, private=trained.private, pending=pending)


def _scores(client: Client, state: ClientState) -> dict[str, Metrics]:
    """What the client's models are worth on its own test examples; nothing where nobody would be told."""
    half = client.runtime.algorithm.client
    return half.evaluate(state.shared, state.private, client.data) if client.tells_metrics else {}


def _told(client: Client, reply: Reply) -> Reply:
    """The reply as it may leave: under privacy without all that follows from the data and has no noise.

    A value out of its range, such as the loss of a model that has diverged, is left out: it would cost the whole reply.
    """
    if not client.tells_metrics:
        return reply.without_metrics()
    told = reply.within(client.runtime.limits)
    if told != reply:
        _log.warning("client %s: scores that are out of their ranges are not reported", client.settings.client_key)
    return told


def _settled(client: Client, state: ClientState, instruction: Instruction) -> ClientState:
    wires = client.runtime.wires
    return state.settle(instruction.counted_round, wires.uplink.initial_state() if wires else {})


def _scored(client: Client, state: ClientState, instruction: Instruction, scores: Mapping[str, Metrics]) -> Reply:
    """A reply with everything but the training's own results."""
    return Reply(
        server_round=instruction.server_round,
        attempt=instruction.attempt,
        version=state.version,
        lineage=state.lineage,
        num_examples=len(client.data.train),
        num_test_examples=len(client.data.test),
        shared=scores.get("shared", {}),
        private=scores.get("private", {}),
        ensemble=scores.get("ensemble", {}),
    )


def _again(last: LastReply, instruction: Instruction) -> Reply:
    """The reply that was given already, to the same work asked for once more."""
    return Reply(
        server_round=instruction.server_round,
        attempt=instruction.attempt,
        version=instruction.version,
        lineage=last.lineage,
        payload=last.payload,
        **last.numbers,
    )
