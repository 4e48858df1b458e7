import os
import tomllib
from pathlib import Path

import pytest

from fedkd_flwr.experiment import Experiment, load, parse

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "conf").iterdir())
DATA, MODELS = (ROOT.parent / "shared" / kind for kind in ("data", "models"))
SOURCES = {
    "task.data.source": DATA,
    "task.public.source": DATA,
    "task.teacher.source": MODELS,
    "task.tokenizer.source": MODELS,
}
# Folders that hold what a hub id names, or something of its kind.
BESIDE = {
    "google/bert_uncased_L-6_H-128_A-2": "pubmed_bert_6x128",
    "uoft-cs/cifar10": "cifar10",
    "ylecun/mnist": "mnist",
    "fancyzhx/ag_news": "ag_news_7600",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `datasets` reads once for all files of one data set, and for all workers of one test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "datasets"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what users make themselves: the ResNet of benchmarks/backbone.py, of its shape and untrained."""
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("models")
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(folder / "resnet_cifar10_half")
    return folder


def with_its_data(path: Path, models: Path) -> Experiment:
    """The experiment of a file, its data and models found beside this repository where they are not where it says."""
    experiment = load(path)
    overrides = []
    for key, folder in SOURCES.items():
        source = chosen(experiment, key)
        if source is None or Path(source).exists():
            continue
        name = BESIDE.get(source, Path(source).name)
        found = next((each / name for each in (folder, models) if (each / name).exists()), None)
        if found is None:
            pytest.skip(f"{source!r}, {key} of {path.name}, is not here")
        overrides.append(f"{key}={found}")
    return load(path, overrides)


def chosen(experiment: Experiment, key: str) -> str | None:
    """The text at a dotted key, None where the experiment has none."""
    value: object = experiment
    for part in key.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, str) else None


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
    path: Path, cache: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    experiment = with_its_data(path, models)
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
