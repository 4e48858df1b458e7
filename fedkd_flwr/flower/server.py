"""The server's end of a run: build, exchange, write down, export."""

import fcntl
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedkd_flwr.algorithms.base import LearningServer
from fedkd_flwr.core.arrays import num_elements
from fedkd_flwr.disk import make_directory, write_directory, write_whole
from fedkd_flwr.experiment import CONFIG_FILE, ConfigError, load
from fedkd_flwr.flower.budget import check_accounting
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.exchange import Exchange
from fedkd_flwr.flower.runtime import Runtime, runtime_of
from fedkd_flwr.flower.settings import ServerSettings
from fedkd_flwr.measure.ledger import LEDGER_FILE, Ledger, LedgerError, Listener, environment, read_rows
from fedkd_flwr.measure.summary import read_summary, write_summary
from fedkd_flwr.tasks.majority import majority_of

STUDENT_DIR = "student"
LOCK_FILE = "lock"
_PARTS = ("reference", "roster", "sampler", "rounds")  # of a checkpoint
_PARTS_OF_UPLOADS = ("decoders", "aggregator", "bound", "buffer bound")
# What may differ in a resumed run: where results go, how long to wait, when to end, how much to keep, whose names are.
_FREE_TO_CHANGE = {
    "output_dir",
    "network",
    "server.round_timeout_seconds",
    "server.grace_seconds",
    "server.max_skipped_rounds",
    "server.bind_names",
    "server.release_names",
    "server.connect_timeout_seconds",
    "server.min_available",
    "server.keep_checkpoints",
    "server.early_stop",
}

_log = logging.getLogger("fedkd")


def serve(grid: Grid, settings: ServerSettings, listener: Listener | None = None) -> Path:
    """Run one experiment to its end, from its beginning or from its newest checkpoint.

    Args:
        grid: Flower's.
        settings: experiment and run directory.
        listener: called with every row of the ledger.

    Returns:
        The run directory: config.yaml, ledger.jsonl, summary.json, and the shared model as a Hugging Face directory.

    Raises:
        ConfigError: if the experiment can't be built, or is not the one to be resumed.
        RunError: if the run can't go on. The ledger and the summary then say "failed".
    """
    runtime = runtime_of(settings.experiment)
    check_accounting(settings.experiment)
    run_dir = settings.run_dir
    if settings.resume:
        check_resumable(settings)
    try:
        make_directory(run_dir)
    except OSError as error:
        raise RunError(
            f"output-dir: {str(run_dir)!r} can't be made: {error.strerror}; "
            "set output-dir in the run config to a directory that can be written"
        ) from error
    with _only_one_process(run_dir):
        if not settings.resume and (run_dir / LEDGER_FILE).exists():
            raise RunError(f"{str(run_dir)!r} holds a run already; resume it, or give another run-name")
        write_whole(run_dir / CONFIG_FILE, settings.experiment.to_yaml())
        _run(grid, runtime, settings, _ledger(run_dir, listener))
    return run_dir


def _ledger(run_dir: Path, listener: Listener | None) -> Ledger:
    try:
        return Ledger(run_dir, listener)
    except LedgerError as error:
        raise RunError(str(error)) from None


def _run(grid: Grid, runtime: Runtime, settings: ServerSettings, ledger: Ledger) -> None:
    run_dir = settings.run_dir
    status, reason = "failed", ""
    try:
        exchange = _exchange(runtime, settings, ledger)
        exchange.start(grid)
        shared, server = exchange.reference.shared, runtime.algorithm.server
        write_directory(run_dir / STUDENT_DIR, lambda directory: server.export_shared(shared, directory))
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


def _exchange(runtime: Runtime, settings: ServerSettings, ledger: Ledger) -> Exchange:
    """The exchange, from its beginning or from the newest checkpoint."""
    checkpoints = Checkpoints(settings.run_dir, settings.experiment.server.keep_checkpoints)
    checkpoint = checkpoints.latest(parts_of(runtime)) if settings.resume else None
    training_id = checkpoint.training_id if checkpoint else ledger.training_id or secrets.token_hex(8)
    attempt = 1
    if checkpoint and not ledger.training_id and runtime.experiment.noise_facts and "account" not in checkpoint.parts:
        raise RunError(
            f"the ledger of {str(settings.run_dir)!r} is lost, and its checkpoint does not say how much privacy is "
            f"spent; put {LEDGER_FILE} back, or start a new run"
        )
    if ledger.training_id:
        ledger.write(
            "resume",
            round=checkpoint.server_round if checkpoint else 0,
            num_rounds=runtime.experiment.num_rounds,
            network=network.model_dump() if (network := runtime.experiment.network) else None,
        )
        attempt = 1 + ledger.num_resumes * runtime.experiment.server.num_attempts
    else:
        _write_start(ledger, runtime, training_id)
    exchange = Exchange(runtime, ledger, training_id, checkpoints, attempt)
    if checkpoint:
        try:
            exchange.restore(checkpoint, ledger.last_round)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint of round {checkpoint.server_round} in {str(checkpoints.directory)!r} is of another "
                f"release, or damaged: {type(error).__name__}: {error}; delete it to go on from the one before"
            ) from error
    return exchange


def parts_of(runtime: Runtime) -> set[str]:
    """What a checkpoint must hold for this experiment to go on from it."""
    learns = isinstance(runtime.algorithm.server, LearningServer)
    return {*_PARTS, *(_PARTS_OF_UPLOADS if runtime.wires else ()), *(("server half",) if learns else ())}


def check_resumable(settings: ServerSettings) -> None:
    """Refuse to go on with another experiment than was begun.

    Raises:
        ConfigError: naming the first key that differs, or if there is nothing to go on with.
    """
    run_dir, experiment = settings.run_dir, settings.experiment
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{str(run_dir)!r} holds no {CONFIG_FILE}; give results/<experiment>/<run>")
    begun = load(run_dir / CONFIG_FILE)
    differing = _first_difference(begun.model_dump(mode="json"), experiment.model_dump(mode="json"))
    if differing == "num_rounds" and settings.force:
        rest = {"num_rounds": begun.num_rounds}
        differing = _first_difference(begun.model_dump(mode="json"), experiment.model_dump(mode="json") | rest)
    if differing:
        remedy = "force it" if differing == "num_rounds" else "start a new run"
        raise ConfigError(f"{differing}: differs from the run in {str(run_dir)!r}, so it can't be resumed; {remedy}")
    ledger = run_dir / LEDGER_FILE
    try:
        for _ in read_rows(ledger) if ledger.is_file() else ():
            pass  # before anything is started, nodes are asked or the lock is taken
    except LedgerError as error:
        raise ConfigError(str(error)) from None
    try:
        summary = read_summary(run_dir) or {}
    except ValueError:  # damaged; the ledger has it all
        summary = {}
    finished = summary.get("status") == "completed" and not summary.get("stopped_early")
    if finished and experiment.num_rounds <= summary["num_rounds"]:
        raise ConfigError(f"{str(run_dir)!r} is completed; there is nothing to resume")


def _first_difference(a: Any, b: Any, key: str = "") -> str:
    """The first key under which two configurations differ, apart from those that decide nothing; empty if none."""
    if key in _FREE_TO_CHANGE or a == b:
        return ""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return key
    names = [*a, *(name for name in b if name not in a)]
    found = (_first_difference(a.get(name), b.get(name), f"{key}.{name}" if key else name) for name in names)
    return next((name for name in found if name), "")


@contextmanager
def _only_one_process(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of a run directory for as long as the first lives, however it ends."""
    with (run_dir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{str(run_dir)!r} is in use by a run that is still going on") from error
        yield


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
        notes=list(runtime.notes),
        leaves=runtime.leaves,
        **({"majority": asdict(majority)} if (majority := majority_of(runtime.task)) else {}),
        **({"privacy": facts} if (facts := experiment.noise_facts) else {}),
        **({"network": experiment.network.model_dump(mode="json")} if experiment.network else {}),
    )
