import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, LedgerError, MessageRow, Row, environment, read_rows

MESSAGE = MessageRow(
    round=2,
    node="client-7",
    direction="uplink",
    purpose="train",
    payload_bytes=100,
    wire_bytes=180,
    framing_bytes=20,
)


def rows_of(directory: Path) -> list[Row]:
    return list(read_rows(directory / LEDGER_FILE))


def values(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "elapsed_seconds"}


def test_rows_are_read_back_in_the_order_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("start", experiment="x", seed=0)
    ledger.message(MESSAGE)
    ledger.write("end", status="completed")
    ledger.close()
    assert [values(row) for row in rows_of(tmp_path)] == [
        {"kind": "start", "experiment": "x", "seed": 0},
        {
            "kind": "message",
            "round": 2,
            "node": "client-7",
            "direction": "uplink",
            "purpose": "train",
            "payload_bytes": 100,
            "wire_bytes": 180,
            "framing_bytes": 20,
        },
        {"kind": "end", "status": "completed"},
    ]


def test_a_row_can_be_read_before_the_ledger_is_closed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("start")
    assert [row["kind"] for row in rows_of(tmp_path)] == ["start"]
    ledger.close()


def test_a_ledger_opened_again_appends(tmp_path: Path) -> None:
    for kind in ("start", "end"):
        ledger = Ledger(tmp_path)
        ledger.write(kind)
        ledger.close()
    assert [row["kind"] for row in rows_of(tmp_path)] == ["start", "end"]


def test_elapsed_seconds_start_at_zero_and_never_go_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for _ in range(20):
        ledger.write("round")
    ledger.close()
    elapsed = [row["elapsed_seconds"] for row in rows_of(tmp_path)]
    assert 0 <= elapsed[0] < 60
    assert elapsed == sorted(elapsed)


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("start")
    ledger.write("end", status="completed")
    ledger.close()
    path = tmp_path / LEDGER_FILE
    whole = path.read_bytes()
    last_line = whole[whole.index(b"\n") + 1 :]
    for torn in range(1, len(last_line) + 1):
        path.write_bytes(whole[:-torn])
        assert [row["kind"] for row in rows_of(tmp_path)] == ["start"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_can_not_hold_is_stored_as_null_at_any_depth(tmp_path: Path, number: float) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("round", loss=number, metrics={"shared_global": {"loss": number, "accuracy": 0.5}}, losses=[1, number])
    ledger.close()
    text = (tmp_path / LEDGER_FILE).read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    row = json.loads(text)
    assert (row["loss"], row["losses"]) == (None, [1, None])
    assert row["metrics"] == {"shared_global": {"loss": None, "accuracy": 0.5}}


def test_the_listener_hears_every_row_once(tmp_path: Path) -> None:
    heard: list[Row] = []
    ledger = Ledger(tmp_path, heard.append)
    ledger.write("start", seed=3)
    ledger.message(MESSAGE)
    ledger.close()
    assert heard == rows_of(tmp_path)


def test_text_that_is_not_ascii_survives(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("end", reason="größer\nals 1\u2028")
    ledger.close()
    assert rows_of(tmp_path)[0]["reason"] == "größer\nals 1\u2028"


def test_the_environment_names_what_the_run_ran_on() -> None:
    found = environment()
    assert set(found) == {"python", "torch", "flwr", "cpu_count"}
    assert isinstance(found["cpu_count"], int)
    assert found["cpu_count"] >= 1
    assert all(str(found[name])[0].isdigit() for name in ("python", "torch", "flwr"))


def test_a_reopened_ledger_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    first.write("start")
    first.close()
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write('{"kind": "mess')
    second = Ledger(tmp_path)
    second.write("end", status="completed")
    second.close()
    assert [row["kind"] for row in read_rows(tmp_path / LEDGER_FILE)] == ["start", "end"]


def test_numpy_scalars_are_numbers_in_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("round", metrics={"accuracy": np.float32(0.5), "count": np.int64(3), "loss": np.float32("nan")})
    ledger.close()
    row = next(read_rows(tmp_path / LEDGER_FILE))
    assert row["metrics"] == {"accuracy": 0.5, "count": 3, "loss": None}


def test_a_reopened_ledger_counts_on(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    assert (first.wire_bytes, first.last_round, first.training_id, first.num_resumes) == (0, -1, "", 0)
    first.write("start", training_id="0123")
    first.message(MESSAGE)
    first.write("round", round=0)
    first.message(MESSAGE)
    first.write("round", round=1)
    first.message(MESSAGE)
    first.close()
    counted = (540, 1, "0123", 0)
    assert (first.wire_bytes, first.last_round, first.training_id, first.num_resumes) == counted
    second = Ledger(tmp_path)
    assert (second.wire_bytes, second.last_round, second.training_id, second.num_resumes) == counted
    second.write("resume", round=1, num_rounds=5)
    second.message(MESSAGE)
    second.write("round", round=2)
    second.close()
    third = Ledger(tmp_path)
    third.write("resume", round=2, num_rounds=5)
    third.close()
    assert (third.wire_bytes, third.last_round, third.training_id, third.num_resumes) == (720, 2, "0123", 2)


def test_elapsed_seconds_of_a_reopened_ledger_go_on_and_leave_the_pause_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    ledger = Ledger(tmp_path)
    now = 107.5
    ledger.write("round", round=0)
    ledger.close()
    now = 9.0  # of another boot
    ledger = Ledger(tmp_path)
    ledger.write("resume")
    now = 10.0
    ledger.write("end", status="completed")
    ledger.close()
    assert [row["elapsed_seconds"] for row in rows_of(tmp_path)] == [7.5, 7.5, 8.5]


def test_a_torn_line_of_an_earlier_process_counts_for_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.message(MESSAGE)
    ledger.write("round", round=3)
    ledger.close()
    path = tmp_path / LEDGER_FILE
    path.write_bytes(path.read_bytes()[:-1])
    ledger = Ledger(tmp_path)
    assert (ledger.wire_bytes, ledger.last_round) == (180, -1)
    ledger.close()


def test_a_ledger_that_is_one_torn_line_begins_again(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text('{"kind": "sta')
    ledger = Ledger(tmp_path)
    ledger.write("start", training_id="0123")
    ledger.close()
    assert [row["kind"] for row in rows_of(tmp_path)] == ["start"]
    assert ledger.training_id == "0123"


def test_a_listener_of_a_reopened_ledger_hears_new_rows_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("start")
    ledger.close()
    heard: list[Row] = []
    ledger = Ledger(tmp_path, heard.append)
    ledger.write("resume")
    ledger.close()
    assert [row["kind"] for row in heard] == ["resume"]


def test_what_was_written_can_be_made_durable_while_the_ledger_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    ledger = Ledger(tmp_path)
    ledger.write("start")
    ledger.make_durable()
    assert len(synced) == 1
    ledger.close()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\x00" * 40,
        b"\xff\xfe",
        b"[" * 5000,
        b"[1]",
        b"7",
        b"{}",
        b'{"kind": "round"}',
        b'{"kind": 1, "elapsed_seconds": 2}',
    ],
    ids=["torn", "zeros", "no text", "nested", "a list", "a number", "empty", "no time", "no kind"],
)
def test_a_damaged_line_is_named_with_its_file(tmp_path: Path, line: bytes) -> None:
    row = b'{"kind": "event", "elapsed_seconds": 0.5}'
    path = tmp_path / LEDGER_FILE
    path.write_bytes(row + b"\n" + line + b"\n" + row + b"\n")
    before = path.read_bytes()
    for reader in (lambda: list(read_rows(path)), lambda: Ledger(tmp_path)):
        with pytest.raises(LedgerError) as caught:
            reader()
        said = str(caught.value)
        assert said.startswith(f"line 2 of {str(path)!r} is damaged")
        assert "delete that line" in said
        assert "\n" not in said
    assert path.read_bytes() == before
