import tomllib
from pathlib import Path

import pytest

from fedkd_flwr.experiment import Experiment, load, parse
from fedkd_flwr.tasks.source import DataSource

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "conf").iterdir())
DATA = ROOT.parent / "shared" / "data"


def with_its_data(path: Path) -> Experiment:
    """The experiment of a file, its data found beside this repository where it is not where the file says."""
    experiment = load(path)
    source = getattr(experiment.task, "source", None)
    if not isinstance(source, DataSource) or Path(source.path).exists():
        return experiment
    folder = DATA / Path(source.path).name
    if not folder.exists():
        pytest.skip(f"no data for {path.name} here")
    return load(path, [f"task.source.path={folder}"])


def test_there_is_an_experiment_for_fedkd_and_for_what_it_is_compared_with() -> None:
    algorithms = {load(path).algorithm.name for path in FILES}
    assert algorithms >= {"fedkd", "fedavg", "fedprox", "local_only"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_named_after_its_experiment(path: Path) -> None:
    assert path.suffix == ".yaml"
    assert load(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_first_line_of_every_file_is_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# fedkd run conf/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_builds_its_task_for_all_its_clients_and_its_algorithm(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    experiment = with_its_data(path)
    task = experiment.build_task()
    last = task.client_data(experiment.num_clients - 1)
    assert len(last.train) > 0
    with pytest.raises(ValueError, match="partition-id"):
        task.client_data(experiment.num_clients)
    algorithm = experiment.build_algorithm(task)
    assert algorithm.num_teacher_parameters >= algorithm.num_student_parameters > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_resolved_file_reads_back_to_an_equal_experiment(path: Path) -> None:
    experiment = load(path)
    assert parse(experiment.to_yaml()) == experiment


def test_the_app_runs_an_experiment_that_exists_when_none_is_named() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert ROOT / app["config"]["config"] in FILES
