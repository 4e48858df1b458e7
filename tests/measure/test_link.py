"""Bytes into time: by hand, and whatever the speeds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client_app
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.forecast import forecast
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.measure.link import NetworkOptions, network_of, transfer_of
from fedkd_flwr.report import read_run
from tests.conftest import Run, small

SLOW_UP = NetworkOptions(uplink_mbps=1.0, downlink_mbps=10.0, latency_ms=50.0)


def message(number: int, node: str, direction: str, wire: int, framing: int = 0) -> dict[str, Any]:
    return {
        "kind": "message",
        "round": number,
        "node": node,
        "direction": direction,
        "wire_bytes": wire,
        "framing_bytes": framing,
    }


ROWS = [
    message(0, "-", "downlink", 500),
    message(0, "-", "downlink", 500),
    message(1, "a", "downlink", 1_250_000),
    message(1, "a", "uplink", 100_000, framing=25_000),
    message(1, "b", "downlink", 1_250_000),  # and no answer
    {"kind": "round", "round": 1},
    message(2, "b", "downlink", 0),
    message(2, "b", "uplink", 250_000),
]
MESSAGES = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from("ab-"), st.sampled_from(["uplink", "downlink"]), st.integers(0, 10**7)
    ),
    max_size=12,
)


def test_a_round_takes_as_long_as_its_slowest_client_by_hand() -> None:
    # Round 1: a has 1 s down and 1 s up and two latencies; b has the download alone. Greetings are of two clients.
    found = transfer_of(ROWS, SLOW_UP)
    assert found.by_round == {0: pytest.approx(0.0504), 1: pytest.approx(2.1), 2: pytest.approx(2.1)}
    assert found.seconds == pytest.approx(4.2504)


@pytest.mark.parametrize(("deadline", "late"), [(2.05, {1: 1, 2: 1}), (1.0, {1: 2, 2: 1}), (3.0, {}), (None, {})])
def test_clients_beyond_the_deadline_are_counted_by_round(deadline: float | None, late: dict[int, int]) -> None:
    assert transfer_of(ROWS, SLOW_UP.model_copy(update={"round_deadline_s": deadline})).late_by_round == late


def test_half_the_uplink_doubles_the_upload_alone() -> None:
    narrow = SLOW_UP.model_copy(update={"uplink_mbps": 0.5})
    assert narrow.seconds(125_000, "uplink") == pytest.approx(2.05)
    assert narrow.seconds(125_000, "downlink") == SLOW_UP.seconds(125_000, "downlink")


@given(MESSAGES, st.floats(0.1, 1000), st.floats(0.1, 1000))
def test_a_faster_link_is_never_slower(drawn: list[tuple[int, str, str, int]], up: float, down: float) -> None:
    rows = [message(*each) for each in drawn]
    slow = transfer_of(rows, NetworkOptions(uplink_mbps=up, downlink_mbps=down)).seconds
    fast = transfer_of(rows, NetworkOptions(uplink_mbps=2 * up, downlink_mbps=3 * down)).seconds
    half = transfer_of(rows, NetworkOptions(uplink_mbps=up / 2, downlink_mbps=down / 2)).seconds
    assert fast <= slow
    assert half == pytest.approx(2 * slow)


def test_a_run_says_what_its_bytes_take_and_is_otherwise_as_without(run: Run) -> None:
    with_link, without = (
        run("network={uplink_mbps: 0.1, downlink_mbps: 1, latency_ms: 20}", "num_rounds=2"),
        run("num_rounds=2"),
    )
    summaries = [json.loads((run_dir / "summary.json").read_text()) for run_dir in (with_link, without)]
    assert "transfer" not in summaries[1]
    assert summaries[0]["metrics"] == summaries[1]["metrics"] and summaries[0]["bytes"] == summaries[1]["bytes"]
    transfer = summaries[0]["transfer"]
    link = NetworkOptions(uplink_mbps=0.1, downlink_mbps=1, latency_ms=20)
    expected = transfer_of(read_rows(with_link / LEDGER_FILE), link)
    assert transfer["seconds"] == pytest.approx(expected.seconds, abs=1e-3) and transfer["seconds"] > 1
    assert list(transfer["seconds_by_round"]) == ["0", "1", "2", "3"]
    assert read_run(with_link).network == link and read_run(without).network is None


def test_a_run_that_is_resumed_counts_the_seconds_of_both_parts(run: Run, tmp_path: Path) -> None:
    link = "network={uplink_mbps: 0.1, downlink_mbps: 1}"
    straight, resumed = run(link, "num_rounds=3"), tmp_path / "resumed"
    run_in_process(small(link, "num_rounds=2"), client_app.app, resumed)
    run_in_process(small(link, "num_rounds=3"), client_app.app, resumed, resume=True, force=True)
    found, whole = (json.loads((run_dir / "summary.json").read_text())["transfer"] for run_dir in (resumed, straight))
    # The first part ended with an evaluation, which has the number of the round that came next, and clients were
    # greeted once more; all of that came one after the other.
    assert found["seconds"] > whole["seconds"]
    found_by_round, by_round = found["seconds_by_round"], whole["seconds_by_round"]
    assert found_by_round["1"] == pytest.approx(by_round["1"], rel=0.1)  # of two rounds in all, the second is coarser
    assert found_by_round["3"] > by_round["3"] + 0.1
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_round"].values()), abs=0.01)


def test_tries_of_a_round_before_and_after_a_resume_come_one_after_the_other() -> None:
    rows = [
        message(3, "a", "uplink", 125_000),
        message(3, "b", "uplink", 12_500),
        {"kind": "resume", "round": 2},
        message(3, "a", "uplink", 12_500),
        message(3, "b", "uplink", 125_000),
    ]
    link = NetworkOptions(uplink_mbps=1, downlink_mbps=1, round_deadline_s=1.5)
    found = transfer_of(rows, link)
    assert found.by_round == {3: pytest.approx(2.0)} and found.seconds == pytest.approx(2.0)
    assert found.late_by_round == {}
    assert transfer_of(rows, link.model_copy(update={"round_deadline_s": 0.5})).late_by_round == {3: 2}


def test_a_greeting_and_its_answer_follow_one_another() -> None:
    rows = [message(0, "-", "downlink", 125_000), message(0, "-", "uplink", 125_000)]
    link = NetworkOptions(uplink_mbps=1, downlink_mbps=1)
    assert transfer_of(rows, link).seconds == pytest.approx(2.0)
    assert transfer_of([*rows, message(0, "-", "downlink", 125_000)], link).seconds == pytest.approx(2.0)


def test_a_run_that_is_resumed_over_another_link_is_told_over_that(run: Run, tmp_path: Path) -> None:
    directory, now = tmp_path / "resumed", NetworkOptions(uplink_mbps=50, downlink_mbps=50)
    run_in_process(small("network={uplink_mbps: 0.1, downlink_mbps: 1}", "num_rounds=1"), client_app.app, directory)
    changed = small("network={uplink_mbps: 50, downlink_mbps: 50}", "num_rounds=2")
    run_in_process(changed, client_app.app, directory, resume=True, force=True)
    assert read_run(directory).network == now
    assert read_run(directory).summary["transfer"]["link"] == now.describe()
    assert network_of([{"kind": "start", "network": now.model_dump()}, {"kind": "resume"}]) == now  # of an older commit


@pytest.mark.parametrize("algorithm", ["fedkd", "mixfld"])
def test_what_is_forecast_of_a_round_is_what_it_takes(algorithm: str, run: Run) -> None:
    changes = [
        f"algorithm.name={algorithm}",
        "compressor={name: identity}",
        "network={uplink_mbps: 0.1, downlink_mbps: 1}",
    ]
    said = forecast(small(*changes)).describe()
    found = re.search(r"; ([\d.]+) s of transfer in each round over", said)
    assert found
    by_round = read_run(run(*changes)).summary["transfer"]["seconds_by_round"]
    assert float(found[1]) == pytest.approx(by_round["2"], rel=0.1)


def test_curves_have_seconds_that_grow_with_the_bytes(run: Run) -> None:
    curve = read_run(run("num_rounds=2")).curve()
    assert len(curve.seconds) == len(curve.scores) == 3
    assert curve.seconds == sorted(curve.seconds) and curve.seconds[-1] > curve.seconds[0] > 0


def test_a_link_without_speed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"network\.uplink_mbps: must be greater than 0, got 0"):
        small("network={uplink_mbps: 0, downlink_mbps: 1}")
