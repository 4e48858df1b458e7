"""Every fault of the table, with all clients in every round and with six of twenty."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.faults.table import FAULTS, Fault
from tests.integration.faults.world import ALL_OF_4, SIX_OF_20, World, experiment_of, small_world

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
