"""A round need not wait for those who are silent once enough others have answered."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.grace import Grace
from fedkd_flwr.flower.local_grid import task_identity
from tests.integration.faults.table import held, metric
from tests.integration.faults.world import Call, FaultyGrid, World, experiment_of, small_world

Make = Callable[..., World]
PATIENT = ("server.round_timeout_seconds=600", "server.min_available=2")
GRACE = (*PATIENT, "server.grace_seconds=0.1")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    counter = iter(range(100))
    with small_world(monkeypatch):
        yield lambda *overrides, **hooks: World(tmp_path / f"run{next(counter)}", experiment_of(*overrides), **hooks)


def kinds(world: World) -> list[tuple[int, str]]:
    return [(item["round"], item["kind"]) for item in world.rejected()]


def test_a_silent_node_costs_the_grace_and_comes_back_when_it_has_answered(make: Make) -> None:
    world = make(*GRACE, on_reply=held(2), rounds=(2,))
    started = time.monotonic()
    world.run()
    assert time.monotonic() - started < 300
    assert kinds(world) == [(2, "silent"), (5, "late")]
    assert (
        world.rejected()[0]["reason"] == "no reply within 0.1 s after enough others had answered (server.grace_seconds)"
    )
    silent = world.rejected()[0]["client"]
    assert [silent in row["clients"] for row in world.rows("round")[1:]] == [True, False, False, False, True, True]
    assert not any(row["skipped"] for row in world.rows("round"))
    world.check()


def test_the_final_evaluation_does_not_wait_for_a_silent_node_either(make: Make) -> None:
    world = make(*GRACE, on_reply=held(100), rounds=(2, 6))
    started = time.monotonic()
    world.run()
    assert time.monotonic() - started < 300
    assert world.rows("end")[0]["status"] == "completed"


def test_replies_that_are_none_do_not_shorten_the_time_of_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answer nonsense before the honest ones answer at all: theirs are waited for, and count."""

    def act(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        partition = context.node_config["partition-id"]
        if partition == 0:
            raise RuntimeError("no data today")
        if partition == 1:
            metric("version", 77)(world, message, context, lambda: reply)
        return reply

    world = make(*PATIENT, "server.grace_seconds=0", act=act, everyone=True, rounds=(2,))
    pull, pulls = FaultyGrid.pull_messages, iter(range(100))

    def slowly(grid: FaultyGrid, message_ids: Iterable[str]) -> Iterator[Message]:
        """One reply at a pull, in the order of names."""
        return pull(grid, sorted(message_ids)[:1] if grid.round == 2 and next(pulls) < 4 else message_ids)

    monkeypatch.setattr(FaultyGrid, "pull_messages", slowly)
    world.run()
    assert world.rows("round")[2]["clients"] == ["00002", "00003"]
    assert kinds(world) == [(2, "error"), (2, "stale")]


def test_grace_begins_with_the_last_of_the_good_replies_that_a_round_needs() -> None:
    with task_identity():
        good, bad = (Message(RecordDict(records), 1, "train") for records in ({"good": ConfigRecord()}, {}))
    grace = Grace(2, 5.0, lambda reply: "good" in reply.content)
    for reply in (good, bad, bad):
        grace.take(reply)
        assert grace.ends() == math.inf and grace.describe(600.0) == "600 s"
    grace.take(good)
    assert grace.ends() == pytest.approx(time.monotonic() + 5.0, abs=1.0)
    ends = grace.ends()
    grace.take(good)
    assert grace.ends() == ends


def test_without_grace_nothing_but_the_timeout_ends_a_round() -> None:
    assert Grace(0, None, lambda reply: True).ends() == math.inf


def test_without_grace_the_same_seed_gives_the_same_bytes_however_slow_a_client_is(make: Make) -> None:
    def slow(world: World, message: Message, context: Context, work: Call) -> Message:
        time.sleep(0.05)
        return work()

    students = [
        (make(*PATIENT, act=act, rounds=(2,)).run().run_dir / "student" / "model.safetensors").read_bytes()
        for act in (None, slow)
    ]
    assert students[0] == students[1]


@pytest.mark.parametrize("seconds", ["-1", ".inf", "soon"])
def test_a_grace_that_is_no_time_is_refused(seconds: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.grace_seconds"):
        experiment_of(f"server.grace_seconds={seconds}")
