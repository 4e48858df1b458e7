"""How a run stands, and its event files."""

import os
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedkd_flwr import cli
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.report.status import RunStatus, newest_run, status_of
from fedkd_flwr.report.tensorboard import EVENTS_DIR, _scalars, require_tensorboard, write_events
from tests.conftest import Run, small
from tests.report.test_html_page import HOSTILE, NO_METRICS, START, round_row, written
from tests.test_cli import fedkd

MESSAGE = {"kind": "message", "round": 1, "node": "a", "direction": "uplink", "purpose": "train", "wire_bytes": 2500000}
END = {"kind": "end", "status": "failed", "reason": "2 clients\nwanted"}


def said(status: RunStatus) -> dict[str, str]:
    """The lines of a status by what they are about."""
    stream = StringIO()
    Console(file=stream, width=400).print(status.table())
    lines = [line.split(maxsplit=1) for line in stream.getvalue().splitlines()]
    return {name: rest.strip() for name, rest in lines}


def test_a_run_that_goes_on_is_told_by_its_last_row(tmp_path: Path) -> None:
    rejected = [{"client": "b", "kind": "silent", "reason": "no reply"}] * 2
    metrics = NO_METRICS | {"shared_global": {"accuracy": 0.5, "loss": None}}
    directory = written(
        tmp_path / "run",
        START,
        round_row(0),
        MESSAGE,
        round_row(1, metrics=metrics, rejected=rejected, online={"0": 2, "unknown": 1}, offline=["b"], skipped=True),
    )
    with (directory / LEDGER_FILE).open("a") as file:
        file.write('{"kind": "end", "sta')
    lines = said(status_of(directory))
    assert lines["state"] == "running"
    assert lines["round"] == "1 of 3"
    assert lines["online"] == "3 (2 at version 0, 1 at version unknown)"
    assert lines["offline"] == "b"
    assert lines["bytes"] == "2.500 MB up, 0.000 MB down"
    assert lines["shared"] == "global  accuracy 0.5000"
    assert lines["rejected"] == "silent 2"
    assert lines["skipped"] == "1 (round 1)"


def test_a_ledger_that_does_not_say_who_is_connected_is_not_taken_for_nobody(tmp_path: Path) -> None:
    assert "online" not in said(status_of(written(tmp_path / "run", START, round_row(0))))
    assert said(status_of(written(tmp_path / "run", START, round_row(0, online={}))))["online"] == "0"


def test_a_run_that_ended_says_why_in_one_line(tmp_path: Path) -> None:
    assert status_of(written(tmp_path / "run", START, END)).state == "failed: 2 clients wanted"


def test_a_resumed_run_goes_on_whatever_ended_it_before(tmp_path: Path) -> None:
    resume = {"kind": "resume", "round": 0, "num_rounds": 3}
    assert status_of(written(tmp_path / "run", START, round_row(0), END, resume)).state == "running"


def test_a_ledger_that_is_silent_for_longer_than_a_round_may_take_is_probably_dead(tmp_path: Path) -> None:
    directory = written(tmp_path / "run", START, round_row(0))
    (directory / "config.yaml").write_text(small("server.round_timeout_seconds=100").to_yaml())
    for ago, says in ((150, "running"), (200, "probably dead")):
        os.utime(directory / LEDGER_FILE, (time.time() - ago,) * 2)
        assert says in status_of(directory).state


def test_the_newest_run_of_an_experiment_is_the_one_written_last(tmp_path: Path) -> None:
    for name, when in (("a", 300), ("b", 100), ("c", 200)):
        os.utime(written(tmp_path / name, START) / LEDGER_FILE, (when, when))
    assert newest_run(tmp_path) == tmp_path / "a"
    assert newest_run(tmp_path / "b") == tmp_path / "b"


def test_what_clients_write_moves_no_cursor_and_is_no_markup(tmp_path: Path) -> None:
    rejected = [{"client": "a", "kind": f"[red]{HOSTILE}", "reason": HOSTILE}]
    directory = written(
        tmp_path / "run", START, round_row(1, rejected=rejected, offline=[HOSTILE]), {**END, "reason": HOSTILE}
    )
    lines = said(status_of(directory))
    assert "\x1b" not in str(lines) and "[red]<script>" in lines["rejected"]


def test_status_is_printed_once_and_watching_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = written(tmp_path / "run", START, round_row(0))
    assert fedkd("status", str(tmp_path)) == 0
    assert "running" in capsys.readouterr().out
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: written(directory, START, round_row(0), END))
    assert fedkd("status", str(directory), "--watch", "5") == 0
    assert "failed: 2 clients wanted" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "{}\n", "not json\n", "[]\n", '{"kind": "round"}\n'])
def test_something_else_than_a_run_is_one_line_and_exit_2(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / LEDGER_FILE).write_text(text)
    assert fedkd("status", str(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_counts_its_clients_by_version(run: Run) -> None:
    status = status_of(run())
    assert status.state == "completed"
    assert status.account.num_online == {"3": 3}
    assert status.account.offline == []
    assert [client.version for client in status.account.clients.values()] == [3, 3, 3]


# Event files


def test_event_files_hold_every_number_of_a_round_that_is_one() -> None:
    row = round_row(2, metrics=NO_METRICS | {"shared_local": {"accuracy": 0.5, "loss": None}}, seconds={"encode": 1.5})
    row |= {"train": {"min_divisor": 3.0}, "clients": ["a"], "rejected": [{}, {}], "num_clipped": 1}
    assert _scalars(row) == {
        "shared_local/accuracy": 0.5,
        "seconds/encode": 1.5,
        "train/min_divisor": 3.0,
        "replies/good": 1,
        "replies/rejected": 2,
        "replies/clipped": 1,
    }


def test_a_missing_package_is_one_line_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd_flwr.report.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        require_tensorboard()
    directory = written(tmp_path / "run", START, END)
    (tmp_path / "x.yaml").write_text(small().to_yaml())
    for arguments in (("report", str(directory)), ("run", str(tmp_path / "x.yaml"), "--output-dir", str(tmp_path))):
        assert fedkd(*arguments, "--tensorboard") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.yaml"}
    assert [path.name for path in directory.iterdir()] == [LEDGER_FILE]


def test_a_finished_run_can_be_converted_again_and_again(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = run()
    for _ in range(2):
        assert write_events(directory) == directory / EVENTS_DIR
    events = EventAccumulator(str(directory / EVENTS_DIR))
    events.Reload()
    scores = events.Scalars("shared_global/accuracy")
    assert [event.step for event in scores] == [0, 1, 2, 3, 4]
    assert {"bytes/uplink", "bytes/downlink", "replies/rejected", "train/min_divisor"} <= set(events.Tags()["scalars"])
