"""The exchange: a Flower Strategy that owns its round loop.

Each round: ask unknown nodes who they are, choose clients, bring them to the current version and let them train, decode
their uploads one at a time in the order of their names, aggregate, encode the broadcast, and apply to the server's own
copy exactly what clients will decode. `Strategy.start` has no place for skipped rounds or for a run that fails when
every client does, so it is replaced here.
"""

import logging
import random
import re
from collections.abc import Callable, Iterable
from time import monotonic, perf_counter, sleep
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.core.arrays import Arrays, RunningMean
from fedkd_flwr.core.protocols import Codec, Examples
from fedkd_flwr.core.schedules import progress_of
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower.aggregators import AGGREGATORS
from fedkd_flwr.flower.errors import MessageError, RunError
from fedkd_flwr.flower.mailbox import Mailbox
from fedkd_flwr.flower.records import EVALUATE, HELLO, TRAIN, Hello, HelloReply, Instruction, Reply
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.roster import Roster, Seat
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.measure.ledger import Ledger
from fedkd_flwr.measure.metrics import weighted_scores

_TTL_MARGIN_SECONDS = 60.0
_FIRST_CONNECT_PAUSE_SECONDS = 0.1
_LONGEST_CONNECT_PAUSE_SECONDS = 2.0
_SERVER = "server"
_HELLO = "hello"
_ATTEMPT = 1  # a round is not tried twice

_log = logging.getLogger("fedkd")


class Exchange(Strategy):
    """Moves what an algorithm exchanges between server and clients, and keeps them at the same version.

    Args:
        runtime: the experiment.
        ledger: where everything is written down.
        training_id: names this training on every client's disk.
    """

    def __init__(self, runtime: Runtime, ledger: Ledger, training_id: str) -> None:
        wires = runtime.wires
        self._runtime = runtime
        self._num_rounds = runtime.experiment.num_rounds
        self._seed = runtime.experiment.seed
        self._options = runtime.experiment.server
        self._ledger = ledger
        self._training_id = training_id
        self._test_data: Examples = runtime.task.test_data()
        self._uplink = wires.uplink if wires else None
        self._uplink_states: dict[str, Arrays] = {}
        self._aggregator = AGGREGATORS[self._options.aggregator.name](self._options.aggregator)
        self._roster = Roster()
        self._mailbox = Mailbox(ledger)
        self._asked: dict[str, str] = {}  # message id -> client key, of the replies in hand
        self._buffers = RunningMean()
        self._num_good_rounds = 0
        self._first_failure = ""
        self.reference = Reference(
            runtime.algorithm.shared, wires.downlink if wires else None, runtime.initial, runtime.lineage
        )
        self._round = self._new_round(0)

    def summary(self) -> None:
        """Log what this strategy moves."""
        exchanges, compressor = self._runtime.algorithm.exchanges, self._runtime.experiment.compressor.name
        _log.info("%s: exchanges %s through %s", self._runtime.experiment.name, exchanges, compressor)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the whole training. Only `grid` is used: the experiment says the rest, the ledger has the results.

        Raises:
            RunError: if too few clients connect, or no round had enough good replies.
        """
        self.summary()
        self._connect(grid)
        self._write_row("round", version=0, skipped=False, payload_bytes=0)
        for number in range(1, self._num_rounds + 1):
            messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            self.aggregate_train(number, self._send(grid, messages, TRAIN))
        if self._num_good_rounds == 0:
            raise RunError(f"no round had {self._needed()} good replies{self._because()}")
        final = self._num_rounds + 1
        messages = self.configure_evaluate(final, ArrayRecord(), ConfigRecord(), grid)
        self.aggregate_evaluate(final, self._send(grid, messages, EVALUATE))
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Choose this round's clients and write to each what it needs."""
        self._round = self._new_round(server_round)
        self._wait_for_clients(grid, self._needed())
        return self._instruct(self._sample(self._available(grid)), TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate, decode, aggregate, advance; or skip the round where good replies are too few."""
        current = self._round
        self._accept(replies)
        num_counted = len(current.accepted)
        if self._uplink is not None and num_counted >= self._needed():
            decoder_states = self._decode_and_aggregate(self._uplink)
            num_counted = len(decoder_states)
            if num_counted >= self._needed() and not self._advance(decoder_states):
                num_counted = 0
        skipped = num_counted < self._needed()
        self._num_good_rounds += not skipped
        if skipped:
            _log.warning("round %d skipped: %d good replies", current.number, num_counted)
        version, payload_bytes = self.reference.version, current.payload_bytes
        self._write_row("round", version=version, skipped=skipped, payload_bytes=payload_bytes)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Bring every client to the last version and let it score."""
        self._round = self._new_round(server_round)
        self._wait_for_clients(grid, self._needed())
        return self._instruct(self._available(grid), EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Write the final scores down."""
        self._accept(replies)
        self._write_row("final", version=self.reference.version)
        return None

    # Who is there

    def _connect(self, grid: Grid) -> None:
        wanted = self._runtime.experiment.num_clients
        connected = self._wait_for_clients(grid, wanted)
        if connected < wanted:
            raise RunError(
                f"num_clients: {wanted} clients wanted, {connected} connected within "
                f"{self._options.connect_timeout_seconds:g} s{self._because()}; start as many SuperNodes (in "
                f"simulation: --federation-config 'num-supernodes={wanted}'), or lower num_clients"
            )

    def _wait_for_clients(self, grid: Grid, wanted: int) -> int:
        """Greet nodes until so many clients are free to work, or the patience for connecting is over; how many are."""
        deadline = monotonic() + self._options.connect_timeout_seconds
        pause = _FIRST_CONNECT_PAUSE_SECONDS
        while True:
            self._greet(grid)
            connected = len(self._available(grid))
            if connected >= wanted or monotonic() >= deadline:
                return connected
            sleep(min(pause, max(0.0, deadline - monotonic())))
            pause = min(2 * pause, _LONGEST_CONNECT_PAUSE_SECONDS)

    def _greet(self, grid: Grid) -> None:
        """Ask every unknown node who it is and what it holds; collect what came late."""
        live = set(grid.get_node_ids())
        for asked, message in self._mailbox.collect_late(grid):
            if asked.purpose == _HELLO:
                self._admit(asked.node_id, message, live)
            else:
                self._round.reject(asked.client_key, f"late: its reply to round {asked.server_round} came after it")
        unknown = [node_id for node_id in self._roster.unknown(live) if node_id not in self._mailbox.busy_nodes()]
        if not unknown:
            return
        hello = Hello(self._training_id, self._runtime.lineage)
        messages = [Message(hello.to_records(), node_id, HELLO, ttl=self._ttl()) for node_id in unknown]
        patience = self._options.connect_timeout_seconds
        post = self._mailbox.exchange(grid, messages, {}, _HELLO, self._round.number, patience)
        for node_id, message in post.replies:
            self._admit(node_id, message, live)

    def _admit(self, node_id: int, message: Message, live: set[int]) -> None:
        try:
            reply = HelloReply.from_records(_content(message).content)
        except Exception as error:  # whatever a stranger sends, the others go on
            self._first_failure = self._first_failure or _reason(error)
            _log.warning("node %d did not say who it is: %s", node_id, _reason(error))
            return
        held = self.reference.version_of(reply.version, reply.lineage)
        if not self._roster.admit(node_id, reply, held, live):
            self._first_failure = self._first_failure or f"two live nodes are client {reply.client_key!r}"
            _log.warning("node %d refused: another live node is client %r", node_id, reply.client_key)
        elif self._roster.counted_round(reply.client_key) == 0:
            self._uplink_states.pop(reply.client_key, None)  # its encoder begins again, and so does our decoder

    def _available(self, grid: Grid) -> list[Seat]:
        busy = self._mailbox.busy_nodes()
        return [seat for seat in self._roster.available(grid.get_node_ids()) if seat.node_id not in busy]

    def _sample(self, seats: list[Seat]) -> list[Seat]:
        wanted = self._runtime.experiment.num_sampled
        if wanted >= len(seats):
            return seats
        rng = random.Random(derive_seed(self._seed, "sample", self._round.number))
        return sorted(rng.sample(seats, wanted), key=lambda seat: seat.client_key)

    # Messages

    def _new_round(self, number: int) -> Round:
        progress = progress_of(min(max(number, 1), self._num_rounds), self._num_rounds)
        return Round(number, progress, self.reference.version, self.reference.lineage)

    def _instruct(self, seats: list[Seat], purpose: str) -> list[Message]:
        current = self._round
        current.seats = {seat.node_id: seat for seat in seats}
        messages = []
        for seat in seats:
            delivery = self.reference.delivery(seat.version)
            instruction = Instruction(
                training_id=self._training_id,
                server_round=current.number,
                attempt=_ATTEMPT,
                version=current.version,
                lineage=current.lineage,
                progress=current.progress,
                counted_round=seat.counted_round,
                base_version=delivery.base_version,
                payloads=delivery.payloads,
                snapshot=delivery.snapshot,
            )
            # Fresh records for each message: in simulation they reach the client by reference.
            records = instruction.to_records()
            messages.append(Message(records, seat.node_id, purpose, ttl=self._ttl(), group_id=str(current.number)))
        return messages

    def _send(self, grid: Grid, messages: list[Message], purpose: str) -> list[Message]:
        """The replies to this round's messages; everything else is noted."""
        current = self._round
        names = {node_id: seat.client_key for node_id, seat in current.seats.items()}
        timeout = self._options.round_timeout_seconds
        post = self._mailbox.exchange(grid, messages, names, purpose, current.number, timeout)
        for node_id in post.unsent:
            self._reject(names[node_id], "the node is gone: nothing was sent to it")
        for node_id in post.silent:
            self._reject(names[node_id], f"no reply within {timeout:g} s")
        self._asked = {reply.metadata.reply_to_message_id: names[node_id] for node_id, reply in post.replies}
        return [reply for _, reply in post.replies]

    def _ttl(self) -> float:
        return self._options.round_timeout_seconds + _TTL_MARGIN_SECONDS

    # Replies

    def _accept(self, replies: Iterable[Message]) -> None:
        current = self._round
        for message in replies:
            client_key = self._asked[message.metadata.reply_to_message_id]
            try:
                reply = Reply.from_records(_content(message).content, current.lineage)
                self._check(reply, client_key)
            except Exception as error:  # one bad reply costs one reply, whatever is wrong with it
                self._reject(client_key, _reason(error))
                continue
            self._roster.holds(client_key, reply.version)
            current.spent(reply.seconds)
            current.accepted[client_key] = reply

    def _check(self, reply: Reply, client_key: str) -> None:
        current = self._round
        known = next(seat for seat in current.seats.values() if seat.client_key == client_key)
        if (reply.server_round, reply.attempt, reply.version) != (current.number, _ATTEMPT, current.version):
            raise MessageError(f"the reply is of round {reply.server_round}, version {reply.version}")
        if reply.num_examples != known.num_examples:
            raise MessageError(f"num-examples was {known.num_examples} at first, is {reply.num_examples} now")
        trains = current.number <= self._num_rounds
        if (reply.payload is not None) != (trains and self._uplink is not None):
            raise MessageError("a reply has a payload where, and only where, the algorithm exchanges something")

    def _reject(self, client_key: str, reason: str) -> None:
        """A reply that does not count; what its client holds is uncertain from here on."""
        self._round.reject(client_key, reason)
        self._roster.doubt(client_key)
        self._first_failure = self._first_failure or reason

    def _needed(self) -> int:
        return 1 if self._uplink is None else self._options.min_replies

    def _because(self) -> str:
        return f"; first reason: {self._first_failure}" if self._first_failure else ""

    # From uploads to the next version

    def _decode_and_aggregate(self, uplink: Codec) -> dict[str, Arrays]:
        """Decode uploads in the order of names, one dense update at a time.

        Returns:
            For each client whose upload is in the aggregate, the decoder's next state; it holds only if the round does.
        """
        current = self._round
        decoder_states: dict[str, Arrays] = {}
        buffers = [tensor.name for tensor in uplink.spec if tensor.kind == "buffer"]
        self._aggregator.begin()
        self._buffers = RunningMean()
        for client_key, reply in sorted(current.accepted.items()):
            state = self._uplink_states.get(client_key, uplink.initial_state())
            started = perf_counter()
            try:
                upload, state = uplink.decode(reply.payload or b"", state)
            except Exception as error:  # one bad payload costs one reply, whatever is wrong with it
                self._reject(client_key, _reason(error))
                del current.accepted[client_key]
                continue
            current.timed("decode", started)
            started = perf_counter()
            self._aggregator.add({name: upload[name] for name in upload if name not in buffers}, reply.num_examples)
            self._buffers.add({name: upload[name] for name in buffers}, 1.0)  # statistics, not updates: a plain mean
            current.timed("aggregate", started)
            decoder_states[client_key] = state
        return decoder_states

    def _advance(self, decoder_states: dict[str, Arrays]) -> bool:
        """Move the reference by the aggregate. False, and nothing moved, where the aggregate is not finite."""
        current = self._round
        assignment = Assignment(current.progress, derive_seed(self._seed, "server", current.number))
        started = perf_counter()
        aggregate = {**self._aggregator.result(), **self._buffers.result()}
        broadcast = self._runtime.algorithm.server.broadcast(aggregate, self.reference.shared, assignment)
        current.timed("aggregate", started)
        started = perf_counter()
        seed = derive_seed(assignment.seed, "encode")
        try:
            current.payload_bytes = self.reference.advance(broadcast, progress=current.progress, seed=seed)
        except ValueError as error:
            current.reject(_SERVER, str(error))
            self._first_failure = self._first_failure or str(error)
            return False
        current.timed("encode", started)
        self._uplink_states |= decoder_states
        for client_key in decoder_states:
            self._roster.counted(client_key, current.number)
        return True

    # The ledger

    def _write_row(self, kind: str, **values: Any) -> None:
        """One row: the shared model as it is now, local scores of the version that clients were sent."""
        current = self._round
        started = perf_counter()
        shared_global = self._runtime.algorithm.server.evaluate(self.reference.shared, self._test_data)
        current.timed("evaluate", started)
        replies = current.accepted.values()
        self._ledger.write(
            kind,
            round=current.number,
            **values,
            local_version=current.version,
            metrics={
                "shared_global": shared_global,
                "shared_local": weighted_scores((r.shared, r.num_test_examples) for r in replies),
                "private_local": weighted_scores((r.private, r.num_test_examples) for r in replies),
            },
            train=weighted_scores((r.train, r.num_examples) for r in replies),
            clients=sorted(current.accepted),
            rejected=[{"client": client_key, "reason": reason} for client_key, reason in current.rejected],
            seconds=current.seconds,
        )


def _reason(error: Exception) -> str:
    known = isinstance(error, ValueError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _content(message: Message) -> Message:
    """The message, if it has content.

    Raises:
        MessageError: if it holds an error instead: the last line of what the client raised, or Flower's own reason.
    """
    if message.has_content():
        return message
    lines = [line.strip() for line in (message.error.reason or "").splitlines() if line.strip()]
    # A traceback ends with the error's full name; its module says nothing to whoever reads the ledger.
    raise MessageError(re.sub(r"^(\w+\.)+(?=\w+:)", "", lines[-1]) if lines else f"Flower error {message.error.code}")
