"""What `fedkd` hands to `flwr run`."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.flower.launcher import _Flower
from tests.conftest import ROOT, small


@pytest.mark.parametrize("resume", [False, True])
def test_every_key_of_the_run_config_is_one_that_the_app_declares(
    tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> dict[str, Any]:
        return {"run-id": 7}

    flower = _Flower(tmp_path)
    monkeypatch.setattr(flower, "_ask", ask)
    assert flower.submit(small(), ROOT, tmp_path / "results" / "small" / "run", resume=resume, force=resume) == 7
    sent = tomllib.loads((tmp_path / "run.toml").read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert sent.keys() <= declared.keys()
