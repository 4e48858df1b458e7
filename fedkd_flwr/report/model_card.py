"""The model card of a shared model: what it learned, from whom, at what price, and how well, from the run's ledger."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedkd_flwr.disk import write_whole
from fedkd_flwr.experiment import CONFIG_FILE
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.report.privacy import privacy_rows
from fedkd_flwr.report.runs import fewer_bytes, read_run

CARD_FILE = "README.md"
MODEL_DIR = "student"
# Tasks whose models the library's pipelines run, and the class that loads them.
PIPELINES = {
    "text_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "image_classification": ("image-classification", "AutoModelForImageClassification"),
}
SCOPE_NAMES = {
    "shared_global": "this model, on the server's test set",
    "shared_local": "this model, on the clients' own test examples (mean)",
    "private_local": "the clients' private models, on the same (mean)",
    "ensemble_local": "both together, on the same (mean)",
}
MEGABYTE = 1e6


def write_model_card(run_dir: Path) -> Path | None:
    """Write README.md beside the model that a run exported.

    Args:
        run_dir: results/<experiment>/<run>.

    Returns:
        Its path; None where the run left no model, or did not complete.
    """
    directory, summary = run_dir / MODEL_DIR, read_summary(run_dir)
    if summary is None or summary["status"] != "completed" or not directory.is_dir():
        return None
    config = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    loads = PIPELINES.get(summary["task"]) if (directory / "config.json").exists() else None
    if loads and "architectures" not in (directory / "config.json").read_text(encoding="utf-8"):
        loads = None  # a small model of this project's own
    card = "---\n" + yaml.safe_dump(_front_matter(config, summary, loads), sort_keys=False) + "---\n\n"
    path = directory / CARD_FILE
    write_whole(path, card + _text(config, summary, loads, read_run(run_dir).last_round))
    return path


def _front_matter(
    config: Mapping[str, Any], summary: Mapping[str, Any], loads: tuple[str, str] | None
) -> dict[str, Any]:
    """What the Hub reads. Folders of this machine are nobody else's business and stay out."""
    facts: dict[str, Any] = {"tags": ["federated-learning", "flower", summary["algorithm"]]}
    if loads:
        facts |= {"library_name": "transformers", "pipeline_tag": loads[0]}
    task = config["task"]
    if data := _public(task.get("data")):
        facts["datasets"] = [data]
    student = task.get("student") or {}
    start = task.get("teacher") if isinstance(student, Mapping) and student.get("name") == "layers" else student
    if base := _public(start):
        facts["base_model"] = base
    scores = summary["metrics"]["shared_global"] or {}
    facts["metrics"] = [name for name in scores if name != "loss"]
    return facts


def _public(section: object) -> str | None:
    source = section.get("source") if isinstance(section, Mapping) else None
    return source if isinstance(source, str) and not os.path.isabs(source) and not source.startswith(".") else None


def _text(config: Mapping[str, Any], summary: Mapping[str, Any], loads: tuple[str, str] | None, last_round: int) -> str:
    counted = summary["bytes"]
    task, data = config["task"], _public(config["task"].get("data"))
    reduction = counted["reduction_vs_dense_teacher"]
    lines = [
        f"# {summary['experiment']}",
        "",
        f"A model for {str(summary['task']).replace('_', ' ')}, trained by federated learning "
        f"({summary['algorithm']}): the data never left the clients that hold it.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {data or 'private'}, divided: {_named(task.get('partition'))} |",
        f"| clients | {summary['num_clients']} |",
        f"| rounds | {summary['num_rounds']} |",
        f"| algorithm, aggregator | {summary['algorithm']}, {summary['aggregator']} |",
        f"| compressor | {_named(config['compressor'])} |",
        f"| bytes for each client | {counted['per_client'] / MEGABYTE:.3f} MB, up and down |",
    ]
    if transfer := summary.get("transfer"):
        lines.append(f"| transfer over {transfer['link']} | {transfer['seconds']:.1f} s |")
    if reduction is not None:
        lines.append(f"| beside dense FedAvg of the teacher | {fewer_bytes(reduction)} fewer bytes |")
    lines += [f"| {name} | {value} |" for name, value in privacy_rows(summary.get("privacy"))]
    if summary.get("leaves"):
        lines.append(f"| what left a client | {summary['leaves']} |")
    lines += [f"| seed | {summary['seed']} |", "", f"## Scores after round {last_round}", ""]
    lines += ["| | metric | value |", "|---|---|---:|"]
    for scope, what in SCOPE_NAMES.items():
        for name, value in (summary["metrics"][scope] or {}).items():
            lines.append(f"| {what} | {name} | {value:.4f} |")
    lines += _majority_lines(summary)
    if loads:
        pipeline, auto = loads
        # A word's tag was learned on its first piece alone.
        more = {"token-classification": ', aggregation_strategy="first"', "text-classification": ", truncation=True"}
        lines += [
            "",
            "## Use",
            "",
            "```python",
            f"from transformers import {auto}, pipeline",
            "",
            f'model = {auto}.from_pretrained("path/to/this/directory")',
            f'predict = pipeline("{pipeline}", model="path/to/this/directory"{more.get(pipeline, "")})',
            "```",
        ]
    lines += [
        "",
        "## Limits",
        "",
        "Scores are of the data above and of no other. Federated training keeps the data on the clients; it is no "
        "promise that nothing can be learned of it from the model"
        + (", beyond what epsilon above bounds." if summary.get("privacy") else "."),
        "",
    ]
    return "\n".join(lines)


def _majority_lines(summary: Mapping[str, Any]) -> list[str]:
    """What needs no model at all, beside what this one reaches on the server's test set."""
    found, scores = summary.get("majority"), summary["metrics"]["shared_global"] or {}
    if not found:
        return []
    what = f"always {found['label']!r}, on the server's test set".replace("|", "\\|")
    return [f"| {what} | {name} | {value:.4f} |" for name, value in found["scores"].items() if name in scores]


def _named(section: object) -> str:
    """A section of the configuration in one line: its name, then its options."""
    if not isinstance(section, Mapping):
        return "as the task does"
    options = ", ".join(f"{key} {value}" for key, value in section.items() if key != "name" and value is not None)
    return f"{section['name']} ({options})" if options else str(section["name"])
