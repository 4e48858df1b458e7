"""A fixture for tests of a whole small federation in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.faults.world import World, experiment_of, small_world

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    counter = iter(range(100))
    with small_world(monkeypatch):
        yield lambda *overrides, **hooks: World(tmp_path / f"run{next(counter)}", experiment_of(*overrides), **hooks)
