"""What a run is expected to move, beside what its ledger counts then."""

from pathlib import Path

import pytest

import client_app
from fedkd_flwr.experiment import Experiment, parse
from fedkd_flwr.flower.forecast import expected, forecast
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.summary import read_summary
from tests.conftest import small
from tests.tasks.conftest import write_bert, write_splits

TEXTS = [
    f"{start} {kind} {end}" for start in ("the", "a", "so") for kind in ("good", "bad") for end in ("fever", "help")
]
ROWS = {"text": TEXTS * 4, "label": [int("bad" in text) for text in TEXTS] * 4}


def counted(experiment: Experiment, directory: Path) -> int:
    """Bytes of all messages of a run."""
    summary = read_summary(run_in_process(experiment, client_app.app, directory / "run"))
    assert summary is not None
    return int(summary["bytes"]["total"])


def foreseen(experiment: Experiment) -> float:
    return forecast(experiment).client_bytes * experiment.num_clients


@pytest.mark.parametrize(
    "changes",
    [
        ("compressor={name: transform_coding}",),
        ("compressor={name: svd}",),
        ("compressor={name: identity}", "algorithm.name=fedavg"),
        ("algorithm.name=local_only",),
        ("privacy={clip_norm: 1, noise_multiplier: 0.1, share_metrics: false}", "compressor={name: quantize}"),
    ],
    ids=lambda changes: changes[0],
)
def test_a_forecast_of_a_small_run_on_digits_is_what_the_ledger_counts(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    experiment = small(*changes)
    assert foreseen(experiment) == pytest.approx(counted(experiment, tmp_path), rel=0.04)


def test_a_forecast_of_a_small_run_on_texts_is_what_the_ledger_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_bert(tmp_path / "bert")
    experiment = parse(f"""
name: texts
num_clients: 3
num_rounds: 3
task:
  name: text_classification
  data: {{source: {write_splits(tmp_path / "data", ROWS, ROWS)}}}
  max_length: 16
  teacher: {{source: {tmp_path / "bert"}}}
  student: {{name: layers, num_layers: 1}}
algorithm: {{name: fedkd, local: {{num_epochs: 1, batch_size: 16}}}}
""")
    assert foreseen(experiment) == pytest.approx(counted(experiment, tmp_path), rel=0.04)


def test_broadcasts_that_were_missed_come_down_later(tmp_path: Path) -> None:
    changes = ("num_clients=4", "num_rounds=6", "server.fraction_train=0.5")
    experiment = small(*changes, "compressor={name: transform_coding, bytes_per_round: 1000}")
    assert foreseen(experiment) == pytest.approx(counted(experiment, tmp_path), rel=0.06)


def test_a_budget_tells_the_bytes_without_any_training(tmp_path: Path) -> None:
    experiment = small("compressor={name: transform_coding, bytes_per_round: 1000}", "num_rounds=4")
    total = counted(experiment, tmp_path)
    assert foreseen(experiment) == pytest.approx(total, rel=0.04)
    said = expected(runtime_of(experiment))
    assert said.startswith("about ") and said.endswith(" MB in all")
    assert float(said.split(", ")[2].split()[0]) * 1e6 == pytest.approx(total, rel=0.1)


def test_without_a_budget_it_is_what_dense_updates_would_take() -> None:
    assert expected(runtime_of(small("compressor={name: svd}"))).startswith("at most about ")


def test_where_nothing_is_exchanged_scores_are_what_leaves_a_client() -> None:
    runtime = runtime_of(small("algorithm={name: local_only}"))
    assert runtime.leaves.startswith("scores and numbers of examples, no model and no update of one; ")


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [("algorithm.name=local_only", 0.06), ("compressor={name: identity}", 0.03)],
    ids=["messages without payloads", "payloads that travel as arrays"],
)
def test_bytes_said_before_a_run_are_those_of_its_messages(change: str, tolerance: float, tmp_path: Path) -> None:
    experiment = small(change)
    said = float(expected(runtime_of(experiment)).split(", ")[2].split()[0]) * 1e6
    assert said == pytest.approx(counted(experiment, tmp_path), rel=tolerance)
