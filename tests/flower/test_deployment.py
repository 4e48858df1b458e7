"""What the demo says of its bytes and its time."""

import json
from pathlib import Path

import pytest

from fedkd_flwr.flower.deployment import Deployed, _deployed


def test_bytes_are_messages_with_framing_and_seconds_those_between_rounds(tmp_path: Path) -> None:
    rows = [
        {"kind": "start", "elapsed_seconds": 1.0},
        {"kind": "message", "wire_bytes": 700, "framing_bytes": 200, "elapsed_seconds": 2.0},
        {"kind": "round", "elapsed_seconds": 10.0},
        {"kind": "message", "wire_bytes": 90, "framing_bytes": 0, "elapsed_seconds": 11.0},
        {"kind": "round", "elapsed_seconds": 18.0},
        {"kind": "round", "elapsed_seconds": 22.0},
        {"kind": "end", "elapsed_seconds": 99.0},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    deployed = _deployed(tmp_path, {"inbound-bytes": 600, "outbound-bytes": 400})
    assert deployed == Deployed(990, 1000, (8.0, 4.0))
    assert deployed.difference == pytest.approx(-0.01)
    assert deployed.lines() == [
        "bytes: 990 by the ledger (messages and framing), 1000 by Flower; difference -1.00 %",
        "seconds per round: 6.0 (first 8.0)",
    ]
