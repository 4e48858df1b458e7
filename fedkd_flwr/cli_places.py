"""Directories of results, and the first lines of a run."""

import os
from datetime import datetime
from pathlib import Path

from fedkd_flwr.experiment import CONFIG_FILE, ConfigError
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.report import comparison_dir
from fedkd_flwr.report.writing import TABLE_FILE

PARTITION_FILE = "partition.png"  # which `fedkd check` draws among an experiment's runs


def first_lines(runtime: Runtime, run_dir: Path) -> list[str]:
    """The first lines of a run: number of clients, data that leaves a client, bytes to expect, place of the results."""
    # Imported here, as for `check`.
    from fedkd_flwr.flower.forecast import expected

    experiment = runtime.experiment
    sampled = "" if experiment.num_sampled == experiment.num_clients else f", {experiment.num_sampled} in each round"
    return [
        f"{experiment.name}: {experiment.num_clients} clients{sampled}, {experiment.num_rounds} rounds; "
        f"results: {run_dir}",
        f"what leaves a client: {runtime.leaves}",
        f"bytes: {expected(runtime)}",
    ]


def is_new(directory: Path, earlier: list[Path]) -> bool:
    """Whether a directory is to be reported on: named for the first time, and a run, not what lies among runs."""
    if directory.name == PARTITION_FILE:
        return False
    is_comparison = (directory / TABLE_FILE).is_file() and not (directory / CONFIG_FILE).exists()
    return not is_comparison and directory.resolve() not in {each.resolve() for each in earlier}


def place_of_report(directories: list[Path], output_dir: Path | None) -> Path | None:
    """Where a report goes; None: beside the only run. That of several takes the place of no run's own."""
    if output_dir is not None or len(directories) == 1:
        return None if output_dir is None else writable(output_dir)
    try:
        return comparison_dir(writable(directories[0].resolve().parent.parent))
    except ConfigError as error:
        raise ConfigError(f"{error}; say where the comparison goes with --output-dir") from None


def writable(directory: Path) -> Path:
    """The directory, absolute; it need not exist, but it must be possible to make it and to write there."""
    try:
        root = directory.expanduser().resolve()
        existing = next(parent for parent in (root, *root.parents) if parent.exists())
        usable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except (OSError, ValueError, RuntimeError):  # no such user, a zero byte, a name too long
        usable = False
    if not usable:
        raise ConfigError(f"output_dir: must be a directory that can be written, got {str(directory)!r}")
    return root


def run_name() -> str:
    """A new name of a run: when it began."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
