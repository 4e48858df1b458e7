"""What a ledger adds up to: the stable `summary.json`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedkd_flwr.core.arrays import FLOAT_BYTES
from fedkd_flwr.disk import write_whole
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.measure.link import Transfer, network_of, transfer_of
from fedkd_flwr.measure.metrics import SCOPES
from fedkd_flwr.measure.privacy_account import PrivacyAccount

SUMMARY_FILE = "summary.json"
SECONDS = ("client_train", "encode", "decode", "aggregate")
BOTH_WAYS = 2
LATER_FACTS = ("leaves", "majority")  # of the start row; ledgers of earlier versions have none


def without_repeats(rows: Iterable[Row]) -> list[Row]:
    """The rows, without those of rounds that a resumed run did once more because their checkpoint was lost."""
    kept: list[Row] = []
    for row in rows:
        if row["kind"] == "resume":
            kept = [earlier for earlier in kept if earlier["kind"] != "round" or earlier["round"] <= row["round"]]
        kept.append(row)
    return kept


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """The summary of a run, from its ledger alone.

    Bytes are those of every serialised message, whatever it was for. `dense_teacher_equivalent` is what FedAvg of the
    teacher would have moved with the same participation: two float32 copies of its trainable parameters for each
    training message; `dense_student_equivalent` likewise. `rejected` counts replies that did not count, by kind.
    `leaves` says what leaves a client, `majority` what always answering the largest class scores, where the ledger
    has them.
    """
    start: Row = {}
    end: Row = {"status": "unfinished", "elapsed_seconds": 0.0}
    wire = {"uplink": 0, "downlink": 0}
    seconds = dict.fromkeys(SECONDS, 0.0)
    num_trainings = 0
    metrics: dict[str, Any] = dict.fromkeys(SCOPES)
    spread: dict[str, Any] = {}
    rejected: dict[str, int] = {}
    stopped_early = ""
    privacy: Row | None = None
    rows = list(rows)
    for row in without_repeats(rows):
        if row["kind"] == "start":
            start = row
        elif row["kind"] == "message":
            wire[row["direction"]] += row["wire_bytes"]
            num_trainings += row["purpose"] == "train" and row["direction"] == "downlink"
        elif row["kind"] in ("round", "final"):
            metrics |= {scope: row["metrics"][scope] for scope in SCOPES if row["metrics"].get(scope)}
            spread |= {scope: values for scope, values in row.get("spread", {}).items() if values}
            for rejection in row.get("rejected", ()):
                rejected[rejection["kind"]] = rejected.get(rejection["kind"], 0) + 1
            stopped_early = row.get("stopped_early", "")
            privacy = row.get("privacy")
            for name in SECONDS:
                seconds[name] += row["seconds"].get(name) or 0.0
        # A run without an `end` row after its last start is unfinished; it lasted until its last row.
        if row["kind"] in ("start", "resume"):
            end = {"status": "unfinished"}
            start = start | {"num_rounds": row.get("num_rounds")}
        end = row if row["kind"] == "end" else end | {"elapsed_seconds": row["elapsed_seconds"]}
    if privacy is not None and start.get("privacy"):
        privacy = _disclosed(rows, start["privacy"], privacy)
    link = network_of(rows)
    facts = ("experiment", "task", "algorithm", "compressor", "aggregator", "seed", "num_clients", "num_rounds")
    return {
        **{fact: start.get(fact) for fact in facts},
        "status": end["status"],
        "metrics": metrics,
        "bytes": _bytes(start, wire, num_trainings),
        "seconds": {"wall": end["elapsed_seconds"], **{k: round(v, 4) for k, v in seconds.items()}},
        "environment": start.get("environment"),
        "spread": spread,
        "rejected": dict(sorted(rejected.items())),
        "stopped_early": stopped_early or None,
        **({"privacy": privacy} if privacy else {}),
        **({"transfer": _transfer(transfer_of(rows, link))} if link else {}),
        **{fact: start[fact] for fact in LATER_FACTS if start.get(fact)},
    }


def _disclosed(rows: Iterable[Row], facts: Mapping[str, Any], last: Row) -> Row:
    """What clients have disclosed at the very end: after the last closed round some may have trained once more."""
    account = PrivacyAccount(facts)
    for row in rows:
        account.take(row)
    try:
        return account.spent()
    except ImportError:  # read where the run was not
        return last


def _transfer(transfer: Transfer) -> dict[str, Any]:
    return {
        "link": transfer.link.describe(),
        "seconds": round(transfer.seconds, 3),
        "seconds_by_round": {str(number): round(seconds, 3) for number, seconds in transfer.by_round.items()},
        "late_by_round": {str(number): count for number, count in transfer.late_by_round.items()},
    }


def _bytes(start: Row, wire: Mapping[str, int], num_trainings: int) -> dict[str, Any]:
    total = wire["uplink"] + wire["downlink"]
    dense_copy = BOTH_WAYS * FLOAT_BYTES * num_trainings
    dense_teacher = dense_copy * start.get("num_teacher_parameters", 0)
    return {
        "uplink": wire["uplink"],
        "downlink": wire["downlink"],
        "total": total,
        "per_client": round(total / start.get("num_clients", 1)),
        "dense_teacher_equivalent": dense_teacher,
        "dense_student_equivalent": dense_copy * start.get("num_student_parameters", 0),
        "reduction_vs_dense_teacher": 1 - total / dense_teacher if dense_teacher else None,
    }


def write_summary(directory: Path) -> dict[str, Any]:
    """Write summary.json beside the ledger, whole or not at all, and return it."""
    summary = summarise(read_rows(directory / LEDGER_FILE))
    write_whole(directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None where there is none."""
    path = directory / SUMMARY_FILE
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary
