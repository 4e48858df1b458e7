"""Epsilon of a run, from rows of its ledger, beside what other ways of counting give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, read_rows
from fedkd_flwr.measure.privacy_account import PrivacyAccount, epsilon_of
from fedkd_flwr.measure.summary import summarise
from tests.conftest import Run

DELTA = 1e-5


def facts(**changes: Any) -> dict[str, Any]:
    standard = {
        "noise_multiplier": 2.0,
        "delta": DELTA,
        "adjacency": "zero_out",
        "noise_by": "clients",
        "is_mean": True,
        "share_metrics": False,
    }
    return standard | changes


def asked(node: str, purpose: str = "train", direction: str = "downlink") -> dict[str, Any]:
    return {"kind": "message", "node": node, "purpose": purpose, "direction": direction}


def closed(number: int, *clients: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "round", "round": number, "skipped": False, "clients": list(clients), **changes}


def account(rows: list[dict[str, Any]], **changes: Any) -> PrivacyAccount:
    found = PrivacyAccount(facts(**changes))
    for row in rows:
        found.take(row)
    return found


def exact_epsilon(multiplier: float, delta: float) -> float:
    """Where the curve of Balle and Wang 2018 (theorem 8) passes through delta; written down here anew."""

    def excess(epsilon: float) -> float:
        a, b = 0.5 / multiplier - epsilon * multiplier, -0.5 / multiplier - epsilon * multiplier
        return norm.cdf(a) - math.exp(epsilon + norm.logcdf(b)) - delta  # type: ignore[no-any-return]

    return float(brentq(excess, 0.0, 10_000.0))


def library_epsilon(multiplier: float, num_trainings: int) -> float:
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(multiplier), num_trainings))
    return float(accountant.get_epsilon(DELTA))


@settings(max_examples=25, deadline=None)
@given(multiplier=st.floats(0.3, 20.0), delta=st.sampled_from([1e-9, 1e-5, 1e-3]))
def test_epsilon_of_one_release_is_that_of_the_exact_curve(multiplier: float, delta: float) -> None:
    assert epsilon_of(multiplier, delta) == pytest.approx(exact_epsilon(multiplier, delta), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_trainings", [1, 4, 20])
def test_trainings_compose_as_the_library_composes_them(num_trainings: int) -> None:
    spent = account([asked("a")] * num_trainings).spent()
    assert spent["epsilon_server"] == pytest.approx(library_epsilon(2.0, num_trainings), rel=1e-3)
    loose = RdpAccountant()
    loose.compose(SelfComposedDpEvent(GaussianDpEvent(2.0), num_trainings))
    assert spent["epsilon_server"] <= loose.get_epsilon(DELTA)


def test_a_private_run_spends_what_the_library_counts_for_its_messages(run: Run) -> None:
    run_dir = run(
        "privacy={clip_norm: 0.5, noise_multiplier: 0.8, adjacency: zero_out}",
        "compressor={name: transform_coding, bytes_per_round: 4000}",
    )
    rows = list(read_rows(run_dir / LEDGER_FILE))
    trainings = [r for r in rows if r["kind"] == "message" and (r["purpose"], r["direction"]) == ("train", "downlink")]
    each = {name: sum(row["node"] == name for row in trainings) for name in {row["node"] for row in trainings}}
    assert set(each.values()) == {3}
    spent = json.loads((run_dir / "summary.json").read_text())["privacy"]
    assert spent["epsilon_server"] == pytest.approx(library_epsilon(0.8, 3), rel=1e-3)
    assert spent["epsilon_released"] == pytest.approx(library_epsilon(0.8 * math.sqrt(3 - 1), 3), rel=1e-3)
    assert spent == rows[-2]["privacy"]
    assert [row["privacy"]["num_trainings"] for row in rows if row["kind"] == "round"] == [0, 1, 2, 3]


def test_only_requests_to_train_count_and_of_the_client_with_the_most() -> None:
    rows = [
        asked("a"),
        asked("a"),
        asked("b"),
        asked("c", "hello"),
        asked("c", "evaluate"),
        asked("b", direction="uplink"),
    ]
    assert account(rows).spent()["num_trainings"] == 2


def test_a_replaced_client_moves_an_update_twice_as_far_as_one_left_out() -> None:
    replaced, left_out = (account([asked("a")], adjacency=kind).spent() for kind in ("replace", "zero_out"))
    assert replaced["epsilon_server"] == pytest.approx(epsilon_of(1.0, DELTA))
    assert left_out["epsilon_server"] == pytest.approx(epsilon_of(2.0, DELTA))


def test_what_is_released_has_the_noise_of_all_replies_but_the_observers_own() -> None:
    spent = account([closed(1, "a", "b", "c", "d", "e"), closed(2, "a")]).spent()
    # Rounds of 5 and of 1 replies: z is 4 and 2 there, and 1 / sqrt(1/16 + 1/4) together.
    assert spent["epsilon_released"] == pytest.approx(epsilon_of((1 / 16 + 1 / 4) ** -0.5, DELTA))


def test_of_two_replies_the_other_client_sees_what_the_server_sees() -> None:
    spent = account([asked("a"), asked("b"), closed(1, "a", "b")]).spent()
    assert spent["epsilon_released"] == spent["epsilon_server"]


def test_what_was_disclosed_in_a_round_that_was_never_closed_counts_in_the_summary(run: Run) -> None:
    run_dir = run("privacy={clip_norm: 0.5, noise_multiplier: 0.8}", "compressor={name: identity}", "num_rounds=2")
    rows = list(read_rows(run_dir / LEDGER_FILE))
    closes = [index for index, row in enumerate(rows) if row["kind"] == "round"]
    ended = [*rows[: closes[-1]], {"kind": "end", "status": "stopped", "elapsed_seconds": 1.0}]
    assert rows[closes[-2]]["privacy"]["num_trainings"] == 1
    assert summarise(ended)["privacy"]["num_trainings"] == 2


def test_skipped_rounds_and_the_state_before_training_release_nothing() -> None:
    rows = [closed(0), closed(1, "a", "b", skipped=True)]
    assert account(rows).spent()["epsilon_released"] == 0.0


def test_a_server_with_noise_promises_nothing_towards_itself() -> None:
    spent = account([asked("a"), closed(1, "a", "b", "c")], noise_by="server").spent()
    assert spent["epsilon_server"] is None
    assert spent["epsilon_released"] == pytest.approx(epsilon_of(2.0, DELTA))
    assert any("scores" in what for what in spent["outside"])


@pytest.mark.parametrize(
    "changes", [{"num_clipped": 1}, {"rejected": [{"kind": "norm"}]}, {"rejected": [{"kind": "payload"}]}]
)
def test_where_replies_were_chosen_by_what_is_in_them_nothing_is_claimed_of_what_is_released(
    changes: dict[str, Any],
) -> None:
    spent = account([asked("a"), closed(1, "a", "b", **changes), closed(2, "a", "b")]).spent()
    assert spent["epsilon_released"] is None
    assert spent["epsilon_server"] is not None


def test_a_silent_client_costs_nobody_the_claim() -> None:
    rows = [closed(1, "a", "b", rejected=[{"kind": "silent"}, {"kind": "late"}])]
    assert account(rows).spent()["epsilon_released"] is not None


def test_other_rules_than_a_mean_get_no_claim_of_what_is_released() -> None:
    assert account([closed(1, "a", "b")], is_mean=False).spent()["epsilon_released"] is None


def test_without_noise_there_is_no_bound_once_somebody_has_trained() -> None:
    assert account([], noise_multiplier=0.0).spent()["epsilon_server"] == 0.0
    spent = account([asked("a"), closed(1, "a", "b")], noise_multiplier=0.0).spent()
    assert spent["epsilon_server"] is None
    assert spent["epsilon_released"] is None


def test_a_forecast_is_what_a_run_without_trouble_spends() -> None:
    rows = [row for number in (1, 2, 3) for row in (asked("a"), asked("b"), closed(number, "a", "b"))]
    found = account(rows)
    assert found.forecast(3, 2) == found.spent()


def test_a_ledger_that_is_opened_again_goes_on_counting(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    first.write("start", training_id="t", privacy=facts())
    first.write("message", **{k: v for k, v in asked("a").items() if k != "kind"}, wire_bytes=1)
    first.close()
    again = Ledger(tmp_path)
    again.write("message", **{k: v for k, v in asked("a").items() if k != "kind"}, wire_bytes=1)
    assert again.privacy is not None
    assert again.privacy.num_trainings == 2
    again.close()
