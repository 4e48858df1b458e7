"""Run config and node config."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.retention import Retention
from fedkd_flwr.flower.settings import client_settings, code_digest, lasting_name, server_settings
from tests.conftest import ROOT, SMALL


def test_the_yaml_is_found_beside_the_app_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = server_settings({"config": "conf/digits_fedavg.yaml", "set": "seed=4"}, ROOT)
    assert (settings.experiment.name, settings.experiment.seed) == ("digits_fedavg", 4)


def test_config_text_wins_over_config() -> None:
    settings = server_settings({"config": "conf/digits_fedavg.yaml", "config-text": SMALL}, ROOT)
    assert settings.experiment.name == "small"


def test_results_go_to_flowers_home_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    default = server_settings({"config-text": SMALL, "run-name": "one"}, ROOT)
    assert default.run_dir == tmp_path / "fedkd" / "results" / "small" / "one"
    told = server_settings({"config-text": SMALL, "run-name": "one", "output-dir": str(tmp_path / "x")}, ROOT)
    assert told.run_dir == tmp_path / "x" / "small" / "one"


def test_a_nodes_own_state_directory_wins_over_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    run_config, node_config = {"config-text": SMALL}, {"partition-id": 2}
    assert client_settings(run_config, node_config, ROOT).state_dir == tmp_path / "fedkd" / "state"
    of_run = run_config | {"state-dir": str(tmp_path / "run")}
    assert client_settings(of_run, node_config, ROOT).state_dir == tmp_path / "run"
    of_node = node_config | {"state-dir": str(tmp_path / "node")}
    assert client_settings(of_run, of_node, ROOT).state_dir == tmp_path / "node"


def test_a_client_is_named_by_its_client_id_or_its_partition() -> None:
    assert client_settings({"config-text": SMALL}, {"partition-id": 2}, ROOT).client_key == "00002"
    named = client_settings({"config-text": SMALL}, {"partition-id": 2, "client-id": "site-a"}, ROOT)
    assert named.client_key == "site-a"


@pytest.mark.parametrize(
    ("node_config", "says"),
    [
        ({}, "partition-id must be an integer from 0, got None"),
        ({"partition-id": "1"}, "partition-id must be an integer from 0, got '1'"),
        ({"partition-id": 3}, r"partition-id must be in \[0, 2\] for num_clients 3, got 3"),
        ({"partition-id": 0, "client-id": "../etc"}, "client-id must match"),
        ({"partition-id": 0, "name": "a/b"}, "name must match"),
        ({"partition-id": 0, "name": "a", "client-id": "b"}, "client-id and name say the same, got 'b' and 'a'"),
        ({"partition-id": 0, "data_path": "/data"}, "unknown key 'data_path'; write data-path"),
        ({"data-path": "/nowhere/at/all"}, "data-path must be a folder or file of the node, there is none"),
        ({"partition-id": 0, "device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_a_node_that_is_not_told_who_it_is_says_what_is_missing(node_config: dict[str, int | str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"node config: {says}"):
        client_settings({"config-text": SMALL}, node_config, ROOT)


def test_a_node_with_data_of_its_own_needs_no_partition_and_keeps_the_name_it_first_drew(tmp_path: Path) -> None:
    node = {"data-path": str(tmp_path), "state-dir": str(tmp_path / "state")}
    first = client_settings({"config-text": SMALL}, node, ROOT)
    assert (first.data_path, first.partition_id) == (tmp_path, 0)
    assert client_settings({"config-text": SMALL}, node, ROOT).client_key == first.client_key
    elsewhere = node | {"state-dir": str(tmp_path / "other")}
    assert client_settings({"config-text": SMALL}, elsewhere, ROOT).client_key != first.client_key
    named = client_settings({"config-text": SMALL}, node | {"name": "site1"}, ROOT)
    assert named.client_key == "site1"


def test_a_lasting_name_that_can_not_be_kept_is_one_line_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    node = {"data-path": str(tmp_path), "state-dir": str(tmp_path / "state")}
    with pytest.raises(ConfigError, match="state-dir can't keep a name") as caught:
        client_settings({"config-text": SMALL}, node, ROOT)
    assert str(tmp_path) not in str(caught.value)


def test_a_node_says_on_which_device_it_trains(tmp_path: Path) -> None:
    chosen = client_settings({"config-text": SMALL}, {"partition-id": 0, "device": "cpu"}, ROOT).experiment
    assert chosen.algorithm.model_dump()["local"]["device"] == "cpu"
    left = client_settings({"config-text": SMALL}, {"partition-id": 0, "device": "auto"}, ROOT).experiment
    assert left == client_settings({"config-text": SMALL}, {"partition-id": 0}, ROOT).experiment


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/x", "..", ".", ".hidden", "a/b", "a b", "a\n", "x" * 65, "-rf", "caf\xe9"]
)
def test_a_run_name_that_would_lead_elsewhere_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    config = {"config-text": SMALL, "output-dir": str(tmp_path), "run-name": name}
    with pytest.raises(ConfigError, match="run config: run-name must match") as caught:
        server_settings(config, ROOT)
    assert "\n" not in str(caught.value)


def test_a_run_name_is_the_folder_and_an_empty_one_is_the_time(tmp_path: Path) -> None:
    config = {"config-text": SMALL, "output-dir": str(tmp_path)}
    assert server_settings(config | {"run-name": "seed-1.v2"}, ROOT).run_dir == tmp_path / "small" / "seed-1.v2"
    assert server_settings(config | {"run-name": ""}, ROOT).run_dir.name.startswith("20")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state-max-age-days": -1}, "state-max-age-days must be a number of days from 0, .* got -1"),
        ({"state-max-age-days": float("nan")}, "state-max-age-days must be a number of days from 0, .* got nan"),
        ({"state-max-age-days": "30"}, "state-max-age-days must be a number of days from 0, .* got '30'"),
        ({"state-max-age-days": True}, "state-max-age-days must be a number of days from 0, .* got True"),
        ({"state-max-bytes": -1}, "state-max-bytes must be a whole number of bytes from 0, .* got -1"),
        ({"state-max-bytes": 1.5}, "state-max-bytes must be a whole number of bytes from 0, .* got 1.5"),
        ({"state-max-bytes": "1GB"}, "state-max-bytes must be a whole number of bytes from 0, .* got '1GB'"),
        ({"state_max_bytes": 1}, "unknown key 'state_max_bytes'; write state-max-bytes"),
        ({"state-dir": "/srv/\0secret"}, "state-dir must be the path of a directory, got none that this machine"),
        ({"state-dir": "~nobody-here/x"}, "state-dir must be the path of a directory, got none that this machine"),
    ],
)
def test_what_a_node_keeps_is_refused_unless_it_is_a_number(
    change: dict[str, bool | float | int | str], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"node config: {says}") as caught:
        client_settings({"config-text": SMALL}, {"partition-id": 0, **change}, ROOT)
    assert "secret" not in str(caught.value)


def test_a_node_keeps_state_for_half_a_year_and_without_a_quota_unless_told_otherwise() -> None:
    assert client_settings({"config-text": SMALL}, {"partition-id": 0}, ROOT).retention == Retention(180.0, 0)
    told = {"partition-id": 0, "state-max-age-days": 7, "state-max-bytes": 20_000_000_000}
    assert client_settings({"config-text": SMALL}, told, ROOT).retention == Retention(7.0, 20_000_000_000)


@pytest.mark.parametrize("name", ["~nobody-here/x", "/srv/\0x"])
def test_an_output_directory_that_no_machine_can_have_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="run config: output-dir must be the path of a directory, got '"):
        server_settings({"config-text": SMALL, "output-dir": name}, ROOT)


def test_two_nodes_that_draw_a_name_at_once_have_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: lasting_name(tmp_path / "state"), range(32)))
    assert len(set(names)) == 1


def test_other_code_than_was_started_is_refused() -> None:
    assert server_settings({"config-text": SMALL, "code-digest": code_digest(ROOT)}, ROOT)
    with pytest.raises(ConfigError, match="is other code than was started"):
        server_settings({"config-text": SMALL, "code-digest": "0" * 64}, ROOT)


def test_the_code_digest_changes_with_an_app(tmp_path: Path) -> None:
    for name in ("server_app.py", "client_app.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    same = code_digest(tmp_path)
    assert same == code_digest(ROOT)
    (tmp_path / "client_app.py").write_text("# other\n")
    assert code_digest(tmp_path) != same


def test_overrides_that_no_shell_would_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="set can't be split"):
        server_settings({"config-text": SMALL, "set": "seed='1"}, ROOT)


def test_a_run_to_resume_is_found_by_name_or_as_the_latest(tmp_path: Path) -> None:
    for name in ("20260101-1", "20260202-1"):
        (tmp_path / "small" / name).mkdir(parents=True)
    config = {"config-text": SMALL, "output-dir": str(tmp_path)}
    latest = server_settings(config | {"resume": "latest"}, ROOT)
    assert (latest.run_dir, latest.resume, latest.force) == (tmp_path / "small" / "20260202-1", True, False)
    named = server_settings(config | {"resume": "20260101-1", "resume-force": True}, ROOT)
    assert (named.run_dir.name, named.force) == ("20260101-1", True)
    with pytest.raises(ConfigError, match=r"resume must be a run in .* or 'latest', got '../x'"):
        server_settings(config | {"resume": "../x"}, ROOT)
    with pytest.raises(ConfigError, match="got 'latest'"):
        server_settings(config | {"resume": "latest", "output-dir": str(tmp_path / "empty")}, ROOT)
