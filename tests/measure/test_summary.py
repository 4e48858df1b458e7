import json
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, Row
from fedkd_flwr.measure.summary import SUMMARY_FILE, read_summary, summarise, write_summary

NUM_TEACHER, NUM_STUDENT = 1000, 200
START: Row = {
    "kind": "start",
    "elapsed_seconds": 0.0,
    "experiment": "made-up",
    "training_id": "0123",
    "task": "digits",
    "algorithm": "fedkd",
    "exchanges": "updates",
    "compressor": "svd",
    "aggregator": "fedavg",
    "seed": 5,
    "num_clients": 2,
    "num_rounds": 2,
    "num_teacher_parameters": NUM_TEACHER,
    "num_student_parameters": NUM_STUDENT,
    "environment": {"python": "3.11", "torch": "2", "flwr": "1.41", "cpu_count": 2},
}
END: Row = {"kind": "end", "elapsed_seconds": 9.5, "status": "completed", "reason": ""}

# Written out from DESIGN.md, section 6: tools read these names, so a new or a missing one is a broken promise.
KEYS: dict[str, Any] = {
    "experiment": None,
    "task": None,
    "algorithm": None,
    "compressor": None,
    "aggregator": None,
    "seed": None,
    "num_clients": None,
    "num_rounds": None,
    "status": None,
    "metrics": {
        "shared_global": {"accuracy": None, "loss": None},
        "shared_local": {"accuracy": None, "loss": None},
        "private_local": {"accuracy": None, "loss": None},
        "ensemble_local": {"accuracy": None, "loss": None},
    },
    "bytes": {
        "uplink": None,
        "downlink": None,
        "total": None,
        "per_client": None,
        "dense_teacher_equivalent": None,
        "dense_student_equivalent": None,
        "reduction_vs_dense_teacher": None,
    },
    "seconds": {"wall": None, "client_train": None, "encode": None, "decode": None, "aggregate": None},
    "environment": {"python": None, "torch": None, "flwr": None, "cpu_count": None},
    "spread": {},
    "rejected": {},
    "stopped_early": None,
}


def message(direction: str, purpose: str, wire_bytes: int) -> Row:
    return {
        "kind": "message",
        "elapsed_seconds": 1.0,
        "round": 1,
        "node": "a",
        "direction": direction,
        "purpose": purpose,
        "payload_bytes": wire_bytes // 2,
        "wire_bytes": wire_bytes,
        "framing_bytes": 7,
    }


def measured(kind: str, elapsed: float, metrics: Row, **seconds: float) -> Row:
    return {"kind": kind, "elapsed_seconds": elapsed, "round": 1, "metrics": metrics, "seconds": seconds}


def scores(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "loss": 1 - accuracy}


ROUND_1 = measured("round", 2.0, {"shared_global": scores(0.5)}, client_train=1.0, encode=0.25, decode=0.5)
ROUND_2 = measured("round", 4.0, {"shared_global": scores(0.625)}, client_train=2.0, encode=0.25, aggregate=0.125)
FINAL = measured(
    "final",
    6.0,
    {"shared_local": scores(0.75), "private_local": scores(0.875), "ensemble_local": scores(0.9375)},
    decode=0.5,
)
ROWS = [
    START,
    message("downlink", "hello", 10),
    message("uplink", "hello", 20),
    message("downlink", "train", 100),
    message("uplink", "train", 300),
    message("downlink", "train", 100),
    message("uplink", "train", 301),
    ROUND_1,
    # This client got its work and never answered: the work counts all the same.
    message("downlink", "train", 150),
    ROUND_2,
    message("downlink", "evaluate", 40),
    message("uplink", "evaluate", 60),
    FINAL,
    END,
]


def tree(value: object) -> object:
    return {key: tree(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_the_keys_are_exactly_the_promised_ones() -> None:
    assert tree(summarise(ROWS)) == KEYS
    assert list(summarise(ROWS)) == list(KEYS)


def test_the_facts_are_those_of_the_start_row() -> None:
    summary = summarise(ROWS)
    facts = ("experiment", "task", "algorithm", "compressor", "aggregator", "seed", "num_clients", "num_rounds")
    assert {fact: summary[fact] for fact in facts} == {fact: START[fact] for fact in facts}
    assert summary["environment"] == START["environment"]


def test_every_message_counts_whatever_it_was_for() -> None:
    found = summarise(ROWS)["bytes"]
    assert found["uplink"] == 20 + 300 + 301 + 60
    assert found["downlink"] == 10 + 100 + 100 + 150 + 40
    assert found["total"] == 681 + 400
    assert found["per_client"] == 540  # 1081 / 2, halves to even


def test_the_dense_equivalents_are_two_float32_copies_for_each_training_message() -> None:
    found = summarise(ROWS)["bytes"]
    assert found["dense_teacher_equivalent"] == 3 * 2 * 4 * NUM_TEACHER
    assert found["dense_student_equivalent"] == 3 * 2 * 4 * NUM_STUDENT
    assert found["reduction_vs_dense_teacher"] == pytest.approx(1 - 1081 / 24_000)


def test_moving_more_than_the_dense_teacher_is_a_negative_reduction() -> None:
    found = summarise([START, message("downlink", "train", 16_000), END])["bytes"]
    assert found["reduction_vs_dense_teacher"] == pytest.approx(-1.0)


def test_without_training_there_is_nothing_to_be_smaller_than() -> None:
    found = summarise([START, message("downlink", "hello", 10), END])["bytes"]
    assert (found["dense_teacher_equivalent"], found["reduction_vs_dense_teacher"]) == (0, None)


def test_metrics_are_the_last_of_each_scope() -> None:
    assert summarise(ROWS)["metrics"] == {
        "shared_global": scores(0.625),
        "shared_local": scores(0.75),
        "private_local": scores(0.875),
        "ensemble_local": scores(0.9375),
    }


def test_a_scope_that_was_never_measured_is_null() -> None:
    assert summarise([START, ROUND_1, END])["metrics"] == {
        "shared_global": scores(0.5),
        "shared_local": None,
        "private_local": None,
        "ensemble_local": None,
    }


def test_a_round_without_metrics_leaves_the_earlier_ones() -> None:
    skipped = measured("round", 3.0, {"shared_global": None, "shared_local": {}})
    assert summarise([START, ROUND_1, skipped, END])["metrics"]["shared_global"] == scores(0.5)


def test_seconds_add_up_over_rounds() -> None:
    expected = {"wall": 9.5, "client_train": 3.0, "encode": 0.5, "decode": 1.0, "aggregate": 0.125}
    assert summarise(ROWS)["seconds"] == expected


@pytest.mark.parametrize("status", ["completed", "failed", "stopped"])
def test_the_status_is_that_of_the_end_row(status: str) -> None:
    assert summarise([START, END | {"status": status}])["status"] == status


def test_a_run_without_an_end_row_is_unfinished_and_lasted_until_its_last_row() -> None:
    summary = summarise(ROWS[:-1])
    assert summary["status"] == "unfinished"
    assert summary["seconds"]["wall"] == 6.0
    assert summary["bytes"] == summarise(ROWS)["bytes"]


def test_an_empty_ledger_is_a_summary_of_nothing() -> None:
    summary = summarise([])
    assert summary.keys() == KEYS.keys()
    assert (summary["status"], summary["experiment"], summary["bytes"]["total"]) == ("unfinished", None, 0)


def test_the_summary_of_a_ledger_file_is_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    returned = write_summary(tmp_path)
    assert returned == summarise(ROWS) == read_summary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LEDGER_FILE, SUMMARY_FILE])


def test_a_summary_is_written_again_over_the_old_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("start", experiment="x")
    assert write_summary(tmp_path)["status"] == "unfinished"
    ledger.write("end", status="completed")
    ledger.close()
    write_summary(tmp_path)
    found = read_summary(tmp_path)
    assert found is not None
    assert found["status"] == "completed"


def test_a_diverged_loss_is_null_in_the_summary(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write("round", metrics={"shared_global": {"accuracy": 0.1, "loss": float("nan")}}, seconds={})
    ledger.close()
    assert write_summary(tmp_path)["metrics"]["shared_global"] == {"accuracy": 0.1, "loss": None}


def test_a_directory_without_a_summary_has_none(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None


# Replies that did not count


def rejecting(row: Row, *kinds: str) -> Row:
    return row | {"rejected": [{"client": "a", "kind": kind, "reason": "because"} for kind in kinds]}


def test_replies_that_did_not_count_are_counted_by_kind_over_all_rounds() -> None:
    rows = [START, rejecting(ROUND_1, "silent", "norm"), rejecting(ROUND_2, "silent"), rejecting(FINAL, "error"), END]
    found = summarise(rows)["rejected"]
    assert found == {"error": 1, "norm": 1, "silent": 2}
    assert list(found) == sorted(found)


# Spread


def test_a_spread_is_the_last_of_each_scope_that_was_measured() -> None:
    def of(median: float) -> dict[str, dict[str, float]]:
        return {"accuracy": {"p10": 0.0, "median": median, "p90": 1.0}}

    rows = [
        START,
        ROUND_1 | {"spread": {"shared_local": of(0.25), "private_local": of(0.5)}},
        FINAL | {"spread": {"shared_local": of(0.75), "private_local": None}},
        END,
    ]
    assert summarise(rows)["spread"] == {"shared_local": of(0.75), "private_local": of(0.5)}


# Going on, and stopping


def resumption(num_rounds: int, elapsed: float = 10.0) -> Row:
    return {"kind": "resume", "elapsed_seconds": elapsed, "round": 2, "num_rounds": num_rounds}


def test_a_run_that_is_resumed_is_unfinished_again_and_has_the_new_number_of_rounds() -> None:
    summary = summarise([*ROWS, resumption(8), message("uplink", "train", 19) | {"elapsed_seconds": 12.0}])
    assert (summary["status"], summary["num_rounds"], summary["seconds"]["wall"]) == ("unfinished", 8, 12.0)
    assert (summary["experiment"], summary["seed"]) == (START["experiment"], START["seed"])
    assert summary["bytes"]["total"] == 1081 + 19


def test_a_resumed_run_ends_as_its_last_end_says() -> None:
    failed = END | {"status": "failed"}
    again = ROUND_2 | {"elapsed_seconds": 14.0}
    summary = summarise([*ROWS[:-1], failed, resumption(2), again, END | {"elapsed_seconds": 15.0}])
    assert (summary["status"], summary["seconds"]["wall"]) == ("completed", 15.0)
    assert summary["seconds"]["client_train"] == 5.0  # work that was done twice was done twice


def test_why_a_run_stopped_early_is_said_and_null_where_it_did_not() -> None:
    stopped = FINAL | {"stopped_early": "accuracy 0.9 is at least 0.8"}
    assert summarise([START, ROUND_1, stopped, END])["stopped_early"] == "accuracy 0.9 is at least 0.8"
    assert summarise([START, ROUND_1, FINAL | {"stopped_early": ""}, END])["stopped_early"] is None


def test_a_run_that_stopped_early_and_went_on_did_not_stop_early() -> None:
    stopped = FINAL | {"stopped_early": "enough"}
    rows = [START, ROUND_1, stopped, END, resumption(3), ROUND_2, FINAL | {"stopped_early": ""}, END]
    assert summarise(rows)["stopped_early"] is None


def test_a_round_done_twice_counts_once_and_its_messages_twice() -> None:
    first = measured("round", 1.0, {"shared_global": {"accuracy": 0.1}}, encode=1.0) | {
        "rejected": [{"client": "a", "kind": "late", "reason": ""}]
    }
    again = measured("round", 2.0, {"shared_global": {"accuracy": 0.2}}, encode=3.0)
    sent = message("uplink", "train", 100)
    found = summarise([START, sent, first, resumption(2) | {"round": 0}, sent, again])
    assert found["metrics"]["shared_global"] == {"accuracy": 0.2}
    assert found["seconds"]["encode"] == 3.0
    assert found["rejected"] == {}
    assert found["bytes"]["uplink"] == 200
