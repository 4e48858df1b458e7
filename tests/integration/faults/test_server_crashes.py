"""The server's process ends where it may not be expected to; a later one goes on to the same bytes."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

import client_app
from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower import archive
from fedkd_flwr.flower.checkpoint import CHECKPOINTS_DIR, Checkpoints
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.mailbox import Mailbox
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.measure.ledger import LEDGER_FILE
from tests.conftest import small
from tests.integration.faults.world import ALL_OF_4, SIX_OF_20, Call, World, experiment_of, small_world

Hook = Callable[[pytest.MonkeyPatch], None]


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a copy of this process; its id. The copy never returns from here."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def run_until_killed(world: World, hook: Hook) -> None:
    """Run in another process, with something in it that kills it."""

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            hook(patch)
            world.run()

    _, status = os.waitpid(in_a_child(work), 0)
    assert os.WIFSIGNALED(status), "the run was not killed: the fault did not happen"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: Any, name: str, number: int, *, before: bool) -> Hook:
    """Kill the process at the n-th call of a method, before it begins or after it has ended."""

    def hook(patch: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), [0]

        def deadly(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if before and calls[0] == number:
                kill()
            result = real(*arguments, **options)
            if calls[0] == number:
                kill()
            return result

        patch.setattr(owner, name, deadly)

    return hook


def during_the_write(number: int) -> Hook:
    """Kill the process when half of a checkpoint is written."""

    def hook(patch: pytest.MonkeyPatch) -> None:
        real, calls = archive.save_file, [0]

        def deadly(arrays: Any, path: Path, **options: Any) -> None:
            real(arrays, path, **options)
            calls[0] += path.parent.name == CHECKPOINTS_DIR
            if calls[0] == number and path.parent.name == CHECKPOINTS_DIR:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                kill()

        patch.setattr(archive, "save_file", deadly)

    return hook


CRASHES = {
    "before the first checkpoint": on_call(Checkpoints, "save", 1, before=True),
    "after the choice of clients, before a message": on_call(Mailbox, "exchange", 4, before=True),
    "a client is killed before it commits": on_call(ClientStore, "commit", 6, before=True),
    "a client is killed between its commit and its reply": on_call(ClientStore, "commit", 6, before=False),
    "after all replies, before the aggregate": on_call(Exchange, "aggregate_train", 3, before=True),
    "between aggregate and checkpoint": on_call(Reference, "advance", 3, before=False),
    "during the write of a checkpoint": during_the_write(4),
    "between checkpoint and the ledger's row": on_call(Checkpoints, "save", 4, before=False),
    "between checkpoint and the next message": on_call(Exchange, "_close_round", 4, before=False),
    "during the final evaluation": on_call(Exchange, "aggregate_evaluate", 1, before=True),
}


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    with small_world(monkeypatch):
        yield lambda name, *overrides: World(tmp_path / name, experiment_of(*overrides))


def same_end(world: World, other: World) -> None:
    """Both ended with the same student, the same teachers, and the same final metrics."""
    student = Path("student") / "model.safetensors"
    assert (world.run_dir / student).read_bytes() == (other.run_dir / student).read_bytes()
    assert world.checkpoint().parts["reference"].facts == other.checkpoint().parts["reference"].facts
    assert world.rows("final")[-1]["metrics"] == other.rows("final")[-1]["metrics"]
    mine, theirs = world.states(), other.states()
    assert mine.keys() == theirs.keys()
    for key, state in mine.items():
        for name, value in state.private.items():
            assert value.tobytes() == theirs[key].private[name].tobytes(), (key, name)


@pytest.mark.parametrize("cohort", [ALL_OF_4, SIX_OF_20], ids=["4 of 4", "6 of 20"])
@pytest.mark.parametrize("crash", CRASHES)
def test_a_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    crash: str,
    cohort: tuple[str, ...],
    worlds: Callable[..., World],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("fault", f"server killed: {crash}")
    record_property("cohort", "4 of 4" if cohort == ALL_OF_4 else "6 of 20")
    record_property("noticed", "resumed to the same bytes")
    whole, broken = worlds("whole", *cohort).run(), worlds("broken", *cohort)
    run_until_killed(broken, CRASHES[crash])
    broken.run(resume=True)
    same_end(whole, broken)
    numbers = [row["round"] for row in broken.rows("round")]
    assert numbers == list(range(broken.experiment.num_rounds + 1))
    assert broken.rows("end")[-1]["status"] == "completed"


def flaky(world: World, message: Message, context: Context, work: Call) -> Message:
    """Fails by round and name, in a third of all cases: half of them before it committed, half of them after."""
    chance = random.Random(f"{world.grid.round} {context.node_config['partition-id']}").random()
    if chance < 1 / 6:
        raise RuntimeError("before it committed")
    reply = work()
    if chance < 1 / 3:
        raise ConnectionError("after it committed")
    return reply


@pytest.mark.parametrize("killed_round", [3, 5, 6])
def test_a_round_that_was_interrupted_asks_the_same_clients_again(
    killed_round: int, worlds: Callable[..., World]
) -> None:
    def world(name: str) -> World:
        made = worlds(name, *SIX_OF_20, "server.max_resyncs_per_round=1")
        made.act, made.everyone, made.rounds = flaky, True, tuple(range(1, 8))
        return made

    whole, broken = world("whole").run(), world("broken")
    run_until_killed(broken, on_call(Exchange, "aggregate_train", killed_round, before=True))
    broken.run(resume=True)
    assert [row["sampled"] for row in broken.rows("round")] == [row["sampled"] for row in whole.rows("round")]
    same_end(whole, broken)


def test_a_run_killed_again_and_again_arrives(worlds: Callable[..., World]) -> None:
    whole, broken = worlds("whole").run(), worlds("broken")
    run_until_killed(broken, on_call(Reference, "advance", 1, before=False))
    for _ in range(3):
        broken_again = World(broken.run_dir, broken.experiment)
        resumed = World.run

        def work(world: World = broken_again, run: Any = resumed) -> None:
            with pytest.MonkeyPatch.context() as patch:
                on_call(Checkpoints, "save", 2, before=True)(patch)
                run(world, resume=True)

        _, status = os.waitpid(in_a_child(work), 0)
        assert os.WIFSIGNALED(status)
    broken.run(resume=True)
    same_end(whole, broken)


@pytest.mark.parametrize("aggregator", ["fedavgm", "fedadam"])
def test_moments_of_a_server_optimiser_survive(aggregator: str, worlds: Callable[..., World]) -> None:
    chosen = (f"server.aggregator.name={aggregator}", "server.aggregator.eta=0.05")
    whole, broken = worlds("whole", *chosen).run(), worlds("broken", *chosen)
    run_until_killed(broken, on_call(Reference, "advance", 4, before=False))
    broken.run(resume=True)
    same_end(whole, broken)


def test_a_damaged_newest_checkpoint_costs_one_round(worlds: Callable[..., World]) -> None:
    world = worlds("run")
    run_until_killed(world, on_call(Checkpoints, "save", 5, before=False))
    newest = sorted((world.run_dir / CHECKPOINTS_DIR).iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    world.run(resume=True)
    assert world.rows("end")[-1]["status"] == "completed"
    assert world.rows("round")[-1]["version"] == world.experiment.num_rounds


def test_a_torn_ledger_is_cut_and_goes_on(worlds: Callable[..., World]) -> None:
    whole, world = worlds("whole").run(), worlds("run")
    run_until_killed(world, on_call(Exchange, "_close_round", 3, before=False))
    with (world.run_dir / LEDGER_FILE).open("a") as ledger:
        ledger.write('{"kind": "mess')
    world.run(resume=True)
    same_end(whole, world)


def test_a_full_disk_on_the_server_fails_loudly_and_can_be_resumed(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, world = worlds("whole").run(), worlds("run")
    save, calls = archive.save_file, [0]

    def full(arrays: Any, path: Path, **options: Any) -> None:
        calls[0] += path.parent.name == CHECKPOINTS_DIR
        if calls[0] == 4 and path.parent.name == CHECKPOINTS_DIR:
            raise OSError(28, "No space left on device")
        save(arrays, path, **options)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="checkpoint of round 3 can't be written"):
        patch.setattr(archive, "save_file", full)
        world.run()
    assert world.rows("end")[-1]["status"] == "failed"
    world.run(resume=True)
    same_end(whole, world)


def test_a_second_server_on_the_same_run_is_refused_while_the_first_lives(worlds: Callable[..., World]) -> None:
    world = worlds("run")
    child = in_a_child(World(world.run_dir, world.experiment, on_round=_wait).run)
    try:
        while not (world.run_dir / LEDGER_FILE).exists():
            time.sleep(0.01)
        with pytest.raises(RunError, match="in use by a run that is still going on"):
            world.run(resume=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _wait(world: World, number: int) -> None:
    time.sleep(60)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_all_resume_to_the_same_student(tmp_path: Path) -> None:
    experiment: Experiment = small("num_rounds=10")
    run_in_process(experiment, client_app.app, tmp_path / "whole")
    length = (tmp_path / "whole" / LEDGER_FILE).stat().st_size
    student = (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
    choose = random.Random(0)
    ended_alike = 0
    for number in range(20):
        run_dir = tmp_path / f"run{number}"
        child = in_a_child(lambda directory=run_dir: run_in_process(experiment, client_app.app, directory))  # type: ignore[misc]
        # Moments are spread over the ledger, not over time: a busy machine changes how long a run takes.
        moment = choose.uniform(0, 0.95) * length
        while not (run_dir / LEDGER_FILE).exists() or (run_dir / LEDGER_FILE).stat().st_size < moment:
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        run_in_process(experiment, client_app.app, run_dir, resume=True)
        ended_alike += (run_dir / "student" / "model.safetensors").read_bytes() == student
    assert ended_alike == 20
