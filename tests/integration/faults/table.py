"""The table of faults: what goes wrong, and how it must be noticed."""

import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message

from fedkd_flwr.compressors.payload import HEADER_BYTES
from fedkd_flwr.flower.carriage import carried
from fedkd_flwr.flower.records import HelloReply, Instruction
from fedkd_flwr.flower.store import PREVIOUS_FILE, STATE_FILE, ClientStore
from fedkd_flwr.flower.traffic import ENVELOPE_BYTES
from tests.integration.faults.world import Call, World
from tests.payloads import change_payload, put_array, remove_payload

Act = Callable[[World, Message, Context, Call], Message]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: in words.
        noticed: kind of the rejection that must be found in the ledger, or a part of an event, or None where nothing
            should be rejected at all.
        act: what the victim does with a training message.
        on_round: done before the messages of a round are sent.
        on_reply: what becomes of the victim's reply on its way.
        on_hello: what every client does with a hello.
        after_round: done between a round and the next.
        overrides: of the experiment.
        num_late: clients that are not there at first.
        everyone: in the rounds of the fault every client is a victim.
        authenticated: nodes are registered, each with a key of its own.
        committed: the client kept what it was sent, so that nothing may be sent to it again.
        rounds: in which there is a victim.
        prepare: gives `absent` or `begun_again` for the final check.
    """

    name: str
    noticed: str | None
    act: Act | None = None
    on_round: Callable[[World, int], None] | None = None
    on_reply: Callable[[World, Message, Message], Iterable[Message]] | None = None
    on_hello: Act | None = None
    after_round: Callable[[World, int], None] | None = None
    overrides: tuple[str, ...] = ()
    num_late: int = 0
    everyone: bool = False
    authenticated: bool = False
    committed: bool = False
    rounds: tuple[int, ...] = (2, 4)
    prepare: Callable[[World], dict[str, set[str]]] | None = None


def key_of(context: Context) -> str:
    return f"{context.node_config['partition-id']:05d}"


def note(world: World, what: str, context: Context) -> None:
    world.memory.setdefault(what, set()).add(key_of(context))


def noted(what: str) -> Callable[[World], dict[str, set[str]]]:
    return lambda world: {what: world.memory.get(what, set())}


def directory_of(world: World, message: Message, context: Context) -> Path:
    return ClientStore(world.state_dir, str(message.content["config"]["training-id"]), key_of(context)).directory  # type: ignore[index]


def victims_absent(world: World) -> dict[str, set[str]]:
    return {"absent": {world.key_of_victim(number) for number in world.victims}}


# What a client may do


def raises(world: World, message: Message, context: Context, work: Call) -> Message:
    raise RuntimeError("no data today")


def raises_after(world: World, message: Message, context: Context, work: Call) -> Message:
    work()
    raise ConnectionError("lost on the way")


def dies(world: World, message: Message, context: Context, work: Call) -> Message:
    return Message(Error(5, "Node unavailable"), reply_to=message)


def silent_error(world: World, message: Message, context: Context, work: Call) -> Message:
    return Message(Error(0), reply_to=message)


def changed(change: Callable[[Message], object]) -> Act:
    def act(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        change(reply)
        return reply

    return act


def payload(change: Callable[[bytes], bytes], *, honest_checksum: bool = False) -> Act:
    """Another payload, by a liar who makes the checksum fit, or by an accident that does not."""

    def alter(reply: Message) -> None:
        change_payload(reply.content, change, checksum=not honest_checksum)

    return changed(alter)


def metric(key: str, value: float) -> Act:
    def alter(reply: Message) -> None:
        reply.content["metrics"][key] = value  # type: ignore[index]

    return changed(alter)


def sixty_metrics(reply: Message) -> None:
    reply.content["metrics"].update({f"s.invented_{n}": 0.5 for n in range(60)})  # type: ignore[union-attr]


def with_zeros(data: bytes) -> bytes:
    return data + bytes(8 << 20)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def all_largest(data: bytes) -> bytes:
    """Every parameter as far away as the codec can say; the statistics stay."""
    numbers = 2 * (2 * 8 + 8 + 8 + 8 + 8 * 2 + 2)  # 16 bits each: two layers and a batch normalisation
    return data[:4] + np.full(numbers // 2, 32767, "<i2").tobytes() + data[4 + numbers :]


def wild_statistics(data: bytes) -> bytes:
    """The parameters stay; means and variances of the batch normalisation as far away as float32 goes."""
    return data[: -4 * 16] + np.full(16, -3e38, "<f4").tobytes()


def archive(reply: Message) -> None:
    buffer = BytesIO()
    np.savez(buffer, payload=np.zeros(3, np.uint8))
    array = Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=buffer.getvalue())
    put_array(reply.content, ArrayRecord({"payload": array}))


def pickled(reply: Message) -> None:
    buffer = BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())
    put_array(reply.content, ArrayRecord({"payload": array}))


class Bomb:
    """Whoever unpickles this makes a folder where a test looks for it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FEDKD_TEST_BOMB"],)


def replayed(world: World, message: Message, context: Context, work: Call) -> Message:
    """The reply of an earlier round once more, in place of the one asked for."""
    reply = work()
    old = world.memory.get("old reply")
    if old is None:
        return reply
    reply.content.clear()
    reply.content.update(old)
    return reply


def remember_reply(world: World, asked: Message, reply: Message) -> Iterable[Message]:
    world.memory.setdefault("old reply", dict(reply.content) if reply.has_content() else None)
    return [reply]


# What a disk may do


def disk_full(world: World, message: Message, context: Context, work: Call) -> Message:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkd_flwr.flower.archive.save_file", full)
        return work()


def disk_read_only(world: World, message: Message, context: Context, work: Call) -> Message:
    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *arguments, **options)

    real = os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.open", refuse)
        return work()


def teacher_kept(world: World) -> dict[str, set[str]]:
    """A client that had committed twice keeps the teacher of the commit before; of one commit there is no copy."""
    fates = {row["client"]: row["event"].rsplit("its private model ")[-1] for row in world.rows("event")}
    had_a_copy = world.memory.get("had a copy", set())
    assert had_a_copy or world.experiment.num_clients > 4
    assert {key for key, fate in fates.items() if fate == "is kept"} == had_a_copy
    return noted("begun_again")(world)


def damaged(name: str, damage: Callable[[bytes], bytes]) -> Act:
    def act(world: World, message: Message, context: Context, work: Call) -> Message:
        if (directory_of(world, message, context) / PREVIOUS_FILE).exists():
            note(world, "had a copy", context)
        world.memory["struck"] -= 1
        for path in directory_of(world, message, context).glob(name):
            world.memory["struck"] += 1
            data = damage(path.read_bytes())
            path.unlink()  # or a file that others link to would be damaged with it
            path.write_bytes(data)
            note(world, "begun_again", context)
        return work()

    return act


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def lost(world: World, message: Message, context: Context, work: Call) -> Message:
    shutil.rmtree(directory_of(world, message, context))
    note(world, "begun_again", context)
    return work()


def from_backup(world: World, message: Message, context: Context, work: Call) -> Message:
    """The machine goes back to what it was before the round."""
    directory = directory_of(world, message, context)
    backup = world.run_dir / "backup" / key_of(context)
    if backup.exists():
        shutil.rmtree(directory)
        shutil.copytree(backup, directory)
        note(world, "begun_again", context)
    return work()


def keep_backups(world: World, number: int) -> None:
    if number == 2 and not (world.run_dir / "backup").exists():
        for state in world.state_dir.glob("*/0*"):
            shutil.copytree(state, world.run_dir / "backup" / state.name)


def overtaken(world: World, message: Message, context: Context, work: Call) -> Message:
    """Another process of the same client commits while this one trains."""
    store = ClientStore(world.state_dir, str(message.content["config"]["training-id"]), key_of(context))  # type: ignore[index]
    commit = ClientStore.commit

    def late(self: ClientStore, state: Any) -> Any:
        if (current := store.load()) is not None:
            commit(store, current)
        return commit(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientStore, "commit", late)
        return work()


def of_another_training(world: World, message: Message, context: Context, work: Call) -> Message:
    """The state of another training lies where this one's should be."""
    directory = directory_of(world, message, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientStore, "_training_id", "another", raising=False)
        store = ClientStore(world.state_dir, directory.parent.name, key_of(context))
        state = store.load()
        store._training_id = "another"
        if state is not None:
            store.commit(state)
            note(world, "absent", context)
            note(world, "begun_again", context)
    return work()


# What a network may do


def held(until: int) -> Callable[[World, Message, Message], Iterable[Message]]:
    """The reply is kept back until a later round; `until` rounds after its own."""

    def on_reply(world: World, asked: Message, reply: Message) -> Iterable[Message]:
        world.grid.delay(reply, world.grid.round + until)
        return []

    return on_reply


def doubled(world: World, asked: Message, reply: Message) -> Iterable[Message]:
    return [reply, reply]


def stray(world: World, asked: Message, reply: Message) -> Iterable[Message]:
    other = Message(reply.content, reply_to=asked)
    other.metadata.__dict__["_reply_to_message_id"] = "f" * 64
    return [other, reply]


def inflates_to_nothing(world: World, asked: Message, reply: Message) -> Iterable[Message]:
    """What Flower raises of an object that it can't read, when it is pulled."""
    world.memory["bytes"]["uplink"] += ENVELOPE_BYTES["uplink"]  # all that is known of it
    raise ValueError("Class name (RecordDict) and object type (Message) do not match.")


def misattributed(world: World, asked: Message, reply: Message) -> Iterable[Message]:
    """The reply says that it answers what another client was asked."""
    other = next(
        key
        for key, message in world.grid._sent.items()
        if message.metadata.message_type == "train" and message is not asked
    )
    reply.metadata.__dict__["_reply_to_message_id"] = other
    world.memory["bytes"]["uplink"] += ENVELOPE_BYTES["uplink"]
    return [reply]


def garbled_downlink(world: World, message: Message, context: Context, work: Call) -> Message:
    content = message.content
    if carried(content) is not None:
        change_payload(content, lambda data: data[:-1] + bytes([data[-1] ^ 1]), checksum=False)
    return work()


def lost_at_random(world: World, message: Message, context: Context, work: Call) -> Message:
    reply = work()
    if random.Random(f"{world.grid.round} {key_of(context)}").random() < 0.2:
        raise ConnectionError("lost on the way")
    return reply


# What nodes may do


def restarted(world: World, number: int) -> None:
    """The victim comes back with another id."""
    if number in world.victims:
        partition = world.grid._contexts[world.victims[number]].node_config["partition-id"]
        world.grid.remove_node(world.victims[number])
        world.grid.add_node(int(partition))


def restarted_beside_its_ghost(world: World, number: int) -> None:
    """The new node is there before Flower has noticed that the old one is gone."""
    if number == 2:
        world.memory["ghost"] = world.victims[2]
        world.grid.add_node(int(world.grid._contexts[world.victims[2]].node_config["partition-id"]))
    if number == 4:
        world.grid.remove_node(world.memory["ghost"])


def joins_late(world: World, number: int) -> None:
    if number == 6:
        world.grid.add_node(world.experiment.num_clients - 1)


def two_claim_one_name(world: World, number: int) -> None:
    if number == 1:
        world.grid.add_node(0)


def away_for_two_rounds(world: World, number: int) -> None:
    if number == 2:
        node_id = world.victims[2]
        world.memory["partition"] = world.grid._contexts[node_id].node_config["partition-id"]
        world.grid.remove_node(node_id)
    if number == 4:
        world.grid.add_node(int(world.memory["partition"]))


def takes_the_name_of_one_that_is_away(world: World, number: int) -> None:
    """A registered node, with a place of its own and data of its own, says that it is another, which comes back."""
    if number == 2:
        world.memory["away"] = node_id = world.victims[2]
        world.memory["partition"] = partition = int(world.grid._contexts[node_id].node_config["partition-id"])
        world.grid.remove_node(node_id)
        world.memory["thief"] = world.grid.add_node(0, **{"client-id": f"{partition:05d}"})
    if number == 5:
        world.grid.remove_node(world.memory["thief"])
        world.grid.add_node(world.memory["partition"], node_id=world.memory["away"])


def uses_up_names(world: World, message: Message, context: Context, work: Call) -> Message:
    """One node says a new name at each hello, and asks to be greeted again by failing at each training."""
    reply = work()
    if context.node_config["partition-id"] != 0:
        return reply
    said = world.memory["said"] = world.memory.get("said", 0) + 1
    truth = HelloReply.from_records(reply.content)
    return Message(replace(truth, client_key=f"name{said}").to_records(), reply_to=message)


def fails_as_node_0(world: World, message: Message, context: Context, work: Call) -> Message:
    if context.node_config["partition-id"] == 0:
        raise RuntimeError("no data today")
    return work()


def gone_when_asked(world: World, number: int) -> None:
    """The node leaves between being chosen and being written to."""
    if number in world.rounds:
        node_id = world.victims[number]
        world.memory["gone"] = world.grid._contexts.pop(node_id)
        world.memory["gone id"] = node_id
    elif "gone" in world.memory:
        world.grid._contexts[world.memory.pop("gone id")] = world.memory.pop("gone")


def every_client_fails(world: World, message: Message, context: Context, work: Call) -> Message:
    raise RuntimeError("power cut")


def every_name_of_node_0(world: World) -> dict[str, set[str]]:
    names = {row["node"] for row in world.rows("message") if row["node"].startswith("name")} | {"00000", "00001"}
    return {"absent": names, "begun_again": names}


def changes_its_name(world: World, message: Message, context: Context, work: Call) -> Message:
    """One node says another name at each hello, the first one that of an honest client."""
    reply = work()
    if context.node_config["partition-id"] != 0:
        return reply
    note(world, "absent", context)
    note(world, "begun_again", context)
    said = world.memory["said"] = world.memory.get("said", 0) + 1
    truth = HelloReply.from_records(reply.content)
    name = "00001" if said == 1 else f"name{said}"
    return Message(replace(truth, client_key=name, num_examples=1).to_records(), reply_to=message)


def hello_raises_once(world: World, message: Message, context: Context, work: Call) -> Message:
    greeted = world.memory.setdefault("greeted", set())
    if context.node_id in greeted or context.node_config["partition-id"] != 1:
        return work()
    greeted.add(context.node_id)
    raise RuntimeError("still starting")


def hello_of(partition_id: int, **lies: Any) -> Act:
    def act(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        if context.node_config["partition-id"] != partition_id:
            return reply
        note(world, "absent", context)
        truth = HelloReply.from_records(reply.content)
        return Message(replace(truth, **lies).to_records(), reply_to=message)

    return act


def hello_garbage(world: World, message: Message, context: Context, work: Call) -> Message:
    reply = work()
    if context.node_config["partition-id"] == 1 and "garbage" not in world.memory:
        world.memory["garbage"] = True
        reply.content["config"]["client-key"] = "../../etc/passwd"  # type: ignore[index]
    return reply


def other_version_0(world: World, message: Message, context: Context, work: Call) -> Message:
    """Another processor builds version 0 with other last bits."""
    reply = work()
    truth = HelloReply.from_records(reply.content)
    if context.node_config["partition-id"] == 1 and truth.memory == "nothing":
        return Message(replace(truth, version=None).to_records(), reply_to=message)
    return reply


def fails_and_forgets(world: World, message: Message, context: Context, work: Call) -> Message:
    """It trains well, fails, and asks for everything again, every time."""
    instruction = Instruction.from_records(message.content)
    reply = work()
    shutil.rmtree(directory_of(world, message, context))
    note(world, "begun_again", context)
    if instruction.server_round > 1:
        raise ConnectionError("and it forgets everything")
    return reply


NAN = np.array([np.nan], "<f4").tobytes()
EVERY_ROUND = tuple(range(1, 100))

FAULTS = [
    Fault("client raises before it trains", "error", raises),
    Fault("client raises after it committed: the reply is lost", "error", raises_after, committed=True),
    Fault("client dies: Flower answers for it", "error", dies),
    Fault("error without a reason", "error", silent_error),
    Fault(
        "client raises; asked again in the same round",
        "error",
        raises_after,
        overrides=("server.num_attempts=2",),
        committed=True,
    ),
    Fault("client hangs past the timeout and never answers", "silent", on_reply=held(100), prepare=victims_absent),
    Fault(
        "client never answers; the round closes when the grace is over",
        "silent",
        on_reply=held(100),
        prepare=victims_absent,
        overrides=("server.round_timeout_seconds=600", "server.grace_seconds=0.1"),
    ),
    Fault(
        "client answers two rounds after the grace is over",
        "late",
        on_reply=held(2),
        rounds=(2,),
        overrides=("server.round_timeout_seconds=600", "server.grace_seconds=0.1"),
    ),
    Fault("client hangs past the timeout and answers two rounds later", "late", on_reply=held(2), rounds=(2,)),
    Fault("reply truncated", "payload", payload(lambda data: data[:-3], honest_checksum=True), committed=True),
    Fault("reply with a flipped bit", "payload", payload(flipped, honest_checksum=True), committed=True),
    Fault("truncated by a liar", "payload", payload(lambda data: data[:-3]), committed=True),
    Fault("too many values", "payload", payload(lambda data: data + bytes(8)), committed=True),
    Fault("no values at all", "payload", payload(lambda data: b"\0"), committed=True),
    Fault("NaN in the payload", "payload", payload(lambda data: data[:-4] + NAN), committed=True),
    Fault(
        "ranks too large",
        "payload",
        payload(lambda data: data[:HEADER_BYTES] + b"\x02\xff\xff\x7f" + data[HEADER_BYTES + 4 :]),
        overrides=("compressor.name=svd",),
    ),
    Fault("an update a thousand times too long", "norm", payload(all_largest), rounds=(4,)),
    Fault("an update too long in the first round", "norm", payload(all_largest), rounds=(1,)),
    Fault("statistics of batch normalisation out of all bounds", "norm", payload(wild_statistics), rounds=(1, 2, 4)),
    Fault(
        "the same with the median",
        "norm",
        payload(wild_statistics),
        rounds=(2, 4),
        overrides=("server.aggregator.name=fedmedian",),
    ),
    Fault(
        "an endless update in a first round of two",
        "norm",
        payload(all_largest),
        rounds=(1,),
        overrides=("server.fraction_train=1.0", "server.num_train=2"),
    ),
    Fault(
        "endless statistics in a first round of two",
        "norm",
        payload(wild_statistics),
        rounds=(1,),
        overrides=("server.fraction_train=1.0", "server.num_train=2"),
    ),
    Fault(
        "a version whose score is no number",
        "aggregate",
        payload(wild_statistics),
        rounds=(1, 3, 4),
        overrides=("server.validation.max_norm_ratio=null",),
        committed=True,
    ),
    Fault("negative num-examples", "malformed", metric("num-examples", -5), committed=True),
    Fault("absurd num-examples", "malformed", metric("num-examples", 10**9), committed=True),
    Fault("infinite metric", "malformed", metric("s.accuracy", float("inf")), committed=True),
    Fault("unknown metric", "malformed", metric("s.[bold]", 1.0), committed=True),
    Fault("reply without metrics", "malformed", changed(lambda reply: reply.content.pop("metrics")), committed=True),
    Fault("reply without a payload", "malformed", changed(lambda reply: remove_payload(reply.content)), committed=True),
    Fault("an archive in place of an array", "malformed", changed(archive), committed=True),
    Fault("a pickle in place of an array", "malformed", changed(pickled), committed=True),
    Fault("an accuracy of 2.5e29", "malformed", metric("s.accuracy", 2.5e29), committed=True),
    Fault("a training loss of 1e29", "malformed", metric("t.train_loss", 1e29), committed=True),
    Fault("sixty invented metrics", "malformed", changed(sixty_metrics), committed=True),
    Fault("8 MiB of zeros after the payload", "payload", payload(with_zeros), committed=True),
    Fault("reply for an old version", "stale", metric("version", 0), committed=True),
    Fault("reply from another lineage", "stale", metric("lineage", 12345), committed=True),
    Fault("reply to another attempt", "stale", metric("attempt", 7), committed=True),
    Fault("reply of an earlier round replayed", "stale", replayed, on_reply=remember_reply, rounds=(2, 3, 4)),
    Fault("reply delivered twice", None, on_reply=doubled),
    Fault("reply from a node that was never asked", None, on_reply=stray),
    Fault("objects that Flower can't inflate", "malformed", on_reply=inflates_to_nothing, committed=True),
    Fault("reply in another client's name", "malformed", on_reply=misattributed, committed=True),
    Fault("a fifth of all replies is lost", "error", lost_at_random, rounds=EVERY_ROUND, everyone=True),
    Fault("broadcast garbled on its way", "error", garbled_downlink),
    Fault("all clients fail in one round", "error", every_client_fails, rounds=(3,), everyone=True),
    Fault("disk full on the client", "error", disk_full),
    Fault("state directory read-only", "error", disk_read_only),
    Fault("state file torn", "lost its state after", damaged(STATE_FILE, torn), rounds=(4, 6), prepare=teacher_kept),
    Fault(
        "state file with a flipped bit",
        "lost its state after",
        damaged(STATE_FILE, flipped),
        rounds=(4, 6),
        prepare=teacher_kept,
    ),
    Fault(
        "state file and the copy before it torn",
        "its private model restarts from version 0",
        damaged("*s*e.safetensors", torn),
        prepare=noted("begun_again"),
    ),
    Fault("shared model on the client's disk torn", "error", damaged("reference-*", torn)),
    Fault(
        "copy before the last state torn",
        None,
        damaged(PREVIOUS_FILE, torn),
        rounds=(4, 5, 6, 7),
        everyone=True,
        committed=True,
    ),
    Fault("disk lost", "its private model restarts from version 0", lost, prepare=noted("begun_again")),
    Fault(
        "machine restored from a backup",
        "error",
        from_backup,
        on_round=keep_backups,
        rounds=(4,),
        prepare=noted("begun_again"),
    ),
    Fault("a second process of the same client commits first", "error", overtaken),
    Fault(
        "state of another training in its place",
        "error",
        of_another_training,
        rounds=(3,),
        prepare=lambda world: noted("absent")(world) | noted("begun_again")(world),
    ),
    Fault("client restarts under another node id", None, after_round=restarted),
    Fault("client restarts beside its own ghost", "a second live node", after_round=restarted_beside_its_ghost),
    Fault(
        "new client in round 7",
        None,
        after_round=joins_late,
        overrides=("server.min_available=2", "num_rounds=9"),
        num_late=1,
    ),
    Fault("two live nodes claim one name", "a second live node", after_round=two_claim_one_name),
    Fault("client away for two rounds", None, after_round=away_for_two_rounds),
    Fault("node gone between choice and message", "unsent", on_round=gone_when_asked),
    Fault(
        "a node says another name at every hello",
        "error",
        raises,
        on_hello=changes_its_name,
        rounds=EVERY_ROUND,
        overrides=("server.min_available=2",),
        prepare=every_name_of_node_0,
    ),
    Fault(
        "a registered node takes the name of one that is away",
        "a node with another key",
        after_round=takes_the_name_of_one_that_is_away,
        authenticated=True,
    ),
    Fault(
        "a registered node uses up the names",
        "a node that has had 4 names",
        fails_as_node_0,
        on_hello=uses_up_names,
        rounds=EVERY_ROUND,
        everyone=True,
        authenticated=True,
        overrides=("server.fraction_train=1.0", "server.min_available=2"),
        prepare=every_name_of_node_0,
    ),
    Fault("hello raises once", None, on_hello=hello_raises_once),
    Fault("hello names a path", None, on_hello=hello_garbage),
    Fault(
        "hello claims a million times the examples",
        "claims 1000000000",
        on_hello=hello_of(1, num_examples=10**9),
        prepare=noted("absent"),
    ),
    Fault("version 0 built otherwise on one machine", None, on_hello=other_version_0),
    Fault(
        "client fails and forgets, every time",
        "error",
        fails_and_forgets,
        rounds=EVERY_ROUND,
        prepare=lambda world: {"begun_again": world.memory["begun_again"], "absent": world.memory["begun_again"]},
    ),
]
