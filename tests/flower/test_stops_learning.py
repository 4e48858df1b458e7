"""A run that no longer learns says so, and one broken update costs its reply or its round and nothing else."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

import client_app
from fedkd_flwr.algorithms.base import MeanUpdateServer
from fedkd_flwr.flower.early_stop import Tally
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.server import STUDENT_DIR
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import Run, small
from tests.flower.conftest import Make
from tests.flower.test_exchange import client, misbehaving, rows_of, trains_in
from tests.integration.faults.table import all_largest, payload, wild_statistics
from tests.integration.faults.test_server_crashes import on_call, run_until_killed, same_end
from tests.integration.faults.world import Call, World, experiment_of
from tests.payloads import change_payload


def power_cut(world: World, message: Message, context: Context, work: Call) -> Message:
    raise RuntimeError("power cut")


def failing(*rounds: int) -> dict[str, object]:
    return {"act": power_cut, "everyone": True, "rounds": rounds}


def status(world: World) -> str:
    return str(world.rows("end")[-1]["status"])


def test_five_skipped_rounds_in_a_row_end_the_run_with_the_first_reason_and_how_to_go_on(make: Make) -> None:
    world = make("num_rounds=9", **failing(*range(3, 10)))
    with pytest.raises(RunError, match="5 rounds in a row were skipped") as caught:
        world.run()
    assert "server.max_skipped_rounds" in str(caught.value)
    assert "first reason: RuntimeError: power cut" in str(caught.value)
    assert f"when it is mended: fedkd resume {world.run_dir};" in str(caught.value)
    assert [row["round"] for row in world.rows("round") if row["skipped"]] == [3, 4, 5, 6, 7]
    assert status(world) == "failed" and not (world.run_dir / STUDENT_DIR).exists()
    World(world.run_dir, world.experiment).run(resume=True)
    assert status(world) == "completed"
    assert [row["round"] for row in world.rows("round")] == list(range(10))


def test_the_command_that_resumes_a_run_is_quoted_for_a_shell() -> None:
    tally = Tally(1, Path("/my results/run"))
    tally.take(skipped=True, reason="")
    with pytest.raises(RunError, match="fedkd resume '/my results/run';"):
        tally.require_learning()
    with pytest.raises(RunError, match="fedkd resume '/my results/run' --force"):
        tally.require_learned(2, "")


def test_a_resumed_run_counts_its_skipped_rounds_anew(make: Make) -> None:
    world = make("num_rounds=9", "server.max_skipped_rounds=2", **failing(*range(3, 10)))
    for last in (4, 6):
        with pytest.raises(RunError, match="2 rounds in a row were skipped"):
            world.run(resume=last > 4)
        assert world.rows("round")[-1]["round"] == last


def test_skipped_rounds_between_good_ones_do_not_add_up(make: Make) -> None:
    world = make("num_rounds=7", "server.max_skipped_rounds=2", **failing(2, 4, 6)).run()
    assert status(world) == "completed"


def test_a_run_whose_last_rounds_were_all_skipped_is_not_completed_by_resuming_it(make: Make) -> None:
    world = make("num_rounds=4", "server.max_skipped_rounds=2", **failing(3, 4))
    with pytest.raises(RunError, match="2 rounds in a row were skipped"):
        world.run()
    remedy = re.escape(f"no round is left: fedkd resume {world.run_dir} --force --set num_rounds=")
    with pytest.raises(RunError, match=f"the last 2 rounds were skipped; first reason: .*power cut; {remedy}"):
        world.run(resume=True)
    longer = World(world.run_dir, experiment_of("num_rounds=6", "server.max_skipped_rounds=2"), force=True)
    longer.run(resume=True)
    assert status(longer) == "completed"


@pytest.mark.parametrize(
    ("overrides", "end"),
    [((), "no round is left"), (("server.early_stop.max_wire_bytes=20000",), r"\d+ bytes moved, another round")],
)
def test_a_short_run_in_which_no_round_counted_has_failed(make: Make, overrides: tuple[str, ...], end: str) -> None:
    world = make("num_rounds=4", *overrides, **failing(1, 2, 3, 4))
    with pytest.raises(RunError, match=f"no round had 2 good replies; first reason: RuntimeError: power cut; {end}"):
        world.run()
    assert len(world.rows("round")) > 1
    assert status(world) == "failed"


@pytest.mark.parametrize(
    "algorithm", ["{name: local_only, model: student}", "{name: fd, model: student, local: {batch_size: 128}}"]
)
def test_algorithms_without_a_shared_model_fail_alike(run: Run, algorithm: str, tmp_path: Path) -> None:
    def fails(message: Message, context: Context) -> None:
        raise RuntimeError("no data today")

    with pytest.raises(RunError, match=r"3 rounds in a row were skipped.*no data today"):
        run(f"algorithm={algorithm}", "num_rounds=4", "server.max_skipped_rounds=3", app=misbehaving(fails))
    [run_dir] = tmp_path.iterdir()
    assert rows_of(run_dir, "end")[0]["status"] == "failed"


# One update that is too long, where hardly any is known


@pytest.mark.parametrize("excess", ["reject", "clip"])
def test_one_finite_update_of_1e30_leaves_the_student_as_good_as_without_it(run: Run, excess: str) -> None:
    overrides = ("num_clients=2", "num_rounds=2", "compressor.name=identity", f"server.validation.excess_norm={excess}")

    def app(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if trains_in(message, 1) and client(context) == 1:
            wires = runtime_of(small(*overrides)).wires
            assert wires is not None
            huge = {tensor.name: np.full(tensor.shape, 1e30, np.float32) for tensor in wires.uplink.spec}
            payload, _ = wires.uplink.encode(huge, wires.uplink.initial_state(), progress=0.0, seed=0)
            change_payload(reply.content, lambda _: payload, checksum=True)
        return reply

    run_dir = run(*overrides, app=app)
    first, second = rows_of(run_dir, "round")[1:]
    assert first["skipped"] == (excess == "reject") and not second["skipped"]
    assert [item["kind"] for item in first["rejected"]] == (["norm"] if excess == "reject" else [])
    assert all(math.isfinite(value) for value in second["metrics"]["shared_global"].values())
    assert rows_of(run_dir, "end")[0]["status"] == "completed"


@pytest.mark.parametrize("overrides", [("num_clients=2",), ("server.num_train=2",)], ids=["2 clients", "num_train 2"])
@pytest.mark.parametrize("numbers", [all_largest, wild_statistics], ids=["parameters", "statistics"])
def test_an_endless_update_in_a_first_round_of_two_costs_that_round(
    make: Make, overrides: tuple[str, ...], numbers: Callable[[bytes], bytes]
) -> None:
    world = make(*overrides, act=payload(numbers), rounds=(1,)).run()
    assert [item["kind"] for item in world.rejected()] == ["norm"]
    assert [row["skipped"] for row in world.rows("round")] == [False, True, *[False] * 5]
    assert status(world) == "completed"
    assert world.rows("final")[0]["metrics"]["shared_global"]["accuracy"] > 0.7
    world.check()


def test_honest_clients_of_very_different_sizes_are_believed_two_by_two(run: Run) -> None:
    run_dir = run(
        *("task.partition={name: size, growth: exponential}", "num_clients=5", "algorithm.local.batch_size=16"),
        *("server.num_train=2", "server.validation.max_examples_ratio=null"),
    )
    assert not [row for row in rows_of(run_dir, "round") if row["rejected"] or row["skipped"]]


# A version that can't be used


BREAKING = ("server.validation.max_norm_ratio=null",)


def test_a_version_whose_own_score_is_no_number_is_never_taken(make: Make) -> None:
    world = make(*BREAKING, act=payload(wild_statistics), rounds=(3,)).run()
    rows = world.rows("round")
    assert [row["skipped"] for row in rows] == [False, False, False, True, False, False, False]
    [rejected] = world.rejected()
    assert (rejected["client"], rejected["kind"]) == ("server", "aggregate")
    assert rejected["reason"].startswith("the next version's loss on the server's test set is")
    assert all(math.isfinite(value) for row in rows for value in row["metrics"]["shared_global"].values())
    assert rows[3]["version"] == rows[2]["version"] == 2 and rows[-1]["version"] == 5
    world.check(never_twice=True)


def test_a_version_that_was_not_taken_has_moved_nothing(make: Make) -> None:
    """Killed after that round and resumed, it ends in the bytes of a run that was not killed."""
    rule = ("server.aggregator.name=fedadam", "server.aggregator.eta=0.05")  # has moments to spoil
    hooks = {"act": payload(wild_statistics), "rounds": (3,)}
    whole, broken = make(*BREAKING, *rule, **hooks).run(), make(*BREAKING, *rule, **hooks)
    assert [row["round"] for row in whole.rows("round") if row["skipped"]] == [3]
    run_until_killed(broken, on_call(Exchange, "_close_round", 5, before=True))
    broken.run(resume=True)
    same_end(whole, broken)


def test_a_run_whose_every_version_is_broken_exports_none(make: Make) -> None:
    world = make(*BREAKING, "num_rounds=3", act=payload(wild_statistics), rounds=(1, 2, 3))
    with pytest.raises(RunError, match="no round had 2 good replies; first reason: the next version's loss"):
        world.run()
    assert not (world.run_dir / STUDENT_DIR).exists()
    assert read_summary(world.run_dir)["status"] == "failed"  # type: ignore[index]


def test_every_version_is_scored_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[None] = []
    evaluate = MeanUpdateServer.evaluate

    def counted(*arguments: object) -> object:
        scored.append(None)
        return evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MeanUpdateServer, "evaluate", counted)
    world = make(**failing(2)).run()
    assert len(scored) == 6  # version 0 and one for each round that counted
    assert world.rows("round")[2]["metrics"]["shared_global"] == world.rows("round")[1]["metrics"]["shared_global"]
