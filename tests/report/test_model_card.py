"""The model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedkd_flwr.report import write_model_card
from tests.conftest import Run


def parts(run_dir: Path) -> tuple[dict[str, Any], str]:
    path = write_model_card(run_dir)
    assert path is not None
    _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def changed(run_dir: Path, name: str, **values: Any) -> None:
    path = run_dir / name
    read = yaml.safe_load if name.endswith("yaml") else json.loads
    path.write_text(json.dumps({**read(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_a_card_states_what_the_ledger_says(run: Run) -> None:
    directory = run()
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    front, text = parts(directory)
    assert front["tags"] == ["federated-learning", "flower", "fedkd"]
    assert front["metrics"] == ["accuracy", "macro_f1"]
    for scope in ("shared_global", "shared_local", "private_local"):
        assert f"| {summary['metrics'][scope]['accuracy']:.4f} |" in text
    assert f"{summary['bytes']['per_client'] / 1e6:.3f} MB" in text
    assert f"{100 * summary['bytes']['reduction_vs_dense_teacher']:.1f} %" in text
    assert "## Scores after round 3" in text
    assert "| what left a client | the update of the student through svd, with scores" in text
    assert "the teacher and the data stay |" in text
    assert (
        f"| always '0', on the server's test set | accuracy | {summary['majority']['scores']['accuracy']:.4f} |" in text
    )
    assert "| clients | 3 |" in text and "| rounds | 3 |" in text and "| seed | 1 |" in text


def test_a_card_of_a_private_run_states_epsilon_and_what_it_leaves_out(run: Run) -> None:
    directory = run("privacy={clip_norm: 1, noise_multiplier: 1}", "compressor={name: quantize}")
    spent = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["privacy"]
    _, text = parts(directory)
    assert f"| privacy towards the server | epsilon {spent['epsilon_server']:.4g} |" in text
    assert f"| privacy of what is released | epsilon {spent['epsilon_released']:.4g} |" in text
    assert f"| outside epsilon | {'; '.join(spent['outside'])} |" in text
    assert "beyond what epsilon above bounds" in text


def test_a_card_of_a_library_task_says_how_to_load_it(run: Run) -> None:
    directory = run()
    changed(directory, "summary.json", task="text_classification")
    front, text = parts(directory)
    assert front["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in text


@pytest.mark.parametrize(
    ("source", "named"), [("someone/something", True), ("/home/me/secret", False), ("./data/mine", False)]
)
def test_hub_ids_are_named_and_folders_of_this_machine_are_not(run: Run, source: str, named: bool) -> None:
    directory = run()
    task = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["task"]
    changed(
        directory,
        "config.yaml",
        task=task | {"data": {"source": source}, "teacher": {"source": source}, "student": {"name": "layers"}},
    )
    front, text = parts(directory)
    assert (front.get("base_model") == source) is (front.get("datasets") == [source]) is named
    assert (source in text) is named


def test_there_is_no_card_without_a_model_or_for_a_run_that_failed(run: Run) -> None:
    without = run("algorithm.name=local_only")
    assert write_model_card(without) is None
    failed = run()
    changed(failed, "summary.json", status="failed")
    assert write_model_card(failed) is None
    assert not (failed / "student" / "README.md").exists()
