"""The YAML that README gives to start from."""

import json
from pathlib import Path
from typing import Any

from fedkd_flwr.experiment import parse
from tests.conftest import ROOT


def test_the_template_for_own_data_fine_tunes_its_models_without_another_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128}), encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("# my_reports.yaml\n", 1)[1].split("```", 1)[0]
    algorithm: Any = parse(text, [f"task.teacher.source={tmp_path}"]).algorithm
    assert "optimizer" not in text
    assert (algorithm.teacher_optimizer.learning_rate, algorithm.student_optimizer.learning_rate) == (5e-4, 1e-3)
    assert (algorithm.hidden, algorithm.attention) == (False, False)
