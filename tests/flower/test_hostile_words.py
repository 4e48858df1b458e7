"""What clients say in words reaches log, ledger, checkpoint and screen as one short printable line."""

import logging
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message

import client_app
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import small
from tests.flower.test_exchange import rows_of

ESCAPES = "\x1b[2J\x1b]0;root\x07 \u202eelif\u202c \u200b"
WORDS = "x" * 1_000_000 + "\r" + ESCAPES + "x" * 5000
SPEAKERS = {1: "query.hello", 2: "train", 3: "evaluate"}  # node, and the messages that it answers with an error


def app(message: Message, context: Context) -> Message:
    kind = message.metadata.message_type
    if SPEAKERS.get(int(context.node_config["partition-id"])) != kind:
        return client_app.app(message, context)
    if kind == "train":
        raise RuntimeError(WORDS)
    return Message(Error(2, WORDS), reply_to=message)


def test_words_of_clients_cost_their_replies_and_stay_one_short_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = small("num_clients=4", "num_rounds=1", "server.connect_timeout_seconds=1", "server.min_available=3")
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        run_dir = run_in_process(experiment, app, tmp_path / "run")
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["status"] == "completed"
    [final] = rows_of(run_dir, "final")
    trained = rows_of(run_dir, "round")[1]
    events = [row["event"] for row in rows_of(run_dir, "event")]
    assert trained["clients"] == ["00000", "00003"]
    assert final["clients"] == ["00000", "00002"]
    assert (run_dir / LEDGER_FILE).stat().st_size < 50_000
    assert max(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*") if file.is_file()) < 500_000
    reasons = [item["reason"] for item in trained["rejected"] + final["rejected"]]
    said = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 2
    assert len(events) == 1
    assert len(said) >= 3
    for line in (*said, *reasons, *events):
        assert line.isprintable()
        assert len(line) < 600
        assert r"\x1b[2J\x1b]0;root\x07 \u202eelif\u202c \u200bxxx" in line
