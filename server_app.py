"""Flower ServerApp: run config to experiment to run."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd_flwr.flower.server import serve
from fedkd_flwr.flower.settings import server_settings
from fedkd_flwr.report import write_report
from fedkd_flwr.report.progress import RoundLog

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, and draw it."""
    settings = server_settings(context.run_config, Path(__file__).resolve().parent)
    write_report([serve(grid, settings, RoundLog().update)])
