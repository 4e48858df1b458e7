"""A cache that can't be written is not put down to the data."""

import errno
from pathlib import Path

import pytest

from fedkd_flwr.core.protocols import Task
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.tasks.digits import DigitsOptions
from fedkd_flwr.tasks.source import DataSource
from tests.conftest import small


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,0\nb,1\n")
    return tmp_path


def test_the_cache_and_the_variable_are_named_where_it_can_not_be_written(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, "/dev/null/cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/null/cache")  # which it reads when it is imported
    with pytest.raises(
        ValueError, match=r"^cache: '/dev/null/cache' must be a directory that can be written"
    ) as caught:
        DataSource(source=str(table)).load()
    assert "set HF_HOME or HF_DATASETS_CACHE to one that can" in str(caught.value)
    assert "must hold Parquet" not in str(caught.value)


def test_data_that_is_not_there_is_still_put_down_to_the_data(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/dev/null/cache")
    with pytest.raises(ValueError, match="can't be loaded"):
        DataSource(source=str(table), test_split="validation").load()


def test_a_disk_that_fills_up_while_the_data_is_prepared_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(options: DigitsOptions, num_clients: int, seed: int) -> Task:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DigitsOptions, "build", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        small().build_task()
