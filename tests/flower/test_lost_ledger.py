"""A run that lost its ledger, or found an older one, goes on counting what was disclosed and moved."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

import client_app
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.budget import account_of, go_on_counting
from fedkd_flwr.flower.checkpoint import Checkpoints, Choice
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger
from fedkd_flwr.measure.privacy_account import epsilon_of
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import small
from tests.flower.test_exchange import misbehaving, rows_of, trains_in
from tests.measure.test_privacy_account import DELTA, asked, closed, facts

EPSILON_OF_3_ROUNDS, ALMOST_OF_4 = (epsilon_of(number**-0.5, DELTA) for number in (3.0, 3.9))
EXPERIMENT = (
    f"privacy={{clip_norm: 1.0, noise_multiplier: 2.0, max_epsilon: {ALMOST_OF_4}}}",
    *("compressor.name=identity", "num_rounds=6", "num_clients=2", "server.max_skipped_rounds=1"),
)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with noise that has asked everybody three times, and failed in the third round."""

    def fails(message: Message, context: Context) -> None:
        if trains_in(message, 3):
            raise RuntimeError("power cut")

    run_dir = tmp_path_factory.mktemp("private") / "run"
    with pytest.raises(RunError, match="power cut"):
        run_in_process(small(*EXPERIMENT), misbehaving(fails), run_dir)
    return run_dir


def keep_lines(count: Callable[[list[str]], int]) -> Callable[[Path], None]:
    def damage(ledger: Path) -> None:
        lines = ledger.read_text().splitlines(keepends=True)
        ledger.write_text("".join(lines[: count(lines)]))

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "intact": lambda ledger: None,
    "deleted": Path.unlink,
    "emptied": lambda ledger: ledger.write_text("") and None,
    "truncated": lambda ledger: ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2]) and None,
    "of an earlier round": keep_lines(
        lambda lines: next(i for i, line in enumerate(lines) if '"round": 1, "v' in line)
    ),
    "of the beginning": keep_lines(lambda lines: 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_epsilon_is_what_it_was_and_the_budget_is_kept(broken_off: Path, tmp_path: Path, damage: str) -> None:
    run_dir = shutil.copytree(broken_off, tmp_path / "run")
    DAMAGES[damage](run_dir / LEDGER_FILE)
    run_in_process(small(*EXPERIMENT), client_app.app, run_dir, resume=True)
    summary = read_summary(run_dir)
    assert summary is not None and summary["status"] == "completed"
    assert summary["privacy"]["num_trainings"] == 3
    assert summary["privacy"]["epsilon_server"] == pytest.approx(EPSILON_OF_3_ROUNDS)
    assert summary["stopped_early"].startswith("another round would bring epsilon from")
    assert rows_of(run_dir, "final")[-1]["privacy"] == summary["privacy"]
    assert bool(rows_of(run_dir, "account")) == (damage != "intact")


def test_without_ledger_and_account_nothing_is_claimed(broken_off: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(broken_off, tmp_path / "run")
    (run_dir / LEDGER_FILE).unlink()
    checkpoints = Checkpoints(run_dir, 1)
    newest = checkpoints.latest()
    assert newest is not None
    parts = {name: part for name, part in newest.parts.items() if name != "account"}
    checkpoints.save(type(newest)(newest.server_round, newest.training_id, parts, newest.row))
    with pytest.raises(RunError, match=r"the ledger of '.*' is lost, .* put ledger\.jsonl back, or start a new run"):
        run_in_process(small(*EXPERIMENT), client_app.app, run_dir, resume=True)


# The account alone


def ledger_of(directory: Path, rows: list[dict[str, object]]) -> Ledger:
    directory.mkdir()
    ledger = Ledger(directory)
    ledger.write("start", training_id="t", privacy=facts())
    for row in rows:
        values = {key: value for key, value in row.items() if key != "kind"}
        ledger.write(str(row["kind"]), **values, **({"wire_bytes": 10} if row["kind"] == "message" else {}))
    return ledger


ROUNDS = [asked("a"), asked("b"), closed(1, "a", "b"), asked("a"), asked("c"), closed(2, "a", "c", num_clipped=1)]


@pytest.mark.parametrize("num_left", range(len(ROUNDS) + 1))
def test_whatever_is_left_of_a_ledger_the_account_says_the_same(tmp_path: Path, num_left: int) -> None:
    whole, part = ledger_of(tmp_path / "whole", ROUNDS), ledger_of(tmp_path / "part", ROUNDS[:num_left])
    assert whole.privacy is not None and part.privacy is not None
    go_on_counting(part, account_of(whole), None, 2, 1)
    again = Ledger(tmp_path / "part")
    assert again.privacy is not None
    assert part.privacy.spent() == again.privacy.spent() == whole.privacy.spent()
    assert part.wire_bytes == again.wire_bytes == whole.wire_bytes == 40


def test_an_account_that_is_older_than_the_ledger_takes_nothing_away(tmp_path: Path) -> None:
    whole, older = ledger_of(tmp_path / "whole", ROUNDS), ledger_of(tmp_path / "older", ROUNDS[:3])
    rows = (tmp_path / "whole" / LEDGER_FILE).read_text()
    go_on_counting(whole, account_of(older), None, 1, 1)
    assert (tmp_path / "whole" / LEDGER_FILE).read_text() == rows


@pytest.mark.parametrize(("num_left", "expected"), [(len(ROUNDS), 3), (0, 5)])
def test_who_was_chosen_after_the_checkpoint_counts_as_asked(tmp_path: Path, num_left: int, expected: int) -> None:
    """Once where the ledger is whole, and as often as allowed where it was lost, which alone knew of further tries."""
    whole, found = ledger_of(tmp_path / "whole", ROUNDS), ledger_of(tmp_path / "found", ROUNDS[:num_left])
    go_on_counting(found, account_of(whole), Choice(3, ("a",), ()), 2, 3)
    assert found.privacy is not None and found.privacy.num_trainings == expected


def test_a_choice_of_a_round_that_is_closed_adds_nothing(tmp_path: Path) -> None:
    whole = ledger_of(tmp_path / "whole", ROUNDS)
    go_on_counting(whole, account_of(whole), Choice(2, ("a", "c"), ()), 2, 3)
    go_on_counting(whole, None, Choice(3, ("a", "c"), ()), 2, 3)
    assert whole.privacy is not None and whole.privacy.num_trainings == 2


def test_no_bound_survives_as_no_bound(tmp_path: Path) -> None:
    whole = ledger_of(tmp_path / "whole", [])
    account = Archive(
        {"wire_bytes": 0, "disclosed": {"num_trainings": {}, "released": {"a": None}, "released_holds": True}}
    )
    go_on_counting(whole, account, None, 1, 1)
    assert whole.privacy is not None and whole.privacy.spent()["epsilon_released"] is None
