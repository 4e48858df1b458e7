"""The mailbox: what one node sends that can't be read costs that node's reply, and nothing else."""

import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse

from fedkd_flwr.flower import mailbox as mailbox_module
from fedkd_flwr.flower.errors import MessageError
from fedkd_flwr.flower.grace import Grace
from fedkd_flwr.flower.inflation import inflation_limited
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.mailbox import Mailbox, Post
from fedkd_flwr.flower.records import HelloReply, Reply
from fedkd_flwr.flower.replies import content_of
from fedkd_flwr.flower.traffic import ENVELOPE_BYTES
from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, Row, read_rows
from tests.flower.objects import Answer, ObjectGrid, Objects, UploadGrid, answered

Change = Callable[[Objects], None]

LINEAGE = bytes(range(32))
MOST_BYTES = 2**24
DEEP = "[" * 100_000


def reply() -> Reply:
    payload = np.random.default_rng(0).bytes(9000)  # more than fits into a configuration: an array
    return Reply(1, 1, 0, LINEAGE, 50, 9, payload, {"accuracy": 0.5}, {"accuracy": 0.4}, {"train_loss": 2.0})


def hello() -> RecordDict:
    return HelloReply("site", 0, LINEAGE, 50, 9, 0, 0, "all").to_records()


HONEST = answered(lambda: reply().to_records())


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def rows(ledger: Ledger) -> list[Row]:
    return [row for row in read_rows(ledger.directory / LEDGER_FILE) if row["kind"] == "message"]


def asked(grid: ObjectGrid) -> list[Message]:
    return [Message(RecordDict(), node_id, "train") for node_id in grid.get_node_ids()]


def sent(mailbox: Mailbox, *answers: Answer) -> Post:
    grid = ObjectGrid(answers)
    return mailbox.exchange(grid, asked(grid), {}, "train", 1, 0.0)


def is_good(message: Message) -> bool:
    """Whether a reply of the honest node arrived as it was sent."""
    return Reply.from_records(content_of(message), LINEAGE) == reply()


def other_root(objects: Objects) -> None:
    objects.root = objects.of_kind("RecordDict")


def another_reply_to(objects: Objects) -> None:
    proto = MessageProto.FromString(objects.body(objects.root))
    proto.metadata.reply_to_message_id = f"{3:064x}"  # the message to the third node
    objects.set_body(objects.root, proto.SerializeToString())


def holds_no_records(objects: Objects) -> None:
    """The message's content is one of its records."""
    metrics = objects.of_kind("MetricRecord")
    objects.set_head(objects.root, "Message", metrics, objects.head(objects.root)[2])


def no_children(objects: Objects) -> None:
    objects.set_head(objects.root, "Message", "", objects.head(objects.root)[2])


def bomb(objects: Objects) -> None:
    """One piece of an array, named again and again: five terabytes out of 8 megabytes."""
    objects.set_body(objects.of_kind("ArrayChunk"), bytes(CHUNK))
    objects.set_json(objects.of_kind("Array"), arraychunk_ids=[0] * 1_000_000)


UNREADABLE: dict[str, Change] = {
    "three bytes": lambda objects: objects.contents.update({objects.root: b"\x00\x01\x02"}),
    "no bytes": lambda objects: objects.contents.update({objects.root: b""}),
    "an unknown kind": lambda objects: objects.set_head(objects.root, "Pickle", "", "0"),
    "a number of bytes that is none": lambda objects: objects.set_head(objects.root, "Message", "", "x"),
    "a head that is no text": lambda objects: objects.contents.update({objects.root: b"\xff\xfe \x00"}),
    "a part that is missing": lambda objects: objects.contents.pop(objects.of_kind("MetricRecord")) and None,
    "no part": no_children,
    "itself as its part": lambda objects: objects.set_head(objects.root, "Message", objects.root, "0"),
    "no message": other_root,
    "no records": holds_no_records,
    "an answer to another's message": another_reply_to,
    "a body that is no JSON": lambda objects: objects.set_body(objects.of_kind("RecordDict"), b"{"),
    "a body of another form": lambda objects: objects.set_body(objects.of_kind("RecordDict"), b"[1, 2]"),
    "nested lists": lambda objects: objects.set_body(objects.of_kind("RecordDict"), DEEP.encode()),
    "nested lists in an array": lambda objects: objects.set_body(objects.of_kind("Array"), DEEP.encode()),
    "a piece that is not there": lambda objects: objects.set_json(objects.of_kind("Array"), arraychunk_ids=[7]),
    "an array that unfolds": bomb,
    "a record that is no protobuf": lambda objects: objects.set_body(objects.of_kind("MetricRecord"), b"\xff" * 9),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_what_can_not_be_read_is_that_nodes_rejection_and_the_other_replies_count(
    change: Change, ledger: Ledger
) -> None:
    first, bad, last = sent(
        Mailbox(ledger, MOST_BYTES), HONEST, answered(lambda: reply().to_records(), change), HONEST
    ).replies
    assert is_good(first[1])
    assert is_good(last[1])
    with pytest.raises(MessageError) as caught:
        content_of(bad[1])
    assert caught.value.kind == "malformed"
    uplink = [row["wire_bytes"] for row in rows(ledger) if row["direction"] == "uplink"]
    assert len(uplink) == 3
    assert uplink[0] == uplink[2] > uplink[1] == ENVELOPE_BYTES["uplink"]


@pytest.mark.parametrize("change", [UNREADABLE["three bytes"], UNREADABLE["no message"]])
def test_a_late_reply_that_can_not_be_read_is_collected_and_the_others_with_it(change: Change, ledger: Ledger) -> None:
    mailbox = Mailbox(ledger, MOST_BYTES)
    grid = ObjectGrid([HONEST, answered(lambda: reply().to_records(), change), HONEST])
    held, grid._instructions = grid._instructions, {}

    class Silent(ObjectGrid):
        def pull_messages(self, message_ids: object) -> Iterator[Message]:
            return iter([])

    grid.__class__ = Silent
    assert len(mailbox.exchange(grid, asked(grid), {}, "train", 1, 0.0).silent) == 3
    grid.__class__ = ObjectGrid
    del held
    late = mailbox.collect_late(grid)
    assert [is_good(message) if message.has_content() else None for _, message in late] == [True, None, True]
    assert not mailbox.busy_nodes()


def test_a_superlink_that_is_gone_is_no_nodes_doing(ledger: Ledger) -> None:
    def gone(message: Message) -> Objects:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError):
        sent(Mailbox(ledger), HONEST, gone)


def announced(objects: Objects) -> None:
    """Said, and not uploaded."""
    objects.contents[objects.of_kind("ArrayChunk")] = b""


def test_a_node_that_announces_and_never_uploads_holds_up_the_others_no_longer_than_the_round(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox_module, "_UPLOAD_SECONDS", 0.2)
    grid = UploadGrid([answered(lambda: reply().to_records(), announced)] * 2 + [HONEST])
    began = time.monotonic()
    post = Mailbox(ledger).exchange(grid, asked(grid), {}, "train", 1, 0.5)
    assert time.monotonic() - began < 5
    *never, (_, honest) = post.replies
    assert is_good(honest)
    for _, message in never:
        with pytest.raises(MessageError, match="unavailable"):
            content_of(message)


def test_a_node_that_has_stalled_once_is_polled_last_so_that_the_grace_of_the_others_begins(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox_module, "_UPLOAD_SECONDS", 0.2)
    grid, mailbox = UploadGrid([answered(lambda: reply().to_records(), announced), HONEST]), Mailbox(ledger)
    mailbox.exchange(grid, asked(grid), {}, "train", 1, 0.0)
    began = time.monotonic()
    post = mailbox.exchange(grid, asked(grid), {}, "train", 2, 60.0, Grace(1, 0.0, is_good))
    assert time.monotonic() - began < 10
    assert [message.has_error() for _, message in post.replies] == [False, True]
    assert is_good(post.replies[0][1])


def test_an_upload_that_began_in_time_may_end_a_little_later(ledger: Ledger) -> None:
    grid = UploadGrid([HONEST])
    given = grid.PullObject
    times = iter(range(1000))

    def not_at_once(request: PullObjectRequest) -> PullObjectResponse:
        return given(request) if next(times) > 9 else PullObjectResponse(object_found=True, object_available=False)

    grid.PullObject = not_at_once  # type: ignore[method-assign]
    [(_, message)] = Mailbox(ledger).exchange(grid, asked(grid), {}, "train", 1, 0.0).replies
    assert is_good(message)


def test_replies_are_pulled_one_by_one(ledger: Ledger) -> None:
    grid = ObjectGrid([HONEST] * 3)
    Mailbox(ledger).exchange(grid, asked(grid), {}, "train", 1, 0.0)
    assert grid.num_pulled == [1, 1, 1]


def test_asking_hundreds_of_silent_nodes_in_vain_leaves_the_superlink_most_of_its_time(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    spent = {"asking": 0.0}

    class Slow(ObjectGrid):
        def pull_messages(self, message_ids: object) -> Iterator[Message]:
            clock[0] += 0.006
            spent["asking"] += 0.006
            return iter([])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(mailbox_module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(mailbox_module, "sleep", sleep)
    grid = Slow([HONEST] * 300)
    Mailbox(ledger).exchange(grid, asked(grid), {}, "train", 1, 600.0)
    assert 600 <= clock[0] < 603  # one more question to each at most
    assert spent["asking"] < 0.25 * 600


def test_an_honest_array_of_equal_pieces_arrives(ledger: Ledger) -> None:
    zeros = ArrayRecord({"payload": Array(np.zeros(20_000_000, np.uint8))})  # four pieces, two of them the same
    [(_, message)] = sent(Mailbox(ledger, 2 * MOST_BYTES), answered(lambda: RecordDict({"arrays": zeros}))).replies
    assert message.content.array_records["arrays"]["payload"].numpy().nbytes == 20_000_000


def test_what_is_sent_in_full_is_not_refused_for_its_length() -> None:
    values = np.random.default_rng(0).bytes(6_000_000)
    record = ArrayRecord({"payload": Array(np.frombuffer(values, np.uint8))})
    with inflation_limited(1000):
        grid = ObjectGrid([answered(lambda: RecordDict({"arrays": record}))])
        [message] = grid.pull_messages(grid.push_messages(asked(grid)))
    assert message.content.array_records["arrays"]["payload"].numpy().tobytes() == values


def test_the_ledger_counts_equal_pieces_once_and_never_more_payload_than_came(ledger: Ledger) -> None:
    zeros = ArrayRecord({"payload": Array(np.zeros(20_000_000, np.uint8))})
    sent(Mailbox(ledger, 2 * MOST_BYTES), answered(lambda: RecordDict({"arrays": zeros})))
    row = rows(ledger)[-1]
    assert row["payload_bytes"] <= row["wire_bytes"]
    assert row["wire_bytes"] == pytest.approx(20_000_000 - CHUNK, abs=2000)


def test_short_pieces_are_not_repeated_to_swell_the_ledger(ledger: Ledger) -> None:
    def unfolded(objects: Objects) -> None:
        objects.set_json(objects.of_kind("Array"), arraychunk_ids=[0] * 1000)

    [(_, message)] = sent(Mailbox(ledger, MOST_BYTES), answered(lambda: reply().to_records(), unfolded)).replies
    with pytest.raises(MessageError, match="repeats a piece of 9128 bytes"):
        content_of(message)
    assert rows(ledger)[-1]["wire_bytes"] == ENVELOPE_BYTES["uplink"]


# Ten thousand changes to the bytes of objects


def bytes_changed(objects: Objects, rng: random.Random) -> None:
    """Some bytes of one object, more often in its head."""
    identifier = rng.choice(list(objects.contents))
    data = bytearray(objects.contents[identifier])
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(len(data), rng.choice((90, 200, len(data)))))] = rng.randrange(256)
    objects.contents[identifier] = bytes(data)


def bodies_changed(objects: Objects, rng: random.Random) -> None:
    """Some bytes of a body, by a liar whose head fits."""
    identifier = rng.choice(list(objects.contents))
    data = bytearray(objects.body(identifier)) or bytearray(1)
    where = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[where : where + rng.randrange(9)] = rng.randbytes(rng.choice((0, 1, 4, 90)))
    else:
        data[where] = rng.randrange(256)
    objects.set_body(identifier, bytes(data))


def heads_changed(objects: Objects, rng: random.Random) -> None:
    """Kinds, parts and lengths of others, or none."""
    identifiers = list(objects.contents)
    identifier = rng.choice(identifiers)
    kinds = ["Message", "RecordDict", "ArrayRecord", "MetricRecord", "ConfigRecord", "Array", "ArrayChunk", "Other", ""]
    parts = rng.choice(("", objects.head(identifier)[1], ",".join(rng.choices(identifiers, k=rng.randrange(4)))))
    kind = rng.choice((objects.head(identifier)[0], rng.choice(kinds)))
    objects.set_head(identifier, kind, parts, rng.choice(("0", "-1", str(2**63), objects.head(identifier)[2])))


def objects_changed(objects: Objects, rng: random.Random) -> None:
    """One object in another's place, cut off, or gone."""
    one, other = rng.choices(list(objects.contents), k=2)
    fate = rng.randrange(4)
    if fate == 0:
        objects.contents[one] = objects.contents[other]
    elif fate == 1:
        objects.contents[one] = objects.contents[one][: rng.randrange(len(objects.contents[one]))]
    elif fate == 2:
        del objects.contents[one]
    else:
        objects.root = one


def values_changed(objects: Objects, rng: random.Random) -> None:
    """What JSON says of arrays and records, with lengths and depths that nothing has."""
    odd = (0, -1, 2**80, 1e308, None, True, "", "object", "<U9", "\ud800", [0] * 5000, [2**62], [[]], {"a": {}}, [-1])
    kinds = [key for key in objects.contents if objects.head(key)[0] in ("Array", "RecordDict", "ArrayRecord")]
    identifier = rng.choice(kinds)
    values = json.loads(objects.body(identifier))
    objects.set_json(identifier, **{rng.choice([*values, "new\u202e"]): rng.choice(odd)})


CHANGES = (bytes_changed, bodies_changed, heads_changed, objects_changed, values_changed)
BATCH = 20


def fuzz(mailbox: Mailbox, change: Callable[[Objects, random.Random], None], times: int) -> tuple[int, float]:
    """Let changed replies and greetings come, an honest one between them; how many were refused, the slowest batch."""
    rng = random.Random(change.__name__)
    num_refused, slowest = 0, 0.0
    for _ in range(times // BATCH):
        contents = [rng.choice((hello, lambda: reply().to_records())) for _ in range(BATCH)]
        answers = [answered(content, lambda objects: change(objects, rng)) for content in contents]
        place = rng.randrange(BATCH)
        began = time.process_time()
        post = sent(mailbox, *answers[:place], HONEST, *answers[place:])
        slowest = max(slowest, time.process_time() - began)
        assert [node_id for node_id, _ in post.replies] == sorted(node_id for node_id, _ in post.replies)
        assert len(post.replies) == BATCH + 1
        assert is_good(post.replies[place][1])
        for _, message in post.replies:
            try:
                content_of(message)
            except MessageError as error:
                num_refused += 1
                assert len(str(error)) <= 500
                assert str(error).isprintable()
    return num_refused, slowest


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_objects_never_raise_and_cost_one_reply_each(
    change: Callable[[Objects, random.Random], None], times: int, ledger: Ledger
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused, slowest = fuzz(Mailbox(ledger, MOST_BYTES), change, times)
    assert num_refused > times // 10
    assert slowest < 5  # seconds of the processor, for twenty
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


def test_a_record_under_twenty_thousand_names_is_read_in_seconds(ledger: Ledger) -> None:
    """Names cost the sender 70 bytes each, and the one record behind them is looked at once."""

    def many(objects: Objects) -> None:
        metrics = objects.of_kind("MetricRecord")
        names = {str(number): metrics for number in range(20_000)}
        records = objects.of_kind("RecordDict")
        objects.set_head(records, "RecordDict", metrics, "0")
        objects.set_body(records, json.dumps(names).encode())

    began = time.process_time()
    content = answered(lambda: RecordDict({"metrics": MetricRecord({"a": 1})}), many)
    assert len(sent(Mailbox(ledger), content).replies) == 1
    assert time.process_time() - began < 10
