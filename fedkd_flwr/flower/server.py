"""The server's end of a run: build, exchange, write down, export."""

import logging
import secrets
from pathlib import Path

from flwr.serverapp import Grid

from fedkd_flwr.core.arrays import num_elements
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, Listener, environment
from fedkd_flwr.measure.summary import write_summary

CONFIG_FILE = "config.yaml"
STUDENT_DIR = "student"

_log = logging.getLogger("fedkd")


def serve(grid: Grid, settings: ServerSettings, listener: Listener | None = None) -> Path:
    """Run one experiment to its end.

    Args:
        grid: Flower's.
        settings: experiment and run directory.
        listener: called with every row of the ledger.

    Returns:
        The run directory: config.yaml, ledger.jsonl, summary.json, and the shared model as a Hugging Face directory.

    Raises:
        ConfigError: if the experiment can't be built.
        RunError: if the run can't go on. The ledger and the summary then say "failed".
    """
    runtime = runtime_of(settings.experiment)
    run_dir = settings.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output directory {str(run_dir)!r} can't be made: {error.strerror}") from error
    if (run_dir / LEDGER_FILE).exists():
        raise RunError(f"{str(run_dir)!r} holds a run already; give another run-name")
    (run_dir / CONFIG_FILE).write_text(settings.experiment.to_yaml(), encoding="utf-8")
    ledger = Ledger(run_dir, listener)
    status, reason = "failed", ""
    try:
        training_id = secrets.token_hex(8)
        _write_start(ledger, runtime, training_id)
        exchange = Exchange(runtime, ledger, training_id)
        exchange.start(grid)
        runtime.algorithm.server.export_shared(exchange.reference.shared, run_dir / STUDENT_DIR)
        status = "completed"
    except KeyboardInterrupt:
        status, reason = "stopped", "interrupted"
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        ledger.write("end", status=status, reason=reason)
        ledger.close()
        write_summary(run_dir)
    return run_dir


def _write_start(ledger: Ledger, runtime: Runtime, training_id: str) -> None:
    experiment, algorithm = runtime.experiment, runtime.algorithm
    ledger.write(
        "start",
        experiment=experiment.name,
        training_id=training_id,
        task=experiment.task.name,
        algorithm=experiment.algorithm.name,
        exchanges=algorithm.exchanges,
        compressor=experiment.compressor.name,
        aggregator=experiment.server.aggregator.name,
        seed=experiment.seed,
        num_clients=experiment.num_clients,
        num_rounds=experiment.num_rounds,
        num_teacher_parameters=algorithm.num_teacher_parameters,
        num_student_parameters=algorithm.num_student_parameters,
        num_exchanged_elements=num_elements(runtime.wires.uplink.spec) if runtime.wires else 0,
        initial_digest=runtime.lineage.hex(),
        environment=environment(),
    )
