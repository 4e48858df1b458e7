"""Whom a round asks, how long it waits, when it ends, and what is on disk by then."""

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from flwr.app import Context, Message

from fedkd_flwr.algorithms.base import Algorithm
from fedkd_flwr.core.protocols import Task
from fedkd_flwr.core.snapshot import snapshot_bytes
from fedkd_flwr.experiment import ConfigError, Experiment
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.mailbox import Mailbox
from fedkd_flwr.flower.records import Instruction
from fedkd_flwr.flower.reference import snapshot_arrays
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.summary import read_summary
from tests.flower.conftest import Make
from tests.integration.faults.world import Call, FaultyGrid, World, experiment_of


def sent(world: World, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Instruction]]:
    """Every instruction of a run as it leaves: partition id and instruction."""
    instructions: list[tuple[int, Instruction]] = []
    note = FaultyGrid._note

    def recorded(grid: FaultyGrid, message: Message) -> None:
        if message.metadata.message_type == "train":
            partition = grid._contexts[message.metadata.dst_node_id].node_config["partition-id"]
            instructions.append((int(partition), Instruction.from_records(message.content)))
        note(grid, message)

    monkeypatch.setattr(FaultyGrid, "_note", recorded)
    world.run()
    return instructions


def whole_student(world: World) -> int:
    built = runtime_of(world.experiment)
    assert built.wires is not None
    return snapshot_bytes(snapshot_arrays(built.initial, built.wires.downlink.initial_state()))


def late_joiner(world: World, number: int) -> None:
    if number == 4:
        world.grid.add_node(3)


def test_a_number_of_clients_is_sampled_by_seed_and_recorded(make: Make) -> None:
    few = "num_clients=8", "server.num_train=3"
    samples = [[row["sampled"] for row in make(*few, *more).run().rows("round")] for more in ((), (), ("seed=4",))]
    assert samples[0] == samples[1] != samples[2]
    assert all(len(sample) == 3 and sample == sorted(sample) for sample in samples[0][1:])
    assert len({tuple(sample) for sample in samples[0][1:]}) > 2


def test_every_version_is_on_disk_before_a_message_names_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    push = FaultyGrid.push_messages
    named: list[int] = []

    def checked(grid: FaultyGrid, messages: Any) -> Any:
        kept = list(messages)
        for message in kept:
            if message.metadata.message_type == "train":
                checkpoint = Checkpoints(world.run_dir, 1).latest()
                assert checkpoint is not None
                version = Instruction.from_records(message.content).version
                assert len(checkpoint.parts["reference"].facts["lineages"]) - 1 == version
                named.append(version)
        return push(grid, kept)

    monkeypatch.setattr(FaultyGrid, "push_messages", checked)
    world.run()
    assert sorted(set(named)) == list(range(6))


@pytest.mark.parametrize("share_history", [False, True])
def test_a_late_joiner_gets_the_whole_student_unless_history_is_shared(
    share_history: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(
        "server.min_available=3",
        f"server.share_history={str(share_history).lower()}",
        nodes=3,
        after_round=lambda world, number: late_joiner(world, number + 2),  # after the second round
    )
    first = next(instruction for partition, instruction in sent(world, monkeypatch) if partition == 3)
    assert first.version == 2
    # Two payloads are fewer bytes than the student, but they show two aggregates of before the client came.
    assert (first.snapshot is None) == share_history
    assert len(first.payloads) == (2 if share_history else 0)
    world.check()


def test_a_late_joiner_gets_the_payloads_where_the_state_holds_what_they_said(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Experiment.build_algorithm

    def showing(experiment: Experiment, task: Task) -> Algorithm:
        return replace(build(experiment, task), shows_history=True)

    monkeypatch.setattr(Experiment, "build_algorithm", showing)
    world = make(
        "server.min_available=3",
        "seed=17",  # no other test's, because what is built is kept
        nodes=3,
        after_round=lambda world, number: late_joiner(world, number + 2),
    )
    first = next(instruction for partition, instruction in sent(world, monkeypatch) if partition == 3)
    assert first.version == 2 and first.snapshot is None and len(first.payloads) == 2
    world.check()


def test_a_member_that_sat_out_gets_the_payloads_it_missed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make("num_clients=12", "server.num_train=3", "num_rounds=8")
    held = dict.fromkeys(range(12), 0)
    sizes = [0]
    for partition, instruction in sent(world, monkeypatch):
        sizes = [row["payload_bytes"] for row in world.rows("round")]
        chain = sum(sizes[held[partition] + 1 : instruction.version + 1])
        assert instruction.payload_bytes == min(chain, whole_student(world))
        held[partition] = instruction.version


def test_a_retry_within_the_round_raises_the_attempt_and_trains_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loses_the_first(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        if Instruction.from_records(message.content).attempt == 1:
            raise ConnectionError("lost")
        return reply

    world = make("server.num_attempts=3", "server.round_timeout_seconds=60", act=loses_the_first)
    instructions = sent(world, monkeypatch)
    assert [(i.server_round, i.attempt) for _, i in instructions if i.attempt > 1] == [(2, 2), (4, 2)]
    assert all(len(row["clients"]) == 4 for row in world.rows("round")[1:])
    trained = {key: state.private["num_rounds_trained"] for key, state in world.states().items()}
    assert set(map(int, trained.values())) == {6}
    world.check()


def test_too_few_clients_fail_clearly_within_the_connect_timeout(make: Make) -> None:
    world = make("server.connect_timeout_seconds=0.3", nodes=3)
    with pytest.raises(RunError, match=r"round 0: 4 clients wanted, 3 connected within 0.3 s; start as many"):
        world.run()


def test_clients_that_leave_for_good_fail_the_run_and_it_can_be_resumed(make: Make) -> None:
    def leave(world: World, number: int) -> None:
        if number == 3:
            for node_id in list(world.grid._contexts)[:3]:
                world.grid.remove_node(node_id)

    world = make("server.connect_timeout_seconds=0.3", after_round=leave)
    with pytest.raises(RunError, match=r"round 4: 2 clients wanted, 1 connected.*resume the run when they are back"):
        world.run()
    World(world.run_dir, world.experiment).run(resume=True)
    assert [row["round"] for row in world.rows("round")] == list(range(7))


def test_nodes_that_all_fail_alike_are_not_waited_for(make: Make) -> None:
    def broken(world: World, message: Message, context: Context, work: Call) -> Message:
        raise RuntimeError("no data on this node")

    world = make("server.connect_timeout_seconds=60", on_hello=broken)
    started = time.monotonic()
    with pytest.raises(RunError, match="first reason: RuntimeError: no data on this node"):
        world.run()
    assert time.monotonic() - started < 20


def test_a_target_ends_the_run_with_the_reason(make: Make) -> None:
    world = make("num_rounds=30", "server.early_stop.target=0.8").run()
    rounds = world.rows("round")
    scores = [row["metrics"]["shared_global"]["accuracy"] for row in rounds]
    assert len(rounds) < 31
    assert scores[-1] >= 0.8 > max(scores[:-1])
    summary = read_summary(world.run_dir)
    assert summary is not None
    assert summary["status"] == "completed"
    assert summary["stopped_early"].startswith("accuracy 0.")


def test_a_target_that_version_0_meets_needs_no_round(make: Make) -> None:
    world = make("server.early_stop.target=0.1").run()
    assert [row["round"] for row in world.rows("round")] == [0]
    assert world.rows("end")[0]["status"] == "completed"


def test_a_byte_budget_is_kept_until_the_final_evaluation(make: Make) -> None:
    budget = 60_000
    world = make("num_rounds=30", f"server.early_stop.max_wire_bytes={budget}").run()
    moved = sum(row["wire_bytes"] for row in world.rows("message") if row["purpose"] != "evaluate")
    assert 0.6 * budget < moved <= budget
    assert "bytes moved" in world.rows("final")[0]["stopped_early"]


def test_a_metric_that_no_task_gives_is_an_error_before_training(make: Make) -> None:
    with pytest.raises(RunError, match=r"server.early_stop.metric must be one of accuracy, macro_f1, loss, got 'f1'"):
        make("server.early_stop.target=0.5", "server.early_stop.metric=f1").run()


def test_rows_say_who_was_asked_and_how_scores_spread_over_clients(make: Make) -> None:
    world = make().run()
    for row in [*world.rows("round")[1:], *world.rows("final")]:
        for scope in ("shared_local", "private_local"):
            spread = row["spread"][scope]["accuracy"]
            assert 0 <= spread["p10"] <= spread["median"] <= spread["p90"] <= 1
    assert len(world.rows("final")[0]["clients"]) == 4
    assert read_summary(world.run_dir)["spread"] == world.rows("final")[0]["spread"]  # type: ignore[index]


def test_a_client_that_forgets_is_sent_less_and_less_often(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        if context.node_config["partition-id"] != 0:
            return reply
        for path in world.state_dir.glob(f"*/{context.node_config['partition-id']:05d}/*.safetensors"):
            path.unlink()
        raise ConnectionError("and forgets")

    world = make("num_rounds=18", "server.max_resyncs_per_round=1", act=forgets, rounds=tuple(range(1, 19)))
    asked = [i.server_round for partition, i in sent(world, monkeypatch) if partition == 0]
    again = [number for number in asked if number > 2]
    assert [later - earlier for earlier, later in pairwise(again)][:3] == [1, 2, 4]


def test_another_number_of_rounds_is_accepted_only_by_force(make: Make) -> None:
    world = make("num_rounds=3").run()
    longer = World(world.run_dir, experiment_of("num_rounds=5"))
    with pytest.raises(ConfigError, match="num_rounds: differs"):
        longer.run(resume=True)
    longer.force = True
    longer.run(resume=True)
    assert [row["round"] for row in world.rows("round")] == [0, 1, 2, 3, 4, 5]
    assert read_summary(world.run_dir)["num_rounds"] == 5  # type: ignore[index]


def test_fewer_rounds_than_were_done_end_with_the_final_evaluation(make: Make) -> None:
    def leave(world: World, number: int) -> None:
        if number == 4:
            for node_id in list(world.grid._contexts)[:3]:
                world.grid.remove_node(node_id)

    world = make("server.connect_timeout_seconds=0.3", after_round=leave)
    with pytest.raises(RunError):
        world.run()
    shorter = World(world.run_dir, experiment_of("num_rounds=3", "server.connect_timeout_seconds=0.3"), force=True)
    shorter.run(resume=True)
    assert world.rows("end")[-1]["status"] == "completed"
    assert world.rows("final")[-1]["version"] == 4


def test_a_robust_rule_skips_a_round_with_fewer_replies_than_it_needs(make: Make) -> None:
    def fails(world: World, message: Message, context: Context, work: Call) -> Message:
        raise RuntimeError("away")

    world = make("num_clients=5", "server.aggregator.name=krum", act=fails).run()
    assert [row["skipped"] for row in world.rows("round")] == [False, False, True, False, True, False, False]


def test_clients_that_come_and_go_under_new_names_do_not_keep_the_others_out(make: Make) -> None:
    def come(world: World, number: int) -> None:
        for node_id in list(world.grid._contexts)[4:]:
            world.grid.remove_node(node_id)
        world.grid.add_node(number % 4, **{"client-id": f"x{number}"})

    world = make("num_rounds=8", "num_clients=5", "server.min_available=4", nodes=4, after_round=come).run()
    assert all({"00000", "00001", "00002", "00003"} <= set(row["clients"]) for row in world.rows("round")[1:])


def test_a_hello_that_hangs_keeps_nobody_waiting(make: Make) -> None:
    def hangs(grid: FaultyGrid, message_ids: Any) -> Any:
        slow = {i for i in message_ids if grid._sent[i].metadata.dst_node_id == 1000}
        return pull(grid, set(message_ids) - slow)

    pull = FaultyGrid.pull_messages
    world = make("server.min_available=3", "server.connect_timeout_seconds=8")
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyGrid, "pull_messages", hangs)
        world.run()
    assert time.monotonic() - started < 7
    assert all(row["clients"] == ["00001", "00002", "00003"] for row in world.rows("round")[1:])


def test_a_node_that_could_not_say_who_it_is_keeps_nobody_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(world: World, message: Message, context: Context, work: Call) -> Message:
        if context.node_config["partition-id"] == 0:
            raise RuntimeError("no data on this node")
        return work()

    def noted(mailbox: Mailbox, grid: FaultyGrid, messages: list[Message], *rest: Any) -> Any:
        waits.extend(rest[-1] for message in messages if message.metadata.dst_node_id == 1000)
        return exchange(mailbox, grid, messages, *rest)

    waits: list[float] = []
    exchange = Mailbox.exchange
    monkeypatch.setattr(Mailbox, "exchange", noted)
    world = make("server.min_available=3", on_hello=broken).run()
    assert len(waits) > len(world.rows("round")) and waits[0] > 0 and not any(waits[1:])
    assert all(row["clients"] == ["00001", "00002", "00003"] for row in world.rows("round")[1:])
    assert [row["event"] for row in world.rows("event")] == [
        "not taken in (node 1000): RuntimeError: no data on this node"
    ]
