"""Tables, figures, pages, verdicts and model cards, drawn from ledgers."""

from fedkd_flwr.report.model_card import write_model_card
from fedkd_flwr.report.runs import RunResult, common_link, read_run
from fedkd_flwr.report.verdict import verdict
from fedkd_flwr.report.writing import comparison_dir, reported, write_report

__all__ = [
    "RunResult",
    "common_link",
    "comparison_dir",
    "read_run",
    "reported",
    "verdict",
    "write_model_card",
    "write_report",
]
