"""Shared fixtures: a small experiment, and runs of it in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import client_app
from fedkd_flwr.experiment import Experiment, parse
from fedkd_flwr.flower.in_process import run_in_process

ROOT = Path(__file__).resolve().parent.parent

SMALL = """
name: small
seed: 1
num_clients: 3
num_rounds: 3
task:
  name: digits
  partition: {name: iid}
  teacher: {num_layers: 2, hidden_size: 16, num_heads: 2, intermediate_size: 16}
  student: {num_layers: 1, hidden_size: 16, num_heads: 2, intermediate_size: 16}
algorithm:
  name: fedkd
  local: {num_epochs: 1, batch_size: 128}
compressor: {name: svd}
server: {min_replies: 2}
"""

Run = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def small(*overrides: str) -> Experiment:
    """The small experiment, changed by overrides."""
    return parse(SMALL, overrides)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the small experiment with overrides in this process; the run directory."""
    counter = iter(range(1000))

    def start(*overrides: str, app: object = client_app.app) -> Path:
        return run_in_process(small(*overrides), app, tmp_path / f"run{next(counter)}")  # type: ignore[arg-type]

    return start
