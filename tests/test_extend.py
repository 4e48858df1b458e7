"""The examples of docs/extend.md, run as they stand there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

import fedkd_flwr.experiment as experiment_module
from fedkd_flwr.algorithms import ALGORITHMS
from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.flower import runtime
from fedkd_flwr.measure.summary import read_summary
from fedkd_flwr.tasks import TASKS
from tests.conftest import ROOT, SMALL

TABLES: dict[str, dict[str, Any]] = {"compressors": COMPRESSORS, "tasks": TASKS, "algorithms": ALGORITHMS}
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(# (\w+)/(\w+)\.py\n.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def with_examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Does what the page says: each file in place, each line in its table."""
    for code, folder, name in EXAMPLES:
        names: dict[str, Any] = {"__name__": f"example_{name}"}
        exec(compile(code, f"docs/extend.md:{name}", "exec"), names)
        options = next(v for k, v in names.items() if k.endswith("Options") and v.__module__ == f"example_{name}")
        assert f'"{name}": {options.__name__}' in TEXT
        monkeypatch.setitem(TABLES[folder], name, options)
    # The class was made from the tables when its module was imported; make it again.
    fields = {key: (experiment_module._one_of(table), ...) for key, table in _sections().items()}
    wider = create_model("Experiment", __base__=experiment_module.Experiment, **fields)  # type: ignore[call-overload]
    monkeypatch.setattr(experiment_module, "Experiment", wider)
    runtime._built.cache_clear()
    yield
    runtime._built.cache_clear()


def _sections() -> dict[str, dict[str, Any]]:
    return {"task": TASKS, "algorithm": ALGORITHMS, "compressor": COMPRESSORS}


@pytest.mark.usefixtures("with_examples")
@pytest.mark.parametrize(
    "change",
    [
        ("compressor.name=sign",),
        ("algorithm.name=head_only", "compressor.name=identity"),
        ("task.name=moons", "algorithm.hidden=false", "algorithm.attention=false"),
    ],
)
def test_an_example_of_the_page_runs(change: tuple[str, ...], tmp_path: Path) -> None:
    import client_app
    from fedkd_flwr.flower.in_process import run_in_process

    experiment = experiment_module.parse(SMALL, ("num_rounds=2", *change))
    summary = read_summary(run_in_process(experiment, client_app.app, tmp_path / "run"))
    assert summary is not None
    assert summary["status"] == "completed"
    assert summary["metrics"]["shared_global"]["accuracy"] > 0.0


def test_the_page_has_one_example_for_each_axis() -> None:
    assert sorted(folder for _, folder, _ in EXAMPLES) == ["algorithms", "compressors", "tasks"]
