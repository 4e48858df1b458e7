"""Every fault of the table, with all clients in every round and with six of twenty."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from flwr.app import Context, Message

from tests.integration.faults.table import FAULTS, Fault, lost_at_random
from tests.integration.faults.world import ALL_OF_4, SIX_OF_20, Call, World, experiment_of, small_world

COHORT_NAMES = {ALL_OF_4: "4 of 4", SIX_OF_20: "6 of 20"}


@pytest.mark.parametrize("cohort", COHORT_NAMES, ids=COHORT_NAMES.values())
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(
    fault: Fault,
    cohort: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("fault", fault.name)
    record_property("cohort", COHORT_NAMES[cohort])
    bomb = tmp_path / "bomb"
    monkeypatch.setenv("FEDKD_TEST_BOMB", str(bomb))
    with small_world(monkeypatch):
        experiment = experiment_of(*cohort, *fault.overrides)
        world = World(
            tmp_path / "run",
            experiment,
            act=fault.act,
            on_round=fault.on_round,
            after_round=fault.after_round,
            on_reply=fault.on_reply,
            on_hello=fault.on_hello,
            rounds=fault.rounds,
            nodes=experiment.num_clients - fault.num_late,
            everyone=fault.everyone,
            authenticated=fault.authenticated,
        )
        world.run()
        kinds = Counter(item["kind"] for item in world.rejected())
        events = [row["event"] for row in world.rows("event")]
        told = [f"{kind} ({number})" for kind, number in kinds.items()] + sorted({event[:48] for event in events})
        record_property("noticed", ", ".join(told) or "nothing is rejected")
        if fault.noticed is None:
            assert not kinds
        else:
            assert fault.noticed in kinds or any(fault.noticed in event for event in events), (kinds, events)
        assert world.rows("end")[0]["status"] == "completed"
        assert not bomb.exists()
        assert fault.act is None or world.memory["struck"] > 0, "the fault did not happen"
        world.check(never_twice=fault.committed, **(fault.prepare(world) if fault.prepare else {}))


def accuracies(world: World) -> list[float]:
    return [row["metrics"]["shared_global"]["accuracy"] for row in world.rows("round")]


@pytest.mark.parametrize("seed", [3, 4])
def test_lost_replies_and_clients_that_return_leave_the_accuracy_where_it_was(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(world: World, message: Message, context: Context, work: Call) -> Message:
        reply = work()
        if context.node_config["partition-id"] in (0, 1, 2) and 6 <= world.grid.round < 14:
            raise ConnectionError("lost on the way, eight times in a row")
        return reply

    with small_world(monkeypatch):
        experiment = experiment_of("num_clients=10", "num_rounds=25", f"seed={seed}")
        worlds = [
            World(tmp_path / str(number), experiment, act=act, everyone=True, rounds=tuple(range(1, 26)))
            for number, act in enumerate((None, lost_at_random, away))
        ]
        whole, lost, returning = (accuracies(world.run()) for world in worlds)
        for world in worlds:
            world.check(never_twice=True)
    assert mean(lost[-10:]) >= mean(whole[-10:]) - 0.01
    assert mean(returning[-10:]) >= mean(whole[-10:]) - 0.01
    assert max(before - after for before, after in pairwise(returning[13:])) <= 0.03
