"""What `fedkd` hands to `flwr run`."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.flower.commands import Commands, run_config
from tests.conftest import ROOT, small


@pytest.mark.parametrize("resume", [False, True])
def test_every_key_of_the_run_config_is_one_that_the_app_declares(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> dict[str, Any]:
        return {"run-id": 7}

    flower = Commands(tmp_path, "fedkd")
    monkeypatch.setattr(flower, "_ask", ask)
    config = run_config(small(), ROOT, tmp_path / "results" / "small" / "run", resume=resume, force=resume)
    assert flower.submit(ROOT, config) == 7
    sent = tomllib.loads((tmp_path / "run.toml").read_text())
    assert sent == config
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert sent.keys() <= declared.keys()
