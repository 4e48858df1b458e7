"""Clipping and noise: what leaves is bounded, noisy, on the grid, and nothing else leaves."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import client_app
from fedkd_flwr.core.arrays import Arrays, TensorSpec
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.budget import check_accounting
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.records import TRAIN, HelloReply, Instruction, Reply
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row, read_rows
from fedkd_flwr.privacy import PrivacyOptions, privatised, standard_normal
from tests.conftest import Run, small

NOISY = (
    "privacy={clip_norm: 0.5, noise_multiplier: 0.5}",
    "compressor={name: transform_coding, bytes_per_round: 4000}",
)


def update(scale: float, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": (scale * rng.standard_normal((5, 7))).astype(np.float32), "b": np.float32(scale * rng.random(3))}


def norm(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.sum(np.float64(value) ** 2)) for value in arrays.values()))


def noiseless(count: int) -> bytes:
    """All words zero: the radius of every pair is zero, and so is the noise."""
    return bytes(count)


@settings(max_examples=100)
@given(
    scale=st.floats(1e-20, 1e15),
    clip=st.floats(1e-6, 1e6),
    multiplier=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 9),
)
def test_no_update_is_longer_than_the_bound_before_noise(
    scale: float, clip: float, multiplier: float, seed: int
) -> None:
    options = PrivacyOptions(clip_norm=clip, noise_multiplier=multiplier)
    clipped = privatised(update(scale, seed), options, noiseless)
    assert norm(clipped) <= clip * (1 + 1e-6)  # what is sent is float32


def test_a_short_update_is_moved_by_its_noise_alone() -> None:
    short = update(0.01)
    clipped = privatised(short, PrivacyOptions(clip_norm=1.0, noise_multiplier=1.0), noiseless)
    for name, value in short.items():
        np.testing.assert_allclose(clipped[name], value, atol=2.0**-20)


def test_a_long_update_keeps_its_direction() -> None:
    long = update(100.0)
    clipped = privatised(long, PrivacyOptions(clip_norm=1.0, noise_multiplier=0.0))
    assert norm(clipped) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(clipped["a"] / clipped["a"][0, 0], long["a"] / long["a"][0, 0], rtol=1e-5)


def test_noise_is_normal_with_the_deviation_that_was_asked_for() -> None:
    zeros = {"a": np.zeros((300, 100), np.float32)}
    noisy = privatised(zeros, PrivacyOptions(clip_norm=0.2, noise_multiplier=3.0))["a"].ravel() / 0.6
    assert stats.kstest(noisy, "norm").pvalue > 1e-6
    again = privatised(zeros, PrivacyOptions(clip_norm=0.2, noise_multiplier=3.0))["a"].ravel() / 0.6
    assert abs(np.corrcoef(noisy, again)[0, 1]) < 0.05


def test_a_model_with_statistics_is_refused_whoever_adds_the_noise() -> None:
    spec = (TensorSpec("w", (3,)), TensorSpec("running_mean", (3,), "buffer"))
    noisy = "server.aggregator={name: dp_fixed_clipping, clipping_norm: 1.0, noise_multiplier: 1.0}"
    for change, key in (("privacy={clip_norm: 1.0, noise_multiplier: 1.0}", "privacy"), (noisy, "server.aggregator")):
        with pytest.raises(ConfigError, match=rf"^{key}: must be .* for a model with statistics, .* got running_mean"):
            small(change, "compressor={name: identity}").build_codec(spec, "uplink")


def test_a_budget_that_one_round_of_all_its_attempts_can_exceed_is_refused_before_it() -> None:
    changes = ["privacy={clip_norm: 1.0, noise_multiplier: 0.5, max_epsilon: 30.0}", "compressor={name: identity}"]
    check_accounting(small(*changes))
    with pytest.raises(
        ConfigError, match=r"one round can take .* asked up to 2 times \(server\.num_attempts\), got 30"
    ):
        check_accounting(small(*changes, "server.num_attempts=2"))


def test_halves_of_a_draw_are_independent() -> None:
    drawn = standard_normal(20_000)
    assert abs(np.corrcoef(drawn[:10_000], drawn[10_000:])[0, 1]) < 0.06
    assert abs(np.corrcoef(drawn[:10_000] ** 2, drawn[10_000:] ** 2)[0, 1]) < 0.06


def test_an_odd_count_and_none_at_all_are_drawn() -> None:
    assert standard_normal(3).shape == (3,)
    assert standard_normal(0).shape == (0,)


def test_what_leaves_lies_on_the_same_grid_whatever_the_update_was() -> None:
    options = PrivacyOptions(clip_norm=1.0, noise_multiplier=1.0)
    for scale in (0.0, 1e-9, 0.123):
        noisy = privatised({"a": np.full(1000, scale, np.float32)}, options)["a"].astype(np.float64)
        on_grid = noisy[np.abs(noisy) < 8] * 2.0**20  # float32 holds the grid exactly up to there
        np.testing.assert_array_equal(on_grid, np.rint(on_grid))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    broken = update(1.0)
    broken["b"][1] = bad
    with pytest.raises(ValueError, match="b"):
        privatised(broken, PrivacyOptions(clip_norm=1.0, noise_multiplier=1.0))


def rows_of(run_dir: Path) -> list[Row]:
    return list(read_rows(run_dir / LEDGER_FILE))


def test_a_private_run_tells_nothing_but_noisy_updates(run: Run) -> None:
    run_dir = run(*NOISY)
    rows = rows_of(run_dir)
    for row in rows:
        if row["kind"] in ("round", "final"):
            assert row["train"] is None
            assert {scope for scope, scores in row["metrics"].items() if scores} == {"shared_global"}
            assert set(row["seconds"]) <= {"decode", "aggregate", "encode", "evaluate"}  # the server's own
    assert sum(row["kind"] == "round" and not row["skipped"] for row in rows) == 4


def test_every_client_claims_one_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: set[tuple[int, int]] = set()
    for kind in (HelloReply, Reply):
        original = kind.to_records

        def seen(self: object, original: object = original) -> object:
            told.add((self.num_examples, self.num_test_examples))  # type: ignore[attr-defined]
            return original(self)  # type: ignore[operator]

        monkeypatch.setattr(kind, "to_records", seen)
    run_in_process(small(*NOISY), client_app.app, tmp_path / "run")
    assert told == {(1, 1)}


def test_shared_metrics_are_listed_as_outside_epsilon(run: Run) -> None:
    run_dir = run("privacy={clip_norm: 0.5, noise_multiplier: 0.5, share_metrics: true}", NOISY[1])
    last = [row for row in rows_of(run_dir) if row["kind"] == "round"][-1]
    assert last["metrics"]["private_local"]
    assert "numbers of examples" in last["privacy"]["outside"]


def test_two_private_runs_of_one_seed_differ(run: Run) -> None:
    first, second = (rows_of(run(*NOISY))[-2]["metrics"]["shared_global"]["loss"] for _ in range(2))
    assert first != second


def test_a_reply_asked_for_again_has_the_same_noise(tmp_path: Path) -> None:
    """A client that drew new noise each time would let its update be found by averaging."""
    private = small(*NOISY)
    built = runtime_of(private)
    config = {"config-text": private.to_yaml(), "state-dir": str(tmp_path)}
    context = Context(1, 1000, {"partition-id": 1}, RecordDict(), config)

    def payload(attempt: int) -> bytes | None:
        asked = Instruction("00112233aabbccdd", 1, attempt, 0, built.lineage, 0.0, 0, 0)
        with task_identity():
            message = client_app.app(Message(asked.to_records(), 1000, TRAIN), context)
        return Reply.from_records(message.content, built.lineage).payload

    first = payload(1)
    assert first is not None
    assert payload(2) == first


@pytest.mark.parametrize("mod", [LocalDpMod(1.0, 1.0, 1.0, 1e-5), fixedclipping_mod, adaptiveclipping_mod])
def test_a_run_with_a_mod_of_flower_that_clips_what_crosses_fails_and_says_so(mod: Mod, tmp_path: Path) -> None:
    """They take the packed payload for weights."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type != TRAIN:
            return client_app.app(message, context)
        return mod(message, context, client_app.app)

    with pytest.raises(RunError, match="no round had 2 good replies; first reason"):
        run_in_process(small(), app, tmp_path / "run")  # type: ignore[arg-type]


def test_a_run_ends_before_a_round_that_would_spend_too_much(run: Run) -> None:
    most = 45.0  # two rounds take 39, three take 53
    run_dir = run(f"privacy={{clip_norm: 0.5, noise_multiplier: 0.5, max_epsilon: {most}}}", NOISY[1])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["privacy"]["epsilon_server"] <= most
    assert summary["privacy"]["num_trainings"] == 2
    assert "epsilon" in summary["stopped_early"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("compressor.name=svd",), "energy does not tell noise from signal"),
        (("compressor={name: ef21}",), "must not be ef21"),
        (("compressor={name: transform_coding}",), "compressor.bytes_per_round must be set"),
        (("compressor={name: quantize, error_feedback: both}",), "error_feedback must be auto, downlink or none"),
        ((NOISY[1], "server.aggregator.weighting=num_examples"), "weighting must be uniform"),
        ((NOISY[1], "server.aggregator.name=qfedavg"), "qfedavg weighs by losses"),
        (
            (NOISY[1], "server.aggregator={name: dp_fixed_clipping, clipping_norm: 1, noise_multiplier: 1}"),
            "give it or privacy, got both",
        ),
        ((NOISY[1], "privacy.clip_norm=0"), "privacy.clip_norm: must be"),
        ((NOISY[1], "privacy.delta=1"), "privacy.delta: must be"),
    ],
)
def test_what_does_not_go_with_noise_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(NOISY[0], *overrides)


def test_a_budget_below_one_round_is_refused_before_anything_runs(run: Run) -> None:
    with pytest.raises(ConfigError, match="one round takes"):
        run("privacy={clip_norm: 0.5, noise_multiplier: 0.5, max_epsilon: 1.0}", NOISY[1])


def test_a_model_with_statistics_is_refused() -> None:
    spec = (TensorSpec("w", (3, 3)), TensorSpec("norm.running_mean", (3,), "buffer"))
    with pytest.raises(ConfigError, match="statistics, which have no noise, got norm"):
        small(*NOISY).build_codec(spec, "uplink")


def test_the_uplink_has_no_error_feedback_under_noise_and_the_downlink_keeps_it() -> None:
    wires = runtime_of(small(*NOISY)).wires
    assert wires is not None
    assert type(wires.uplink).__name__ == "TransformCodec"
    assert type(wires.downlink).__name__ == "WithErrorFeedback"


def test_without_the_accounting_library_a_private_run_is_refused(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"fedkd-flwr\[privacy\]"):
        run(*NOISY)


def test_an_experiment_without_privacy_says_nothing_of_it(run: Run) -> None:
    run_dir = run("num_rounds=1")
    assert "privacy" not in json.loads((run_dir / "summary.json").read_text())
    assert not any("privacy" in row for row in rows_of(run_dir))
