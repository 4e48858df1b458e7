"""What one section of an experiment leaves open and another decides: optimisers, terms, weighting."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedkd_flwr.algorithms.optimizer import OptimizerOptions, RateSchedule
from fedkd_flwr.experiment import Experiment, baselines_of, load, parse
from fedkd_flwr.tasks.checkpoint_config import _facts, checkpoint_width
from tests.conftest import ROOT, small

FINE_TUNING = RateSchedule(warmup=0.1, decay="linear")
FROM_SCRATCH = OptimizerOptions()


def checkpoint(directory: Path, **facts: object) -> str:
    """A folder with nothing but what a checkpoint says of itself."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return str(directory)


def texts(teacher: object, student: object = None, **algorithm: object) -> Experiment:
    """An experiment on texts, not built: whether models can be loaded is not asked before that."""
    task = {"name": "text_classification", "data": "nowhere", "tokenizer": "nowhere", "teacher": teacher}
    raw: dict[str, Any] = {"name": "texts", "num_clients": 2, "num_rounds": 2, "task": task, "algorithm": algorithm}
    if student is not None:
        task["student"] = student
    return parse(json.dumps(raw))


@pytest.mark.parametrize(("width", "teacher", "student"), [(128, 5e-4, 1e-3), (768, 5.3e-5, 1.1e-4)])
def test_models_with_loaded_weights_are_fine_tuned_at_a_rate_that_falls_with_their_width(
    tmp_path: Path, width: int, teacher: float, student: float
) -> None:
    source = checkpoint(tmp_path / "bert", hidden_size=width)
    algorithm: Any = texts({"source": source}, name="fedkd").algorithm
    for optimizer, rate in ((algorithm.teacher_optimizer, teacher), (algorithm.student_optimizer, student)):
        assert optimizer == OptimizerOptions(name="adamw", learning_rate=rate, schedule=FINE_TUNING)
    assert (algorithm.hidden, algorithm.attention, algorithm.keep_student_moments) == (False, False, True)


def test_models_with_random_weights_learn_as_ever() -> None:
    algorithm: Any = texts({"config": {"model_type": "bert"}}, name="fedkd").algorithm
    assert algorithm.teacher_optimizer == algorithm.student_optimizer == FROM_SCRATCH
    assert (algorithm.hidden, algorithm.attention, algorithm.keep_student_moments) == ("auto", "auto", False)


def test_each_model_is_judged_by_its_own_origin(tmp_path: Path) -> None:
    loaded, drawn = {"source": checkpoint(tmp_path / "bert", hidden_size=128)}, {"config": {"model_type": "bert"}}
    named = {"name": "transformers"}
    algorithm: Any = texts(loaded, named | drawn, name="fedkd").algorithm
    assert algorithm.teacher_optimizer.name == "adamw"
    assert algorithm.student_optimizer == FROM_SCRATCH
    assert algorithm.hidden == "auto"
    algorithm = texts(drawn, named | loaded, name="fedkd").algorithm
    assert algorithm.teacher_optimizer == FROM_SCRATCH
    assert algorithm.student_optimizer.schedule == FINE_TUNING


def test_what_the_yaml_says_wins_key_by_key(tmp_path: Path) -> None:
    source = {"source": checkpoint(tmp_path / "bert", hidden_size=128)}
    chosen = {"learning_rate": 0.01}
    algorithm: Any = texts(source, name="fedkd", student_optimizer=chosen, hidden=True).algorithm
    assert algorithm.student_optimizer == OptimizerOptions(name="adamw", learning_rate=0.01, schedule=FINE_TUNING)
    assert (algorithm.hidden, algorithm.attention) == (True, False)
    algorithm = texts(source, name="fedkd", student_optimizer={"name": "sgd"}, keep_student_moments=False).algorithm
    assert algorithm.student_optimizer == OptimizerOptions(name="sgd", schedule=FINE_TUNING)
    assert algorithm.keep_student_moments is False


@pytest.mark.parametrize("open_option", ["auto", {"learning_rate": "auto", "schedule": "auto"}, {}])
def test_auto_is_the_same_as_leaving_an_option_out(tmp_path: Path, open_option: object) -> None:
    source = {"source": checkpoint(tmp_path / "bert", hidden_size=128)}
    said = texts(source, name="fedkd", teacher_optimizer=open_option, attention="auto")
    assert said == texts(source, name="fedkd")


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "local_only"])
@pytest.mark.parametrize(("model", "rate"), [("teacher", 5e-4), ("student", 1e-3)])
def test_what_fedkd_is_compared_with_is_trained_alike(tmp_path: Path, name: str, model: str, rate: float) -> None:
    source = {"source": checkpoint(tmp_path / "bert", hidden_size=128)}
    algorithm: Any = texts(source, name=name, model=model).algorithm
    assert algorithm.optimizer == OptimizerOptions(name="adamw", learning_rate=rate, schedule=FINE_TUNING)
    assert algorithm.keep_moments is True
    fedkd: Any = texts(source, name="fedkd").algorithm
    assert algorithm.optimizer == getattr(fedkd, f"{model}_optimizer")


def test_the_resolved_configuration_says_what_was_decided_and_decides_nothing_anew(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "bert", hidden_size=128)
    experiment = texts({"source": source}, name="fedkd")
    (Path(source) / "config.json").write_text(json.dumps({"hidden_size": 768}), encoding="utf-8")
    _facts.cache_clear()
    assert parse(experiment.to_yaml()) == experiment
    assert "learning_rate: 0.0005" in experiment.to_yaml()
    for baseline, other in baselines_of(experiment):
        assert parse(other.to_yaml()) == other, baseline.name


@pytest.mark.parametrize(
    ("facts", "width"), [({"d_model": 512}, 512), ({"n_embd": 64}, 64), ({"hidden_sizes": [8, 16]}, 768), ({}, 768)]
)
def test_the_width_of_a_checkpoint_is_read_by_the_name_that_its_family_gives_it(
    tmp_path: Path, facts: dict[str, object], width: int
) -> None:
    assert checkpoint_width(checkpoint(tmp_path / "model", **facts), None) == width


def test_a_checkpoint_whose_configuration_cannot_be_read_is_taken_for_a_usual_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert checkpoint_width(str(tmp_path), None) == 768


@pytest.mark.parametrize(
    ("overrides", "weighting"),
    [
        ((), "num_examples"),
        (("server.aggregator.weighting=auto",), "num_examples"),
        (("server.aggregator={name: fedavgm, eta: 1}",), "num_examples"),
        (("algorithm.name=fedavg",), "num_examples"),
        (("algorithm.name=fedkd_paper",), "uniform"),
        (("algorithm={name: fd}", "compressor.name=identity"), "uniform"),
        (("privacy={clip_norm: 1, noise_multiplier: 1}", "compressor.name=identity"), "uniform"),
        (("server.aggregator.weighting=uniform",), "uniform"),
        (("algorithm.name=fedkd_paper", "server.aggregator.weighting=num_examples"), "num_examples"),
        (("num_clients=5", "server.aggregator.name=multikrum"), "uniform"),
    ],
)
def test_clients_weigh_by_examples_unless_the_method_or_privacy_forbids_it(
    overrides: tuple[str, ...], weighting: str
) -> None:
    experiment = small(*overrides)
    assert experiment.server.aggregator.model_dump()["weighting"] == weighting
    assert parse(experiment.to_yaml()) == experiment


def test_an_optimiser_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValidationError, match="valid dictionary or instance"):
        OptimizerOptions.model_validate("automatic")


@pytest.mark.parametrize("name", ["ade", "bc5cdr", "ag_news"])
def test_the_recipe_of_the_text_experiments_is_what_is_decided_without_it(tmp_path: Path, name: str) -> None:
    source = f"task.teacher.source={checkpoint(tmp_path / 'bert', hidden_size=128)}"
    tuned = load(ROOT / "conf" / f"{name}_fedkd.yaml", [source])
    open_options = "algorithm={name: fedkd, local: {num_epochs: 1, batch_size: 16}}"
    assert load(ROOT / "conf" / f"{name}_fedkd.yaml", [source, open_options]) == tuned
