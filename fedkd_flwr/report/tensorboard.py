"""A run's ledger as TensorBoard event files, where the package `tensorboard` is installed."""

from importlib.util import find_spec
from pathlib import Path

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.measure.ledger import LEDGER_FILE, Row
from fedkd_flwr.report.account import account_of
from fedkd_flwr.report.runs import read_run

EVENTS_DIR = "tensorboard"


def require_tensorboard() -> None:
    """Refuse where the package is missing: better before a run than after it.

    Raises:
        ConfigError: if it is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard: must have the package 'tensorboard', got none; pip install 'fedkd-flwr[tensorboard]'"
        )


def write_events(run_dir: Path) -> Path:
    """Write every number of every round, by round, into event files; those of an earlier call are replaced.

    Args:
        run_dir: results/<experiment>/<run>; its ledger may still be growing.

    Returns:
        The directory for `tensorboard --logdir`.

    Raises:
        ConfigError: if the package is not installed.
    """
    require_tensorboard()
    # Imported here: it takes seconds, and only those who ask for it have it.
    from torch.utils.tensorboard import SummaryWriter

    directory = run_dir / EVENTS_DIR
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    run = read_run(run_dir)
    moved = account_of(run.rows).bytes_by_round
    ended = (run_dir / LEDGER_FILE).stat().st_mtime
    began = ended - max((row["elapsed_seconds"] for row in run.rows), default=0.0)
    with SummaryWriter(str(directory)) as writer:
        for row in run.rows:
            if row["kind"] not in ("round", "final"):
                continue
            up, down = moved.get(row["round"], (0, 0))
            for name, value in {**_scalars(row), "bytes/uplink": up, "bytes/downlink": down}.items():
                writer.add_scalar(name, value, row["round"], walltime=began + row["elapsed_seconds"])
    return directory


def _scalars(row: Row) -> dict[str, float]:
    """Numbers of one round by name; what was not finite is null in the ledger and left out."""
    groups = {
        **row["metrics"],
        "train": row.get("train"),
        "seconds": row.get("seconds"),
        "replies": {
            "good": len(row.get("clients", ())),
            "rejected": len(row.get("rejected", ())),
            "clipped": row.get("num_clipped"),
        },
    }
    return {
        f"{group}/{name}": value
        for group, values in groups.items()
        for name, value in (values or {}).items()
        if value is not None
    }
