"""The exchange: a Flower Strategy that owns its round loop.

Each round: ask unknown nodes who they are, choose clients, bring them to the current version and let them train, decode
their uploads one at a time in the order of their names, aggregate, encode the broadcast, apply to the server's own copy
exactly what clients will decode, and write it all to disk before anyone is told. `Strategy.start` has no place for
skipped rounds, retries or a resumed run, and reports success when every client has failed; so it is replaced here.
"""

import logging
from collections.abc import Callable, Iterable
from time import monotonic

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkd_flwr.core.schedules import progress_of
from fedkd_flwr.flower.advance import Advance
from fedkd_flwr.flower.aggregators import aggregator_of
from fedkd_flwr.flower.budget import account_of, go_on_counting, reason_of_budget
from fedkd_flwr.flower.checkpoint import Checkpoint, Checkpoints
from fedkd_flwr.flower.early_stop import Tally, reason_to_stop
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.grace import Grace
from fedkd_flwr.flower.inflation import most_unfolded_bytes
from fedkd_flwr.flower.mailbox import Mailbox
from fedkd_flwr.flower.merger import Merger
from fedkd_flwr.flower.reception import TTL_MARGIN_SECONDS, Reception
from fedkd_flwr.flower.records import EVALUATE, TRAIN, Hello, Instruction, Reply
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.replies import content_of, reason_of
from fedkd_flwr.flower.roster import Roster, Seat
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.round_report import row_of
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.flower.sampling import Sampler
from fedkd_flwr.flower.validation import NormBound
from fedkd_flwr.measure.ledger import Ledger, Row

_SERVER = "server"

_log = logging.getLogger("fedkd")


class Exchange(Strategy):
    """Moves what an algorithm exchanges between server and clients, and keeps them at the same version.

    Args:
        runtime: the experiment.
        ledger: where everything is written down.
        training_id: names this training on every client's disk.
        checkpoints: where the server's own state goes.
        first_attempt: of the first round asked; a resumed run asks once more what may have been asked before.
    """

    def __init__(
        self, runtime: Runtime, ledger: Ledger, training_id: str, checkpoints: Checkpoints, first_attempt: int = 1
    ) -> None:
        wires, options = runtime.wires, runtime.experiment.server
        self._runtime = runtime
        self._num_rounds = runtime.experiment.num_rounds
        self._seed = runtime.experiment.seed
        self._options = options
        self._tells_history = options.share_history or runtime.algorithm.shows_history
        self._ledger = ledger
        self._training_id = training_id
        self._checkpoints = checkpoints
        self._first_attempt = first_attempt
        limits, bounded = options.validation, runtime.algorithm.exchanges == "updates"  # outputs have others
        bound = NormBound(limits.max_norm_ratio if bounded else None, limits.excess_norm, runtime.algorithm.length)
        self._merger: Merger | None = None
        if wires:
            rule, robust = aggregator_of(runtime), options.aggregator.robust
            most = limits.max_weight_ratio if bounded or runtime.algorithm.weighs_claims else None
            self._merger = Merger(wires.uplink, rule, bound, most, robust=robust)
        self._sampler = Sampler(runtime.experiment.num_sampled, options.max_resyncs_per_round, self._seed, checkpoints)
        self._roster = Roster(
            runtime.experiment.num_clients, None if options.bind_names == "none" else options.release_names
        )
        self._mailbox = Mailbox(ledger, most_unfolded_bytes(wires))
        self._asked: dict[str, tuple[str, int]] = {}  # message id -> client key and attempt, of the replies in hand
        self._tally = Tally(options.max_skipped_rounds, checkpoints.directory.parent)
        self._row: Row = {}  # of the last round that is closed
        self.reference = Reference(
            runtime.algorithm.shared, wires.downlink if wires else None, runtime.initial, runtime.lineage
        )
        self._next = Advance(runtime, self.reference)
        hello = Hello(training_id, runtime.lineage, runtime.algorithm.foundations())
        reset = self._merger.reset if self._merger else None
        self._reception = Reception(options, hello, self._roster, self._mailbox, self.reference, reset, ledger)
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
            RunError: if too few clients connect, too many rounds in a row are skipped, or no round has counted.
        """
        self.summary()
        self._connect(grid)
        if not self._row:
            self._close_round(skipped=False)
        stop = self._reason_to_stop()
        for number in range(self._round.number + 1, self._num_rounds + 1):
            if stop:
                break
            self._train(grid, number)
            self._tally.require_learning()
            stop = self._reason_to_stop()
        if self._round.number > 0 or not stop:  # version 0 may be all that was wanted
            self._tally.require_learned(self._needed(), stop)
        final = max(self._round.number, self._num_rounds) + 1
        messages = self.configure_evaluate(final, ArrayRecord(), ConfigRecord(), grid)
        self.aggregate_evaluate(final, self._send(grid, messages, EVALUATE, self._options.round_timeout_seconds))
        self._ledger.write("final", **self._row_of(skipped=False), stopped_early=stop)
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Choose this round's clients and write to each what it needs."""
        self._round = self._new_round(server_round)
        remedy = "resume the run when they are back"
        seats = self._reception.require(grid, self._round, self._options.min_available or self._needed(), remedy)
        return self._instruct(self._sampler.choose(seats, self._round), TRAIN, self._first_attempt)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate, decode, aggregate, advance, save; or skip the round where good replies are too few."""
        current = self._round
        self._accept(replies)
        num_counted = len(current.accepted)
        if self._merger is not None and num_counted >= self._needed():
            num_counted = self._merger.take(current, self._reject, self._roster.all(), self.reference.shared)
            if num_counted >= self._needed() and not self._advance(self._merger):
                num_counted = 0
        skipped = num_counted < self._needed()
        self._tally.take(skipped=skipped, reason=current.rejected[0].reason if current.rejected else "")
        if skipped:
            _log.warning("round %d skipped: %d good replies", current.number, num_counted)
        self._close_round(skipped=skipped)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Bring every client to the last version and let it score."""
        self._round = self._new_round(server_round)
        num_known = sum(seat.replied_round > 0 for seat in self._roster.all())  # a name alone is not waited for
        return self._instruct(self._reception.gather(grid, self._round, num_known, present=True), EVALUATE, attempt=1)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Take the final scores."""
        self._accept(replies)
        return None

    # Rounds

    def _connect(self, grid: Grid) -> None:
        num_clients = self._runtime.experiment.num_clients
        if self._row:  # a resumed run: whoever took part before may come back, but need not
            self._reception.gather(grid, self._round, min(num_clients, len(self._roster.all())))
            return
        wanted = self._options.min_available or num_clients
        remedy = (
            f"start as many SuperNodes (in simulation: --federation-config 'num-supernodes={num_clients}'), or to "
            f"begin with fewer {'lower' if self._options.min_available else 'set'} server.min_available"
        )
        self._reception.require(grid, self._round, wanted, remedy, present=True)

    def _train(self, grid: Grid, number: int) -> None:
        """One round. A client whose reply failed is asked again, as often as allowed, in what is left of the time."""
        messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
        deadline = monotonic() + self._options.round_timeout_seconds  # waiting for clients to connect is not part of it
        last_attempt = self._first_attempt + self._options.num_attempts - 1
        for attempt in range(self._first_attempt, last_attempt + 1):
            replies = self._send(grid, messages, TRAIN, deadline - monotonic())
            if attempt == last_attempt or deadline <= monotonic():
                break
            self._accept(replies)
            replies = []
            seats = self._sampler.choose_again(self._reception.refresh(grid, self._round), self._round)
            if not seats or deadline <= monotonic():
                break
            messages = self._instruct(seats, TRAIN, attempt + 1)
        self._first_attempt = 1
        self.aggregate_train(number, replies)

    def _reason_to_stop(self) -> str:
        privacy = self._runtime.experiment.privacy
        most = privacy.max_epsilon if privacy else None
        return reason_to_stop(self._options.early_stop, self._row, self._ledger.wire_bytes) or reason_of_budget(
            self._ledger.privacy, most, self._options.num_attempts
        )

    # Messages

    def _new_round(self, number: int) -> Round:
        progress = progress_of(min(max(number, 1), self._num_rounds), self._num_rounds)
        return Round(number, progress, self.reference.version, self.reference.lineage, self._ledger.wire_bytes)

    def _instruct(self, seats: list[Seat], purpose: str, attempt: int) -> list[Message]:
        current = self._round
        current.seats, current.attempt = {seat.node_id: seat for seat in seats}, attempt
        current.trains = purpose == TRAIN
        ttl = self._options.round_timeout_seconds + TTL_MARGIN_SECONDS
        messages = []
        for seat in seats:
            delivery = self.reference.delivery(seat.version, 0 if self._tells_history else seat.joined_version)
            self._roster.sent(seat.client_key, current.version)
            instruction = Instruction(
                training_id=self._training_id,
                server_round=current.number,
                attempt=attempt,
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
            messages.append(Message(records, seat.node_id, purpose, ttl=ttl, group_id=str(current.number)))
        return messages

    def _send(self, grid: Grid, messages: list[Message], purpose: str, timeout: float) -> list[Message]:
        """The replies to this round's messages; everything else is noted."""
        current = self._round
        names = {node_id: seat.client_key for node_id, seat in current.seats.items()}
        grace = Grace(self._needed() - len(current.accepted), self._options.grace_seconds, self._is_good)
        post = self._mailbox.exchange(grid, messages, names, purpose, current.number, timeout, grace)
        for node_id in post.unsent:
            self._reject(names[node_id], "unsent", "the node is gone: nothing was sent to it")
        for node_id in post.silent:
            self._reject(names[node_id], "silent", f"no reply within {grace.describe(timeout)}")
        self._asked = {r.metadata.reply_to_message_id: (names[node_id], current.attempt) for node_id, r in post.replies}
        return [reply for _, reply in post.replies]

    # Replies

    def _accept(self, replies: Iterable[Message]) -> None:
        current = self._round
        for message in replies:
            client_key, attempt = self._asked[message.metadata.reply_to_message_id]
            try:
                reply = self._read(message, client_key, attempt)
            except Exception as error:  # one bad reply costs one reply, whatever is wrong with it
                self._reject(client_key, getattr(error, "kind", "malformed"), reason_of(error))
                continue
            self._roster.replied(client_key, reply.version, current.number)
            self._sampler.replied(client_key, current)
            current.spent(reply.seconds)
            current.accepted[client_key] = reply

    def _is_good(self, message: Message) -> bool:
        """Whether a reply to the messages that are out can be read; what is in its payload shows later."""
        try:
            seat = self._round.seats[message.metadata.src_node_id]
            self._read(message, seat.client_key, self._round.attempt)
        except Exception:  # it is read again when the round is over, and rejected with the reason then
            return False
        return True

    def _read(self, message: Message, client_key: str, attempt: int) -> Reply:
        """A reply that is one to what this client was asked.

        Raises:
            MessageError: if it isn't.
        """
        current = self._round
        reply = Reply.from_records(content_of(message), current.lineage, self._runtime.limits)
        known = self._asked_seat(client_key)
        if (reply.server_round, reply.attempt, reply.version) != (current.number, attempt, current.version):
            raise MessageError(
                f"the reply is of round {reply.server_round}, attempt {reply.attempt}, version {reply.version}", "stale"
            )
        for name in ("num_examples", "num_test_examples"):
            at_first, now = getattr(known, name), getattr(reply, name)
            if now != at_first:
                raise MessageError(f"{name.replace('_', '-')} was {at_first} at first, is {now} now")
        if (reply.payload is not None) != (current.trains and self._merger is not None):
            raise MessageError("a reply has a payload where, and only where, the algorithm exchanges something")
        return reply

    def _asked_seat(self, client_key: str) -> Seat:
        """What was known of a client when it was written to."""
        return next(seat for seat in self._round.seats.values() if seat.client_key == client_key)

    def _reject(self, client_key: str, kind: str, reason: str) -> None:
        """A reply that does not count; what its client holds is uncertain from here on."""
        self._round.reject(client_key, kind, reason)
        self._roster.doubt(client_key)

    def _needed(self) -> int:
        """Good replies that a round must have."""
        options = self._options
        return 1 if self._merger is None else max(options.min_replies, options.aggregator.num_clients_needed)

    # From uploads to the next version

    def _advance(self, merger: Merger) -> bool:
        """Go to the next version. False, and nothing moved, where there is none that can be used."""
        try:
            self._next.take(merger, self._round)
        except ValueError as error:
            self._round.reject(_SERVER, "aggregate", str(error))
            return False
        for client_key in merger.counted():
            self._roster.counted(client_key, self._round.number)
        return True

    # The ledger, and what a later process needs to go on

    def _close_round(self, *, skipped: bool) -> None:
        """Make the round durable: first the checkpoint, then its row, and only then may a message name its version."""
        self._row = self._row_of(skipped=skipped)
        parts = {
            "reference": self.reference.saved(),
            "roster": self._roster.saved(),
            "sampler": self._sampler.saved(),
            "rounds": self._tally.saved(),
            "account": account_of(self._ledger),
        } | self._next.saved()
        parts |= self._merger.saved() if self._merger else {}
        self._ledger.make_durable()
        self._checkpoints.save(Checkpoint(self._round.number, self._training_id, parts, self._row))
        self._ledger.write("round", **self._row)

    def restore(self, checkpoint: Checkpoint, last_written_round: int) -> None:
        """Go on after the round of a checkpoint, whose row may not have reached the ledger."""
        parts = checkpoint.parts
        self.reference.restore(parts["reference"])
        self._roster.restore(parts["roster"])
        self._sampler.restore(parts["sampler"])
        if self._merger is not None:
            self._merger.restore(parts)
        self._next.restore(parts, checkpoint.row["metrics"]["shared_global"])
        self._tally.restore(parts["rounds"])
        self._round = self._new_round(checkpoint.server_round)
        self._row = dict(checkpoint.row)
        attempts = self._options.num_attempts
        go_on_counting(
            self._ledger, parts.get("account"), self._checkpoints.choice(), checkpoint.server_round, attempts
        )
        if last_written_round < checkpoint.server_round:
            self._ledger.write("round", **self._row)

    def _row_of(self, *, skipped: bool) -> Row:
        return row_of(
            self._round,
            self._roster,
            self._reception.live,
            version=self.reference.version,
            scores=self._next.scores(self._round),
            wire_bytes=self._ledger.wire_bytes,
            skipped=skipped,
        )
