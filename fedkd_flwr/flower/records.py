"""Messages as frozen values, and their form as Flower records. Both directions of each live side by side.

A payload travels in one piece (`carriage.py`). No message holds a path or an identifier of variable length, so the size
of a message depends on its payload alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TypeVar
from zlib import crc32

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedkd_flwr.core.quoting import quoted
from fedkd_flwr.experiment import NAME_PATTERN
from fedkd_flwr.flower.carriage import carried, carry
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.limits import Limits

HELLO = "query.hello"
TRAIN = "train"
EVALUATE = "evaluate"

LINEAGE_BYTES = 32
MEMORIES = ("nothing", "private", "all")
SECONDS = ("client_train", "evaluate", "encode", "decode")
_UNKNOWN_VERSION = -1
_METRIC_PATTERN = r"[a-z][a-z0-9_]{0,47}"
_MOST_METRICS = 100
_LARGEST_METRIC = 1e30
_MOST_EXAMPLES = 10**12
_MOST_SECONDS = 1e7

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who are you, and what do you hold?

    Attributes:
        training_id: names the training, 16 hexadecimal digits.
        initial_digest: of version 0 as the server built it, 32 bytes.
        foundations: see `Algorithm.foundations`, 32 bytes each.
    """

    training_id: str
    initial_digest: bytes
    foundations: Mapping[str, bytes] = field(default_factory=dict)

    def to_records(self) -> RecordDict:
        """As Flower records."""
        config = ConfigRecord({"training-id": self.training_id, "initial-digest": self.initial_digest})
        extra = {"foundations": ConfigRecord(dict(self.foundations))} if self.foundations else {}
        return RecordDict({"config": config, **extra})

    @classmethod
    def from_records(cls, content: RecordDict) -> "Hello":
        """Read what `to_records` wrote."""
        config = _config(content)
        record = dict(content.config_records.get("foundations") or {})
        foundations = {name: _digest(record, name) for name in record}
        return cls(_take(config, "training-id", str), _digest(config, "initial-digest"), foundations)


@dataclass(frozen=True, slots=True)
class HelloReply:
    """What a client is and holds.

    Attributes:
        client_key: the client's lasting name.
        version: the version it holds; None where it could not build version 0 as the server did.
        lineage: of that version, 32 bytes.
        num_examples: its training examples.
        num_test_examples: examples that its scores are means over.
        committed_round: round of the reply that its codec state is known to have counted up to; 0 for none.
        replied_round: round of its last reply, counted or not; 0 for none.
        memory: what it remembers of this training: "nothing", "all", or "private" where only that could be saved from
            a damaged disk.
    """

    client_key: str
    version: int | None
    lineage: bytes
    num_examples: int
    num_test_examples: int
    committed_round: int
    replied_round: int
    memory: str

    def to_records(self) -> RecordDict:
        """As Flower records."""
        version = _UNKNOWN_VERSION if self.version is None else self.version
        config = ConfigRecord(
            {
                "client-key": self.client_key,
                "version": version,
                "lineage": self.lineage,
                "num-examples": self.num_examples,
                "num-test-examples": self.num_test_examples,
                "committed-round": self.committed_round,
                "replied-round": self.replied_round,
                "memory": self.memory,
            }
        )
        return RecordDict({"config": config})

    @classmethod
    def from_records(cls, content: RecordDict) -> "HelloReply":
        """Read what `to_records` wrote."""
        config = _config(content)
        version = _take(config, "version", int)
        num_examples, num_test_examples = (_count(config, name) for name in ("num-examples", "num-test-examples"))
        memory = _take(config, "memory", str)
        if memory not in MEMORIES:
            raise MessageError(f"memory must be one of {', '.join(MEMORIES)}, got {quoted(memory)}")
        key = _take(config, "client-key", str)
        if not re.fullmatch(NAME_PATTERN, key):
            raise MessageError(f"client-key must be letters, digits, dots, dashes and underscores, got {quoted(key)}")
        held = None if version < 0 else version
        committed, replied = (_take(config, name, int) for name in ("committed-round", "replied-round"))
        lineage = _digest(config, "lineage")
        return cls(key, held, lineage, num_examples, num_test_examples, committed, replied, memory)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Reach this version, then do what the message's type says.

    Attributes:
        training_id: names the training.
        server_round: 1 to num_rounds; num_rounds + 1 for the final evaluation.
        attempt: 1, and one more for each retry within the round.
        version: the version to work from.
        lineage: of that version, 32 bytes.
        progress: share of training done, in [0, 1].
        counted_round: round of this client's last reply that entered an aggregate; 0 where none did.
        base_version: version that the first of `payloads` applies to.
        payloads: broadcasts from `base_version` to `version`.
        snapshot: the whole of `version`, instead of payloads.
    """

    training_id: str
    server_round: int
    attempt: int
    version: int
    lineage: bytes
    progress: float
    counted_round: int
    base_version: int
    payloads: tuple[bytes, ...] = ()
    snapshot: bytes | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of what brings the client up to date."""
        return len(self.snapshot) if self.snapshot is not None else sum(map(len, self.payloads))

    def to_records(self) -> RecordDict:
        """As Flower records."""
        config = ConfigRecord(
            {
                "training-id": self.training_id,
                "server-round": self.server_round,
                "attempt": self.attempt,
                "version": self.version,
                "lineage": self.lineage,
                "progress": self.progress,
                "counted-round": self.counted_round,
            }
        )
        content = RecordDict({"config": config})
        if self.snapshot is not None:
            config["snapshot"] = True
            carry(content, self.snapshot)
        elif self.payloads:
            config["sizes"] = [len(payload) for payload in self.payloads]
            carry(content, b"".join(self.payloads))
        return content

    @classmethod
    def from_records(cls, content: RecordDict, limits: Limits | None = None) -> "Instruction":
        """Read what `to_records` wrote; where limits are given, no more bytes than they allow."""
        config = _config(content)
        whole, sizes = config.get("snapshot") is True, _sizes(config.get("sizes", []))
        if limits is not None and (most := max(sizes, default=0)) > limits.broadcast_bytes:
            raise MessageError(f"a broadcast must have at most {limits.broadcast_bytes} bytes, got {most}")
        data = carried(content, None if limits is None else limits.snapshot_bytes if whole else sum(sizes))
        snapshot = data if whole else None
        payloads = _split(data or b"", sizes) if snapshot is None else ()
        version = _take(config, "version", int)
        if version < len(payloads):
            raise MessageError(f"version must be at least {len(payloads)} for as many payloads, got {version}")
        progress = _take(config, "progress", float)
        if not 0 <= progress <= 1:
            raise MessageError(f"progress must be in [0, 1], got {progress}")
        server_round, attempt, counted_round = (
            _take(config, name, int) for name in ("server-round", "attempt", "counted-round")
        )
        if server_round < 1 or attempt < 1 or not 0 <= counted_round < server_round:
            raise MessageError(
                f"server-round and attempt must be at least 1 and counted-round of an earlier round, got "
                f"{server_round}, {attempt}, {counted_round}"
            )
        return cls(
            training_id=_take(config, "training-id", str),
            server_round=server_round,
            attempt=attempt,
            version=version,
            lineage=_digest(config, "lineage"),
            progress=progress,
            counted_round=counted_round,
            base_version=version - len(payloads),
            payloads=payloads,
            snapshot=snapshot,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client did.

    Attributes:
        server_round: of the instruction.
        attempt: of the instruction.
        version: that the client worked from.
        lineage: of that version, 32 bytes; seven of them travel.
        num_examples: training examples.
        num_test_examples: examples that the scores are means over.
        payload: encoded upload; None where nothing is exchanged.
        shared: scores of the shared model, before training.
        private: scores of the private model, before training.
        ensemble: scores of both together, before training.
        train: means over the local training steps.
        seconds: by name: client_train, evaluate, encode, decode.
    """

    server_round: int
    attempt: int
    version: int
    lineage: bytes
    num_examples: int
    num_test_examples: int
    payload: bytes | None = None
    shared: Mapping[str, float] = field(default_factory=dict)
    private: Mapping[str, float] = field(default_factory=dict)
    ensemble: Mapping[str, float] = field(default_factory=dict)
    train: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the upload."""
        return len(self.payload) if self.payload is not None else 0

    def without_metrics(self) -> "Reply":
        """The same, saying nothing that follows from the client's data but its payload: one example of each kind."""
        bare = Reply(self.server_round, self.attempt, self.version, self.lineage, num_examples=1, num_test_examples=1)
        return replace(bare, payload=self.payload)

    def within(self, limits: Limits) -> "Reply":
        """The same without metrics that are out of their ranges, which would make the server refuse it."""
        shared, private, ensemble = (
            limits.tellable("s", scores) for scores in (self.shared, self.private, self.ensemble)
        )
        train = limits.tellable("t", self.train)
        return replace(self, shared=shared, private=private, ensemble=ensemble, train=train)

    def to_records(self) -> RecordDict:
        """As Flower records: a payload, and one metric record with groups told apart by a letter."""
        metrics = MetricRecord(
            {
                "num-examples": self.num_examples,
                "num-test-examples": self.num_test_examples,
                "server-round": self.server_round,
                "attempt": self.attempt,
                "version": self.version,
                "lineage": short_lineage(self.lineage),
            }
        )
        for letter, group in _groups(self).items():
            for name, value in group.items():
                metrics[f"{letter}.{name}"] = float(value)
        content = RecordDict({"metrics": metrics})
        if self.payload is not None:
            carry(content, self.payload)
            metrics["checksum"] = crc32(self.payload)
        return content

    @classmethod
    def from_records(cls, content: RecordDict, lineage: bytes, limits: Limits | None = None) -> "Reply":
        """Read what `to_records` wrote.

        Args:
            content: the reply's records.
            lineage: of the version that the instruction named; a reply from another one is refused.
            limits: of its bytes and metrics; None: any. More seconds than are believed are cut.

        Raises:
            MessageError: if it can't be read, or is beyond the limits.
        """
        record = content.metric_records.get("metrics")
        if record is None:
            raise MessageError("a reply needs a metric record 'metrics'")
        metrics = dict(record)
        if _take(metrics, "lineage", int) != short_lineage(lineage):
            raise MessageError("the client works from another lineage than the server", kind="stale")
        payload = carried(content, limits.upload_bytes if limits is not None else None)
        if payload is not None and _take(metrics, "checksum", int) != crc32(payload):
            raise MessageError("payload is damaged: its checksum differs", kind="payload")
        groups = _read_groups(metrics, limits)
        counts = {key: _count(metrics, key) for key in ("num-examples", "num-test-examples")}
        return cls(
            server_round=_take(metrics, "server-round", int),
            attempt=_take(metrics, "attempt", int),
            version=_take(metrics, "version", int),
            lineage=lineage,
            num_examples=counts["num-examples"],
            num_test_examples=counts["num-test-examples"],
            payload=payload,
            shared=groups["s"],
            private=groups["p"],
            ensemble=groups["e"],
            train=groups["t"],
            seconds=groups["c"],
        )


def short_lineage(lineage: bytes) -> int:
    """Seven bytes of a lineage as an integer that fits a metric."""
    return int.from_bytes(lineage[:7], "little")


def _read_groups(metrics: Mapping[str, object], limits: Limits | None) -> dict[str, dict[str, float]]:
    if len(metrics) > _MOST_METRICS:
        raise MessageError(f"a reply may have {_MOST_METRICS} metrics, got {len(metrics)}")
    groups: dict[str, dict[str, float]] = {"s": {}, "p": {}, "e": {}, "t": {}, "c": {}}
    for name, value in metrics.items():
        letter, separator, rest = name.partition(".")
        if not separator:
            continue
        if letter not in groups or not re.fullmatch(_METRIC_PATTERN, rest):
            raise MessageError(f"metric {quoted(name)} has no name that is known here")
        if not isinstance(value, float) or not abs(value) <= _LARGEST_METRIC:
            raise MessageError(
                f"metric {name!r} must be a finite number of at most {_LARGEST_METRIC:g}, got {quoted(value)}"
            )
        if letter == "c" and not (rest in SECONDS and 0 <= value <= _MOST_SECONDS):
            raise MessageError(f"seconds must be {', '.join(SECONDS)}, from 0 to {_MOST_SECONDS:g}, got {rest} {value}")
        if limits is not None and letter != "c":
            limits.require(letter, rest, value)
        groups[letter][rest] = min(value, limits.seconds) if limits is not None and letter == "c" else value
    return groups


def _count(record: Mapping[str, object], key: str) -> int:
    count = _take(record, key, int)
    if not 1 <= count <= _MOST_EXAMPLES:
        raise MessageError(f"{key} must be in [1, {_MOST_EXAMPLES}], got {count}")
    return count


def _groups(reply: Reply) -> dict[str, Mapping[str, float]]:
    return {"s": reply.shared, "p": reply.private, "e": reply.ensemble, "t": reply.train, "c": reply.seconds}


def _sizes(sizes: object) -> list[int]:
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise MessageError(f"sizes must be a list of positive integers, got {quoted(sizes)}")
    return sizes


def _split(data: bytes, sizes: list[int]) -> tuple[bytes, ...]:
    if sum(sizes) != len(data):
        raise MessageError(f"payloads must have {sum(sizes)} bytes together, got {len(data)}")
    ends = accumulate(sizes, initial=0)
    return tuple(data[start:end] for start, end in pairwise(ends))


def _config(content: RecordDict) -> ConfigRecord:
    record = content.config_records.get("config")
    if record is None:
        raise MessageError("a message needs a config record 'config'")
    return record


def _take(record: Mapping[str, object], key: str, kind: type[T]) -> T:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MessageError(f"{key} must be {kind.__name__}, got {quoted(value)}")
    return value


def _digest(record: Mapping[str, object], key: str) -> bytes:
    value = _take(record, key, bytes)
    if len(value) != LINEAGE_BYTES:
        raise MessageError(f"{key} must have {LINEAGE_BYTES} bytes, got {len(value)}")
    return value
