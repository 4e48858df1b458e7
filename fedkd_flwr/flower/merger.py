"""From a round's uploads to one aggregate."""

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

from fedkd_flwr.algorithms.base import Aggregator, Length
from fedkd_flwr.core.arrays import Array, Arrays, RunningMean
from fedkd_flwr.core.modules import prefixed
from fedkd_flwr.core.protocols import Codec
from fedkd_flwr.flower.aggregators import Median
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.records import Reply
from fedkd_flwr.flower.replies import reason_of
from fedkd_flwr.flower.roster import Seat
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.validation import NormBound, most_examples

Reject = Callable[[str, str, str], None]
_LOSS = "train_loss"


class Merger:
    """Decodes uploads in the order of names, one dense update at a time, and hands them to the aggregator.

    The decoder's state of a client moves on only when its reply has entered an aggregate that moved the reference.

    Args:
        uplink: the codec; its spec says which tensors are buffers.
        aggregator: of the parameters. Buffers are statistics, not updates: they bypass it.
        bound: how long an update of the parameters may be; that of the buffers has one of the same kind.
        max_weight_ratio: for how many times the median number of examples one client may count; None for any.
        robust: take the median of the buffers, not their mean.
    """

    def __init__(
        self,
        uplink: Codec,
        aggregator: Aggregator,
        bound: NormBound,
        max_weight_ratio: float | None = None,
        *,
        robust: bool = False,
    ) -> None:
        self._uplink = uplink
        self._aggregator = aggregator
        self._bound = bound
        self._buffer_bound = NormBound(bound.ratio, bound.excess)
        self._robust = robust
        self._max_weight_ratio = max_weight_ratio
        self._buffer_names = [tensor.name for tensor in uplink.spec if tensor.kind == "buffer"]
        self._buffers: RunningMean | Median = RunningMean()
        self._states: dict[str, Arrays] = {}  # of the decoders, by client key
        self._next_states: dict[str, Arrays] = {}  # of those whose upload was taken this round
        self._before: Arrays = {}  # the aggregator's state when the round began

    def take(self, current: Round, reject: Reject, seats: Iterable[Seat] = (), shared: Arrays | None = None) -> int:
        """Take the accepted replies of a round.

        Args:
            current: the round; replies that turn out bad leave it.
            reject: called with client key, kind and reason of a bad one.
            seats: all clients, whose numbers of examples say how many one client may count for.
            shared: what the updates move; its length bounds theirs for as long as hardly any are known.

        Returns:
            How many uploads were taken.
        """
        self._aggregator.begin(current.number)
        self._before = self._aggregator.state()
        self._buffers = Median() if self._robust else RunningMean()
        self._next_states = {}
        needed = self._bound.needs_norms or self._buffer_bound.needs_norms
        norms = list(self._norms(current)) if needed else []
        self._bound.begin((of_parameters for of_parameters, _ in norms), self._length_of(shared or {}) if needed else 0)
        self._buffer_bound.begin(of_buffers for _, of_buffers in norms)
        most = most_examples(seats, self._max_weight_ratio)
        for client_key, reply in sorted(current.accepted.items()):
            try:
                self._take(client_key, reply, current, most)
            except Exception as error:  # one bad payload costs one reply, whatever is wrong with it
                reject(client_key, getattr(error, "kind", "payload"), reason_of(error))
                del current.accepted[client_key]
        current.num_clipped = max(self._bound.num_clipped, self._buffer_bound.num_clipped)
        return len(self._next_states)

    def _take(self, client_key: str, reply: Reply, current: Round, most: float) -> None:
        """Take one upload. It is let go before the next one is decoded."""
        started = perf_counter()
        upload, state = self._decode(client_key, reply.payload)
        current.timed("decode", started)
        started = perf_counter()
        buffers = self._buffer_bound.admit({name: upload[name] for name in self._buffer_names})
        parameters = self._bound.admit(self._parameters(upload))
        num_examples = int(min(reply.num_examples, most))
        self._aggregator.add(parameters, num_examples, reply.train.get(_LOSS), client_key)
        self._buffers.add(buffers, 1.0)
        self._next_states[client_key] = state
        current.timed("aggregate", started)

    def result(self) -> dict[str, Array]:
        """The aggregate of what was taken.

        Raises:
            ValueError: if the aggregator gives none for so few uploads.
        """
        aggregate = self._aggregator.result()
        if aggregate is None:
            raise ValueError(f"the aggregator gives no result for {len(self._next_states)} uploads")
        return {**aggregate, **self._buffers.result()}

    def counted(self) -> Iterable[str]:
        """The uploads taken have moved the reference: their decoders move on. Names of the clients."""
        self._bound.counted()
        self._buffer_bound.counted()
        self._states |= {client_key: state for client_key, state in self._next_states.items() if state}
        return self._next_states.keys()

    def undo(self) -> None:
        """The aggregate was of no use: the aggregator forgets it."""
        self._aggregator.restore(self._before)

    def reset(self, client_key: str) -> None:
        """A client's encoder begins again, and so does its decoder here."""
        self._states.pop(client_key, None)

    def saved(self) -> dict[str, Archive]:
        """For a checkpoint."""
        decoders: dict[str, Array] = {}
        for client_key, state in self._states.items():
            decoders |= prefixed(f"{client_key}/", state)
        aggregator = Archive({}, self._aggregator.state())
        return {
            "decoders": Archive({}, decoders),
            "aggregator": aggregator,
            "bound": self._bound.saved(),
            "buffer bound": self._buffer_bound.saved(),
        }

    def restore(self, parts: Mapping[str, Archive]) -> None:
        """Go on from a checkpoint."""
        states: dict[str, dict[str, Array]] = {}
        for name, value in parts["decoders"].arrays.items():
            client_key, _, rest = name.partition("/")
            states.setdefault(client_key, {})[rest] = value
        self._states = dict(states)
        self._aggregator.restore(parts["aggregator"].arrays)
        self._bound.restore(parts["bound"])
        self._buffer_bound.restore(parts["buffer bound"])

    def _decode(self, client_key: str, payload: bytes | None) -> tuple[Arrays, Arrays]:
        return self._uplink.decode(payload or b"", self._states.get(client_key, self._uplink.initial_state()))

    def _parameters(self, upload: Arrays) -> dict[str, Array]:
        return {name: value for name, value in upload.items() if name not in self._buffer_names}

    def _length_of(self, shared: Arrays) -> float:
        """Of the parameters among the shared arrays. Statistics follow the data's scale, not the model's."""
        exchanged = {tensor.name for tensor in self._uplink.spec} & shared.keys()
        return Length().norm(self._parameters({name: shared[name] for name in exchanged or shared}))

    def _norms(self, current: Round) -> Iterable[tuple[float, float]]:
        """Of parameters and of buffers, for each update that can be read; it is decoded for that and let go."""
        for client_key, reply in sorted(current.accepted.items()):
            try:
                upload = self._decode(client_key, reply.payload)[0]
                buffers = {name: upload[name] for name in self._buffer_names}
                yield self._bound.length.norm(self._parameters(upload)), self._buffer_bound.length.norm(buffers)
            except Exception:  # it is decoded again when it is its turn, and rejected with the reason then
                continue
