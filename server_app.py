"""Flower ServerApp: run config to experiment to run."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd_flwr.flower.server import serve
from fedkd_flwr.flower.settings import server_settings
from fedkd_flwr.report import reported, write_model_card
from fedkd_flwr.report.progress import RoundLog

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, draw it, and describe the model."""
    settings = server_settings(context.run_config, Path(__file__).resolve().parent)
    with reported(settings.run_dir):
        run_dir = serve(grid, settings, RoundLog().update)
    write_model_card(run_dir)
