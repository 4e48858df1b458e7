"""A federation in which anything can go wrong, and what must hold afterwards."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

import client_app
from fedkd_flwr.algorithms import fedkd
from fedkd_flwr.compressors.identity import IdentityOptions
from fedkd_flwr.core.arrays import Arrays
from fedkd_flwr.core.modules import without_prefix
from fedkd_flwr.experiment import Experiment, parse
from fedkd_flwr.flower import reference as reference_module
from fedkd_flwr.flower import runtime
from fedkd_flwr.flower.carriage import carried
from fedkd_flwr.flower.checkpoint import Checkpoint, Checkpoints
from fedkd_flwr.flower.client_state import ClientState
from fedkd_flwr.flower.errors import StateError
from fedkd_flwr.flower.local_grid import LocalGrid, task_identity
from fedkd_flwr.flower.records import Instruction
from fedkd_flwr.flower.server import serve
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.flower.traffic import traffic_of
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from tests.integration.faults.points import FeedbackCodec, Points, parameters

EXPERIMENT = """
name: faults
seed: 3
num_clients: 4
num_rounds: 6
task: {name: digits}
algorithm:
  name: fedkd
  hidden: false
  attention: false
  local: {num_epochs: 2, batch_size: 8}
  student_optimizer: {name: sgd, learning_rate: 0.1, momentum: 0.9}
compressor: {name: identity}
server: {round_timeout_seconds: 0.4, connect_timeout_seconds: 2}
"""
ALL_OF_4: tuple[str, ...] = ()
SIX_OF_20 = ("num_clients=20", "num_rounds=7", "server.fraction_train=0.3")

Call = Callable[[], Message]


def experiment_of(*overrides: str) -> Experiment:
    return parse(EXPERIMENT, overrides)


@contextmanager
def small_world(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points instead of digits, feedback instead of identity."""
    runtime._built.cache_clear()
    patch.setattr(Experiment, "build_task", lambda self, _: Points(self.num_clients, self.seed))
    patch.setattr(IdentityOptions, "build", lambda self, spec: FeedbackCodec(spec))
    yield
    runtime._built.cache_clear()


@dataclass
class World:
    """One run, what is done to it, and what was seen of it.

    Attributes:
        run_dir: of the run.
        experiment: what is run.
        act: wraps the client app for the messages of victims: called with world, message, context, and a call that lets
            the client work.
        on_round: called before the messages of a round are sent, when its clients are chosen already.
        after_round: called between a round and the next.
        on_reply: what becomes of a reply on its way: any number of replies.
        on_hello: what every client does with a hello.
        rounds: in which there is a victim, the first client by name.
        nodes: how many are there at first; all clients by default.
        authenticated: nodes are registered, each with a key of its own, which it keeps for as long as its id.
        everyone: in those rounds every client is a victim.
        force: resume even with another number of rounds.
    """

    run_dir: Path
    experiment: Experiment
    act: Callable[["World", Message, Context, Call], Message] | None = None
    on_round: Callable[["World", int], None] | None = None
    after_round: Callable[["World", int], None] | None = None
    on_reply: Callable[["World", Message, Message], Iterable[Message]] | None = None
    on_hello: Callable[["World", Message, Context, Call], Message] | None = None
    rounds: tuple[int, ...] = (2, 4)
    nodes: int = 0
    authenticated: bool = False
    everyone: bool = False
    force: bool = False
    # what was seen
    victims: dict[int, int] = field(default_factory=dict)  # round -> node id
    trained: dict[tuple[str, int], Arrays] = field(default_factory=dict)  # (client, round) -> upload of the last reply
    replies: dict[tuple[str, int], bytes] = field(default_factory=dict)  # (client, round) -> its payload
    given: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    broadcasts: list[Arrays] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)  # for a fault's own use

    @property
    def grid(self) -> "FaultyGrid":
        grid: FaultyGrid = self.memory["grid"]
        return grid

    @property
    def state_dir(self) -> Path:
        return self.run_dir / "state"

    def run(self, *, resume: bool = False) -> "World":
        """Run it to its end."""
        with task_identity(), pytest.MonkeyPatch.context() as patch:
            self._listen(patch)
            grid = FaultyGrid(self)
            self.memory["grid"] = grid
            serve(grid, ServerSettings(self.experiment, self.run_dir, resume, self.force))
        return self

    def _listen(self, patch: pytest.MonkeyPatch) -> None:
        """Record what clients train and what the server broadcasts, without touching either."""
        train, advance = fedkd.FedKDClient.train, reference_module.Reference.advance

        def recorded_train(client: Any, *arguments: Any) -> Any:
            trained = train(client, *arguments)
            self.memory["upload"] = trained.upload
            return trained

        def recorded_advance(reference: Any, broadcast: Arrays, **options: Any) -> int:
            size = advance(reference, broadcast, **options)
            self.broadcasts.append(parameters(broadcast))
            return size

        patch.setattr(fedkd.FedKDClient, "train", recorded_train)
        patch.setattr(reference_module.Reference, "advance", recorded_advance)

    # What clients do

    def client(self, message: Message, context: Context) -> Message:
        """The client app with the fault in it."""
        kind = message.metadata.message_type
        if kind == "query.hello" and self.on_hello is not None:
            return self.on_hello(self, message, context, lambda: client_app.app(message, context))
        if kind != "train":
            return client_app.app(message, context)
        instruction = Instruction.from_records(message.content)
        hit = self.victims.get(instruction.server_round)
        if self.act is None or hit is None or (hit != context.node_id and not self.everyone):
            return self._work(message, context, instruction)
        self.memory["struck"] = self.memory.get("struck", 0) + 1
        return self.act(self, message, context, lambda: self._work(message, context, instruction))

    def _work(self, message: Message, context: Context, instruction: Instruction) -> Message:
        key = f"{context.node_config['partition-id']:05d}"
        self.memory.pop("upload", None)
        reply = client_app.app(message, context)
        upload = self.memory.pop("upload", None)
        if upload is not None:  # else the reply came from the disk
            self.trained[key, instruction.server_round] = parameters(upload)
            self.replies[key, instruction.server_round] = carried(reply.content) or b""
        return reply

    # What is left behind

    def rows(self, kind: str) -> list[Row]:
        return [row for row in read_rows(self.run_dir / LEDGER_FILE) if row["kind"] == kind]

    def rejected(self) -> list[Row]:
        return [
            item | {"round": row["round"]}
            for row in [*self.rows("round"), *self.rows("final")]
            for item in row["rejected"]
        ]

    def checkpoint(self) -> Checkpoint:
        found = Checkpoints(self.run_dir, 1).latest()
        assert found is not None
        return found

    def states(self) -> dict[str, ClientState]:
        training = self.state_dir / self.rows("start")[0]["training_id"]
        keys = sorted(path.name for path in training.iterdir() if path.name != "references")
        states = {}
        for key in keys:
            with suppress(StateError):  # one that is not ours to read
                if (state := ClientStore(self.state_dir, training.name, key).load()) is not None:
                    states[key] = state
        return states

    def key_of_victim(self, number: int) -> str:
        return f"{self.grid._contexts[self.victims[number]].node_config['partition-id']:05d}"

    # What must hold

    def check(self, *, absent: Iterable[str] = (), begun_again: Iterable[str] = (), never_twice: bool = False) -> None:
        """Everything that no fault may break.

        Args:
            absent: clients that the fault keeps out for good.
            begun_again: clients whose codec state was lost, so that what was pending for them is gone.
            never_twice: whether clients kept all that they were sent, so that nothing may be sent again at all.
        """
        self._same_student(set(absent))
        self._every_update_counted_once(set(begun_again))
        self._nothing_lost_on_the_way_down()
        self._nothing_sent_twice(never_twice)
        self._every_byte_booked()

    def _same_student(self, absent: set[str]) -> None:
        reference = self.checkpoint().parts["reference"]
        shared = without_prefix("shared/", reference.arrays)
        lineages = reference.facts["lineages"]
        taught = {row["node"] for row in self.rows("message") if row["purpose"] == "train"} - absent
        states = self.states()
        assert taught <= states.keys()
        for key, state in states.items():
            assert state.lineage.hex() == lineages[state.version], key
            if key not in absent:
                assert state.version == len(lineages) - 1, key
                assert state.shared.keys() == shared.keys()
                assert all(state.shared[name].tobytes() == shared[name].tobytes() for name in shared), key

    def _every_update_counted_once(self, begun_again: set[str]) -> None:
        """Sum of decoded updates that counted + committed residual = sum of trained updates that counted."""
        counted: dict[str, list[int]] = defaultdict(list)
        for row in self.rows("round"):
            if not row["skipped"] and row["round"]:
                for key in row["clients"]:
                    counted[key].append(row["round"])
        built = runtime.runtime_of(self.experiment)
        assert built.wires is not None
        for key, state in self.states().items():
            if key in begun_again or not isinstance(built.wires.uplink, FeedbackCodec):
                continue
            decoded = {name: np.zeros(value.shape) for name, value in parameters(built.initial).items()}
            trained = {name: np.zeros(value.shape) for name, value in parameters(built.initial).items()}
            for position, number in enumerate(counted[key]):
                update, _ = built.wires.uplink.decode(self.replies[key, number], {"count": np.array(position)})
                for name in decoded:
                    decoded[name] += update[name]
                    trained[name] += self.trained[key, number][name]
            residual = without_prefix("residual/", state.committed)
            assert int(state.committed["count"]) == len(counted[key]), key
            for name in decoded:
                assert np.allclose(decoded[name] + residual[name], trained[name], atol=1e-5), (key, name)

    def _nothing_lost_on_the_way_down(self) -> None:
        """Sum of applied updates + the server's residual = sum of what the aggregator gave."""
        built = runtime.runtime_of(self.experiment)
        reference = self.checkpoint().parts["reference"]
        residual = without_prefix("encoder/residual/", reference.arrays)
        if not residual:
            return
        assert len(self.broadcasts) == len(reference.facts["lineages"]) - 1
        for name, first in parameters(built.initial).items():
            applied = reference.arrays[f"shared/{name}"].astype(np.float64) - first
            given = sum((update[name].astype(np.float64) for update in self.broadcasts), np.zeros(first.shape))
            assert np.allclose(applied + residual[name], given, atol=1e-5), name

    def _nothing_sent_twice(self, never: bool) -> None:
        """A version goes to a client again only after a failure since it went there first."""
        failed = defaultdict(set)
        for item in self.rejected():
            failed[item["client"]].add(item["round"])
        for key, given in self.given.items():
            sent: dict[int, int] = {}  # version -> round in which it was sent last
            for number, attempt, first, last in given:
                for version in range(first, last + 1):
                    before = sent.get(version)
                    if before is not None:
                        failures = failed[key] & ({*range(before, number)} | ({number} if attempt > 1 else set()))
                        assert failures and not never, (key, version, number)
                    sent[version] = number

    def _every_byte_booked(self) -> None:
        booked = {"downlink": 0, "uplink": 0}
        for row in self.rows("message"):
            booked[row["direction"]] += row["wire_bytes"]
        assert booked == self.memory["bytes"]


class FaultyGrid(LocalGrid):
    """A grid whose nodes come and go, and whose replies get lost, late, doubled or changed."""

    def __init__(self, world: World) -> None:
        experiment = world.experiment
        run_config = {"config-text": experiment.to_yaml(), "state-dir": str(world.state_dir)}
        nodes = [{"partition-id": client} for client in range(world.nodes or experiment.num_clients)]
        super().__init__(world.client, nodes, run_config)
        self._world = world
        self._run_config = run_config
        self._next_id = max(self._contexts, default=999) + 1
        self._sent: dict[str, Message] = {}
        self._delayed: list[tuple[int, Message]] = []
        self.round = 0
        self._ended: set[int] = set()
        world.memory.setdefault("bytes", {"downlink": 0, "uplink": 0})

    def get_node_ids(self) -> Iterable[int]:
        if self.round and self.round not in self._ended and self._world.after_round:
            self._ended.add(self.round)
            self._world.after_round(self._world, self.round)
        return super().get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        nodes = list(super().get_nodes())
        if self._world.authenticated:
            for node in nodes:
                node.public_key, node.name = f"key {node.node_id}".encode(), f"registered {node.node_id}"
        return nodes

    def add_node(self, partition_id: int, *, node_id: int | None = None, **node_config: str) -> int:
        """A node that is there from now on; one that was there before has the id it had."""
        node_id = node_id or self._next_id
        self._next_id = max(self._next_id, node_id + 1)
        config: dict[str, Any] = {"partition-id": partition_id, **node_config}
        self._contexts[node_id] = Context(1, node_id, config, RecordDict(), dict(self._run_config))
        return node_id

    def remove_node(self, node_id: int) -> None:
        """The node is gone, and with it whatever it was asked."""
        del self._contexts[node_id]

    def delay(self, reply: Message, until_round: int) -> None:
        """Deliver a reply when that round has begun."""
        self._delayed.append((until_round, reply))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        world = self._world
        training = [message for message in kept if message.metadata.message_type == "train"]
        if training:
            number = Instruction.from_records(training[0].content).server_round
            if number != self.round:
                self.round = number
                if number in world.rounds:
                    world.victims[number] = training[0].metadata.dst_node_id
                if world.on_round:
                    world.on_round(world, number)
        ids = list(super().push_messages(kept))
        for message, message_id in zip(kept, ids, strict=True):
            if message_id:
                self._sent[message_id] = message
                world.memory["bytes"]["downlink"] += traffic_of(message, "downlink").wire_bytes
                self._note(message)
        return ids

    def _note(self, message: Message) -> None:
        if message.metadata.message_type == "query.hello":
            return
        instruction = Instruction.from_records(message.content)
        context = self._contexts[message.metadata.dst_node_id]
        key = f"{context.node_config['partition-id']:05d}"
        first = instruction.base_version + 1 if instruction.payloads else instruction.version
        if instruction.payloads or instruction.snapshot is not None:
            given = (instruction.server_round, instruction.attempt, first, instruction.version)
            self._world.given[key].append(given)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        wanted = set(message_ids)
        due = [r for number, r in self._delayed if number <= self.round and r.metadata.reply_to_message_id in wanted]
        self._delayed = [(number, reply) for number, reply in self._delayed if reply not in due]
        arrived = list(due)
        gone = {i for i in wanted if i in self._sent and self._sent[i].metadata.dst_node_id not in self._contexts}
        for reply in super().pull_messages(wanted - gone):
            asked = self._sent[reply.metadata.reply_to_message_id]
            victim = self._world.victims.get(self.round) == asked.metadata.dst_node_id
            changed = self._world.on_reply and victim and asked.metadata.message_type == "train"
            arrived += self._world.on_reply(self._world, asked, reply) if changed and self._world.on_reply else [reply]
        answered: set[str] = set()
        for reply in arrived:
            message_id = reply.metadata.reply_to_message_id
            if message_id in wanted and message_id not in answered:
                answered.add(message_id)
                self._world.memory["bytes"]["uplink"] += traffic_of(reply, "uplink").wire_bytes
            yield reply
