from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from fedkd_flwr.algorithms import ALGORITHMS
from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.experiment import ConfigError, Experiment, load, parse

BASE = """
name: base
num_clients: 4
num_rounds: 2
task:
  name: digits
  partition: {name: iid}
  teacher: {num_layers: 2, hidden_size: 16, num_heads: 2, intermediate_size: 16}
  student: {num_layers: 1, hidden_size: 16, num_heads: 2, intermediate_size: 16}
algorithm:
  name: fedkd
  temperature: 2.0
  local: {num_epochs: 3, batch_size: 8}
compressor: {name: svd, energy_start: 0.5}
"""
OUTER_KEYS = "name, seed, num_clients, num_rounds, output_dir, task, algorithm, compressor, server, privacy, network"
ALGORITHM_NAMES = ", ".join(repr(name) for name in ALGORITHMS)
PARTITIONS = "'iid', 'dirichlet', 'pathological', 'size', 'rare_labels'"
COMPRESSOR_NAMES = ", ".join(repr(name) for name in COMPRESSORS)
FILE_NAME = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("sed=1", f"sed: unknown key; allowed: {OUTER_KEYS}"),
        ("server.sampling=1", "server.sampling: unknown key; allowed: aggregator, fraction_train, num_train, "),
        ("algorithm.mu=1", "algorithm.mu: unknown key; allowed: name, mutual, hidden, attention, "),
        ("task.student.depth=1", "task.student.depth: unknown key; allowed: num_layers, hidden_size, num_heads, "),
        ("task.partition.alpha=1", "task.partition.alpha: unknown key; allowed: name"),
        ("compressor.energy=1", "compressor.energy: unknown key; allowed: name, error_feedback, energy_start, "),
        ("num_clients=0", "num_clients: must be greater than or equal to 1, got 0"),
        ("num_rounds=0", "num_rounds: must be greater than or equal to 1, got 0"),
        ("seed=-1", "seed: must be greater than or equal to 0, got -1"),
        ("seed=9223372036854775808", "seed: must be less than 9223372036854775808, got 9223372036854775808"),
        ("compressor.energy_start=1.5", "compressor.energy_start: must be less than or equal to 1, got 1.5"),
        ("compressor.energy_end=0", "compressor.energy_end: must be greater than 0, got 0"),
        ("algorithm.temperature=.nan", "algorithm.temperature: must be a finite number, got nan"),
        ("algorithm.divisor_floor=0", "algorithm.divisor_floor: must be greater than 0, got 0"),
        ("algorithm.local.batch_size=0", "algorithm.local.batch_size: must be greater than or equal to 1, got 0"),
        ("task.client_test_fraction=1", "task.client_test_fraction: must be less than 1, got 1"),
        ("num_clients=many", "num_clients: must be a whole number, "),
        ("algorithm.mutual=perhaps", "algorithm.mutual: must be true or false, "),
        ("algorithm.layer_map=[1, a]", "algorithm.layer_map.1: must be a whole number, "),
        ("name=7", "name: must be string, got 7"),
        ("task=digits", "task: must be a mapping, got 'digits'"),
        ("task=[digits]", "task: must be a mapping, got a list"),
        ("server=null", "server: must be a mapping, got None"),
        ("algorithm.local=5", "algorithm.local: must be a mapping, got 5"),
        ("algorithm.name=fedsgd", f"algorithm.name: must be one of {ALGORITHM_NAMES}, got 'fedsgd'"),
        ("algorithm={temperature: 1}", f"algorithm.name: must be one of {ALGORITHM_NAMES}, got None"),
        ("compressor.name=zip", f"compressor.name: must be one of {COMPRESSOR_NAMES}, got 'zip'"),
        ("task.name=mnist", "task.name: must be "),
        (
            "task.partition.name=shards",
            f"task.partition.name: must be one of {PARTITIONS}, got 'shards'",
        ),
        ("server.aggregator.name=median", "server.aggregator.name: must be "),
        ("algorithm.student_optimizer.name=lion", "algorithm.student_optimizer.name: must be 'adam', 'adamw' or 'sgd'"),
        ("task.student.num_layers=3", "task: student.num_layers must be at most teacher.num_layers (2), got 3"),
        ("task.teacher.num_heads=3", "task.teacher: num_heads must divide hidden_size 16, got 3"),
        ("server.min_replies=5", "server.min_replies must be at most the 4 clients that train in a round, got 5"),
        ("server.fraction_train=0.1", "server.fraction_train: 0.1 of 4 clients is none; raise it"),
        ("name=results/base", f"name: must be {FILE_NAME}, got 'results/base'"),
        ("name=..", f"name: must be {FILE_NAME}, got '..'"),
        ('name="base\\n"', f"name: must be {FILE_NAME}, got 'base\\n'"),
        ("num_rounds", "an override must look like key.key=value, got 'num_rounds'"),
        ("=3", "an override must look like key.key=value, got '=3'"),
        ("task..name=digits", "an override must look like key.key=value, got 'task..name=digits'"),
        ("seed=[", "override seed: '[' is not a YAML value"),
        ("seed=2024-13-45", "override seed: '2024-13-45' is not a YAML value"),
        ("server.round_timeout_seconds=.inf", "server.round_timeout_seconds: must be "),
        (
            "task.partition={alpha: 0.1}",
            f"task.partition.name: must be one of {PARTITIONS}, got None",
        ),
        ("name.first=x", "override name.first: 'first' is inside text, not inside a mapping"),
        ("num_rounds.of=3", "override num_rounds.of: 'of' is inside 2, not inside a mapping"),
        ("algorithm.local.num_epochs.x=3", "override algorithm.local.num_epochs.x: 'x' is inside 3, "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_is_allowed(override: str, start: str) -> None:
    message = message_of(BASE, override)
    assert message.startswith(start)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "config must be a mapping with keys like name, task and algorithm, got nothing"),
        ("- name\n- task", "config must be a mapping with keys like name, task and algorithm, got a list"),
        ("digits", "config must be a mapping with keys like name, task and algorithm, got text"),
        ("name: [", "config is not YAML: "),
        ("name: a\n\tseed: 1", "config is not YAML: "),
        ("name: 2024-13-45", "config is not YAML: "),
        ("[" * 5000, "config is not YAML: "),
        ("{}", "name: required, got nothing (and 4 more)"),
        (BASE.replace("num_rounds: 2\n", ""), "num_rounds: required, got nothing"),
        (BASE + "x: 1\ny: 2\n", f"x: unknown key; allowed: {OUTER_KEYS} (and 1 more)"),
    ],
)
def test_text_that_is_no_experiment_is_refused_in_one_line(text: str, start: str) -> None:
    message = message_of(text)
    assert message.startswith(start)
    assert "\n" not in message


def test_the_base_of_these_mistakes_is_itself_valid() -> None:
    experiment = parse(BASE)
    assert (experiment.name, experiment.seed, experiment.num_sampled) == ("base", 0, 4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"config file {str(path)!r} does not exist; give the path of a YAML file"


def test_a_directory_or_a_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path, binary):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value).startswith(f"config file {str(path)!r} can't be read: ")


def test_a_broken_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is not YAML: ")


def test_a_file_and_its_text_are_the_same_experiment(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    assert load(path, ["seed=3"]) == parse(BASE, ["seed=3"])


def test_an_override_changes_the_nested_key_and_leaves_its_neighbours() -> None:
    before, after = parse(BASE).model_dump(), parse(BASE, ["task.teacher.num_layers=4"]).model_dump()
    before["task"]["teacher"]["num_layers"] = 4
    assert after == before


def test_an_override_creates_the_sections_on_its_way() -> None:
    assert parse(BASE).server.aggregator.weighting == "num_examples"
    assert parse(BASE, ["server.aggregator.weighting=uniform"]).server.aggregator.weighting == "uniform"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("algorithm.layer_map=[2]", "layer_map", (2,)),
        ("algorithm.layer_map=null", "layer_map", None),
        ("algorithm.mutual=false", "mutual", False),
        ("algorithm.temperature=1e1", "temperature", 10.0),
        (" algorithm.temperature = 0.5", "temperature", 0.5),
    ],
)
def test_the_value_of_an_override_is_read_as_yaml(override: str, key: str, value: object) -> None:
    assert getattr(parse(BASE, [override]).algorithm, key) == value


def test_a_value_may_hold_the_equals_sign() -> None:
    assert parse(BASE, ["output_dir=a=b"]).output_dir == "a=b"


def test_overrides_apply_in_order() -> None:
    assert parse(BASE, ["seed=1", "seed=2"]).seed == 2


def test_another_algorithm_keeps_only_the_options_that_it_knows() -> None:
    swapped = parse(BASE, ["algorithm.name=fedavg"]).algorithm.model_dump()
    assert swapped["name"] == "fedavg"
    assert (swapped["local"]["num_epochs"], swapped["local"]["batch_size"]) == (3, 8)
    assert "temperature" not in swapped


def test_another_compressor_drops_the_options_of_the_first() -> None:
    assert parse(BASE, ["compressor.name=identity"]).compressor.model_dump() == {"name": "identity"}


def test_the_same_name_again_keeps_every_option() -> None:
    assert parse(BASE, ["algorithm.name=fedkd", "compressor.name=svd"]) == parse(BASE)


def test_options_of_the_new_plug_in_are_set_after_it() -> None:
    overrides = ["algorithm.name=fedprox", "algorithm.proximal_mu=0.5", "algorithm.local.num_epochs=1"]
    swapped = parse(BASE, overrides).algorithm.model_dump()
    assert (swapped["proximal_mu"], swapped["local"]["num_epochs"], swapped["local"]["batch_size"]) == (0.5, 1, 8)


def test_an_option_of_the_old_plug_in_is_refused_after_the_swap() -> None:
    message = message_of(BASE, "algorithm.name=fedavg", "algorithm.mutual=true")
    assert (
        message
        == "algorithm.mutual: unknown key; allowed: name, model, local, optimizer, keep_moments, logit_adjustment"
    )


ONE_REPLY = ("server.min_replies=1", "server.allow_single_reply=true")


@pytest.mark.parametrize(("fraction", "sampled"), [(1.0, 4), (0.75, 3), (0.7, 3), (0.5, 2), (0.3, 1)])
def test_the_fraction_that_trains_is_counted_in_whole_clients(fraction: float, sampled: int) -> None:
    assert parse(BASE, [f"server.fraction_train={fraction}", *ONE_REPLY]).num_sampled == sampled


def test_more_clients_than_examples_is_an_error_that_names_num_clients() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(BASE, ["num_clients=2000"]).build_task()
    message = str(caught.value)
    assert message.startswith("num_clients: 2000 clients need at least 4000 training examples, the data has 1437")
    assert "\n" not in message


def test_models_that_do_not_fit_the_algorithm_are_an_error_that_names_the_option() -> None:
    experiment = parse(BASE, ["algorithm.layer_map=[7]"])
    task = experiment.build_task()
    with pytest.raises(ConfigError) as caught:
        experiment.build_algorithm(task)
    assert str(caught.value) == "algorithm.layer_map must name 1 teacher layers in [1, 2], got [7]"


def test_version_0_follows_the_seed_of_the_experiment() -> None:
    def initial(*overrides: str) -> dict[str, np.ndarray]:
        experiment = parse(BASE, overrides)
        return dict(experiment.build_algorithm(experiment.build_task()).shared.initial())

    first, again, other = initial(), initial(), initial("seed=1")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_nothing_in_an_experiment_can_be_changed() -> None:
    def sections(model: BaseModel) -> list[BaseModel]:
        values = [getattr(model, name) for name in type(model).model_fields]
        return [model, *(inner for value in values if isinstance(value, BaseModel) for inner in sections(value))]

    found = sections(parse(BASE))
    assert len(found) > 8
    for section in found:
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


def test_the_resolved_yaml_writes_every_default_out() -> None:
    resolved = yaml.safe_load(parse(BASE).to_yaml())
    assert list(resolved) == list(Experiment.model_fields)
    assert resolved["compressor"] == {
        "error_feedback": "none",
        "name": "svd",
        "energy_start": 0.5,
        "energy_end": 0.98,
        "precision": "float32",
    }
    assert resolved["server"]["min_replies"] == 2
    assert resolved["algorithm"]["student_optimizer"]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("algorithm.layer_map=[2]", "algorithm.student_optimizer.max_grad_norm=1.5"),
        ("algorithm.name=local_only", "compressor.name=identity"),
        ("seed=9223372036854775807", "task.partition={name: dirichlet, alpha: 0.1}"),
        ("server.round_timeout_seconds=86400",),
    ],
)
def test_the_resolved_yaml_reads_back_to_an_equal_experiment(overrides: tuple[str, ...]) -> None:
    experiment = parse(BASE, overrides)
    assert parse(experiment.to_yaml()) == experiment


def test_a_partition_is_swapped_by_its_name_and_keeps_what_the_other_knows() -> None:
    skewed = parse(BASE, ["task.partition={name: dirichlet, alpha: 0.1, min_examples: 3}"])
    assert parse(skewed.to_yaml(), ["task.partition.name=iid"]).task.model_dump()["partition"] == {"name": "iid"}


def test_an_optimizer_is_swapped_by_its_name_and_keeps_its_options() -> None:
    before = parse(BASE, ["algorithm.student_optimizer.learning_rate=0.5"]).to_yaml()
    optimizer = parse(before, ["algorithm.student_optimizer.name=sgd"]).model_dump()["algorithm"]["student_optimizer"]
    assert (optimizer["name"], optimizer["learning_rate"]) == ("sgd", 0.5)


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="config is not YAML: key 'seed' stands twice in one mapping"):
        parse(BASE + "seed: 1\nseed: 2\n")


# Options of the server

SINGLE = "the aggregate of one reply is that client's update; set allow_single_reply to true to permit it"


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (
            ("server.min_replies=1",),
            f"server: min_replies must be at least 2, got 1: {SINGLE}",
        ),
        (("server.min_replies=0",), "server.min_replies: must be greater than or equal to 1, got 0"),
        (
            ("server.num_train=2", "server.fraction_train=0.5"),
            "server: give either fraction_train or num_train, got both",
        ),
        (("server.num_train=5",), "server.num_train must be at most num_clients, 4, got 5"),
        (("server.num_train=0",), "server.num_train: must be greater than or equal to 1, got 0"),
        (("server.num_train=1",), "server.min_replies must be at most the 1 clients that train in a round, got 2"),
        (("server.fraction_train=0",), "server.fraction_train: must be greater than 0, got 0"),
        (("server.min_available=5",), "server.min_available must be at most num_clients, 4, got 5"),
        (
            ("server.aggregator.name=krum",),
            "server.aggregator: krum needs 5 clients in a round, 4 train; sample more or lower num_malicious_nodes",
        ),
        (("server.aggregator.name=multikrum",), "server.aggregator: multikrum needs 5 clients in a round, 4 train"),
        (("server.aggregator.name=bulyan",), "server.aggregator: bulyan needs 7 clients in a round, 4 train"),
        (
            ("num_clients=9", "server.num_train=4", "server.aggregator.name=krum"),
            "server.aggregator: krum needs 5 clients in a round, 4 train",
        ),
        (("server.aggregator={name: fedtrimmedavg, beta: 0.5}",), "server.aggregator.beta: must be less than 0.5"),
        (("server.aggregator={name: fedavgm, eta: 0}",), "server.aggregator.eta: must be greater than 0, got 0"),
        (
            ("server.aggregator={name: fedavgm, eta: 1, momentum: 1}",),
            "server.aggregator.momentum: must be less than 1",
        ),
        (("server.aggregator={name: fedadam, eta: 1, tau: 0}",), "server.aggregator.tau: must be greater than 0"),
        (("server.validation.max_norm_ratio=1",), "server.validation.max_norm_ratio: must be greater than 1, got 1"),
        (
            ("server.validation.excess_norm=drop",),
            "server.validation.excess_norm: must be 'reject' or 'clip', got 'drop'",
        ),
        (
            ("server.validation.max_examples_ratio=.inf",),
            "server.validation.max_examples_ratio: must be a finite number",
        ),
        (("server.early_stop.max_wire_bytes=0",), "server.early_stop.max_wire_bytes: must be greater than 0, got 0"),
        (("server.early_stop.metric=''",), "server.early_stop.metric: must be text that is not empty, got ''"),
        (("server.num_attempts=11",), "server.num_attempts: must be less than or equal to 10, got 11"),
        (("server.keep_checkpoints=0",), "server.keep_checkpoints: must be greater than or equal to 1, got 0"),
        (
            ("server.max_resyncs_per_round=-1",),
            "server.max_resyncs_per_round: must be greater than or equal to 0, got -1",
        ),
        (
            ("server.early_stop.targets=1",),
            "server.early_stop.targets: unknown key; allowed: metric, target, max_wire_bytes",
        ),
    ],
)
def test_a_server_that_cannot_work_so_is_refused_by_its_key(overrides: tuple[str, ...], start: str) -> None:
    message = message_of(BASE, *overrides)
    assert message.startswith(start)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "sampled"),
    [
        (("server.num_train=3",), 3),
        (("server.num_train=4",), 4),
        (("server.num_train=2", "server.fraction_train=1.0"), 2),
        (("server.num_train=1", *ONE_REPLY), 1),
        (("server.min_available=4", "server.fraction_train=0.5"), 2),
        (("server.aggregator.name=krum", "server.aggregator.num_malicious_nodes=0"), 4),
        (("num_clients=5", "server.aggregator.name=krum"), 5),
        (("num_clients=7", "server.aggregator.name=bulyan"), 7),
    ],
)
def test_a_server_that_can_work_so_is_accepted(overrides: tuple[str, ...], sampled: int) -> None:
    experiment = parse(BASE, overrides)
    assert experiment.num_sampled == sampled
    assert parse(experiment.to_yaml()) == experiment


def test_options_of_an_aggregator_without_a_name_are_those_of_the_mean() -> None:
    aggregator = parse(BASE, ["server.aggregator={weighting: num_examples}"]).server.aggregator
    assert aggregator.model_dump() == {"name": "fedavg", "weighting": "num_examples"}


NESTED = "&a [x, x, x, x, x, x, x, x, x]"
BOMB = f"a: {NESTED}\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("bcdefg", "cdefgh", strict=True)
)
HUGE = "0x" + "f" * 20_000  # Python refuses to write it in decimal, and so do libraries that quote it


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (BASE + BOMB + "seed: *h", ()),
        (BASE.replace("name: base", "name: *h").replace("\nname", f"\n{BOMB}name"), ()),
        (BASE + f"seed: {HUGE}", ()),
        (BASE, (f"seed={HUGE}",)),
        (BASE, (f"num_rounds={'x' * 100_000}",)),
        (BASE, (f"{'x' * 100_000}=1",)),
        (BASE, ("x" * 100_000,)),
        (BASE, (".".join(["a"] * 100_000) + "=1",)),
        (BASE, ("compressor.name=[" + "x, " * 10_000 + "]",)),
        (BASE, ("compressor=" + "x" * 100_000,)),
        (BASE, ("task.name=" + HUGE,)),
        (BASE + "x" * 100_000 + ": 1\n", ()),
        (BASE + ("x" * 100_000 + ": 1\n") * 2, ()),
        (BASE + "seed: !" + "x" * 100_000 + " 1\n", ()),
    ],
)
def test_an_error_quotes_little_of_what_it_is_about(text: str, overrides: tuple[str, ...]) -> None:
    message = message_of(text, *overrides)
    assert len(message) < 3000
    assert "\n" not in message


def test_an_override_can_not_name_a_key_twice() -> None:
    assert "is not a YAML value" in message_of(BASE, "task.student={num_layers: 1, num_layers: 2}")
