"""Tables and figures, drawn from ledgers."""

from fedkd_flwr.report.runs import RunResult, read_run, write_report

__all__ = ["RunResult", "read_run", "write_report"]
